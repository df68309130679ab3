"""AdamW, which parameters decay, learning rates as pure functions of the step, and gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config import OptimizerConfig

UNDECAYED_MODULES = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.LayerNorm, nn.GroupNorm,
                     nn.RMSNorm, nn.Embedding)
UNDECAYED_NAMES = ("level_embed", "level_encoding", "query_")


def param_groups(model: nn.Module, weight_decay: float, decay_all: bool) -> list[dict[str, Any]]:
    """Optimiser groups with every trainable parameter in exactly one of them, in the model's order.

    Norms, biases and embeddings (nn.Embedding, and parameters called level_embed, level_encoding or query_...) get
    no weight decay unless `decay_all`: they have few degrees of freedom, and pulling them to zero only moves the
    features (Mask2Former's recipe). Raises ValueError when nothing is trainable.
    """
    decayed: dict[int, nn.Parameter] = {}
    undecayed: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in decayed or id(parameter) in undecayed:
                continue  # frozen, or shared with a module that came before
            spared = isinstance(module, UNDECAYED_MODULES) or name.endswith("bias") or name.startswith(UNDECAYED_NAMES)
            group = undecayed if spared and not decay_all else decayed
            group[id(parameter)] = parameter
    if not decayed and not undecayed:
        raise ValueError("the model has no trainable parameter")
    groups = [{"params": list(decayed.values()), "weight_decay": weight_decay},
              {"params": list(undecayed.values()), "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; its learning rate is set each step from `learning_rate`."""
    groups = param_groups(model, config.weight_decay, config.decay_all)
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.betas[0], config.betas[1]))


def learning_rate(step: int, config: OptimizerConfig, total_steps: int) -> float:
    """Learning rate of optimiser step `step` (0 for the first of `total_steps`).

    poly: (1 - step / total)^power times a linear warm-up that reaches one at its last step.
    one_cycle: DINOv3's linear recipe, whose schedule lags one step behind because the first is not counted.
    """
    if config.schedule == "one_cycle":
        return one_cycle(max(step - 1, 0), config.lr, total_steps, config.warmup_steps)
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    return config.lr * warmup * math.pow(1.0 - step / total_steps, config.power)


def one_cycle(count: int, max_lr: float, total_steps: int, warmup_steps: int, *, warmup_ratio: float = 1e-6,
              final_div_factor: float = math.inf, anneal_strategy: str = "cos") -> float:
    """Learning rate after `count` scheduler steps: a linear warm-up, then annealing "cos" or "linear" to
    max_lr / 25 / final_div_factor.

    Kept as the reference has it: annealing counts from the very start, and the warm-up is multiplied by a linear
    decay, so that with "cos" the rate jumps up by a few per cent when the warm-up ends. Raises ValueError for
    another strategy.
    """
    if anneal_strategy not in ("cos", "linear"):
        raise ValueError(f"anneal_strategy is {anneal_strategy!r}, legal: cos, linear")
    if count < warmup_steps:
        missing = (1.0 - count / warmup_steps) * (1.0 - warmup_ratio)
        return max_lr * (1.0 - missing) * (1.0 - count / total_steps)
    min_lr = max_lr / 25.0 / final_div_factor
    if anneal_strategy == "linear":
        return max_lr + (min_lr - max_lr) * count / total_steps
    return min_lr + (max_lr - min_lr) / 2.0 * (1.0 + math.cos(math.pi * (count + 1) / total_steps))


def one_cycle_beta1(count: int, beta1: float, warmup_steps: int) -> float:
    """AdamW's beta1 after `count` scheduler steps in the reference's `use_beta1` variant: no momentum in warm-up."""
    return 0.0 if count < warmup_steps else beta1


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Take over saved moments; settings such as weight decay stay those of the current configuration."""
    settings = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, current in zip(optimizer.param_groups, settings, strict=True):
        group.update(current)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scale gradients down to a joint L2 norm of `max_norm` (None: leave them) and return the norm they had.

    Never waits for the device; a norm that is NaN or infinite is returned for the caller to act on.
    """
    parameters = list(parameters)
    if max_norm is None:
        return nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    return nn.utils.clip_grad_norm_(parameters, max_norm)
