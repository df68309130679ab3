"""Gradient checkpointing: store a layer's inputs instead of its activations, and recompute them (arXiv:1604.06174)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class RecomputingModule(nn.Module):
    """A module that runs its layers through `run`, so that their activations can be recomputed in the backward pass.

    These layers must not contain batch norm: its running statistics would be updated twice.
    """

    gradient_checkpointing = False

    def run(self, layer: Callable[..., Any], *inputs: Any) -> Any:
        """`layer(*inputs)`; when it is recomputed, it draws the same random numbers."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)


def set_gradient_checkpointing(model: nn.Module, enabled: bool) -> None:
    """Enable or disable it in every part of a model that supports it."""
    for module in model.modules():
        if isinstance(module, RecomputingModule):
            module.gradient_checkpointing = enabled
