"""Gradient checkpointing: keep a layer's inputs instead of its activations and compute it twice (arXiv:1604.06174)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class RecomputingModule(nn.Module):
    """A module that runs its layers through `run`, and so may forget their activations until the backward pass.

    No layer with batch norm may be among them: its running statistics would be updated twice.
    """

    gradient_checkpointing = False

    def run(self, layer: Callable[..., Any], *inputs: Any) -> Any:
        """`layer(*inputs)`; random numbers drawn in it are the same ones when it is computed again."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)


def set_gradient_checkpointing(model: nn.Module, enabled: bool) -> None:
    """Switch it on or off in every part of a model that can do it."""
    for module in model.modules():
        if isinstance(module, RecomputingModule):
            module.gradient_checkpointing = enabled
