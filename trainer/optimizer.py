"""AdamW with its weight-decay groups, learning rates as pure functions of the step, and gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config import OptimizerConfig
from trainer.models.backbones.base import vit_layers_above
from trainer.models.fsdp import part_like, whole

UNDECAYED_MODULES = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.LayerNorm, nn.GroupNorm,
                     nn.RMSNorm, nn.Embedding, nn.ParameterList)  # the last: PMT's scales
UNDECAYED_NAMES = ("level_embed", "level_encoding", "query_", "cls_token", "register_tokens", "position_embeddings",
                   "lambda1")
FUSED_ON = ("cuda",)  # devices where AdamW is one kernel; elsewhere torch's default, which rounds differently


def param_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Parameter groups that contain every trainable parameter exactly once, in the model's order.

    Norms, biases, scales and embeddings (modules in UNDECAYED_MODULES, parameters named as in UNDECAYED_NAMES) get no
    weight decay unless `decay_all` is set: they have few degrees of freedom, and pulling them to zero only shifts the
    features (Mask2Former's recipe). Besides torch's keys each group has "is_vit" and "lr_scale", the factor on its
    learning rate: layer_decay^n for a ViT block with n blocks above it (arXiv:2106.08254). Raises ValueError when
    nothing is trainable.
    """
    above = vit_layers_above(model)
    groups: dict[tuple[bool, int, bool], dict[str, Any]] = {}
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue  # frozen, or shared with an earlier module
            seen.add(id(parameter))
            exempt = isinstance(module, UNDECAYED_MODULES) or name.endswith("bias") or name.startswith(UNDECAYED_NAMES)
            decays = config.decay_all or not exempt
            is_vit, count = id(parameter) in above, above.get(id(parameter), 0)
            group = groups.setdefault((is_vit, count, not decays), {
                "params": [], "weight_decay": config.weight_decay if decays else 0.0,
                "lr_scale": config.layer_decay**count, "is_vit": is_vit})
            group["params"].append(parameter)
    if not groups:
        raise ValueError("the model has no trainable parameter")
    return [groups[key] for key in sorted(groups)]  # adapter and head first, decayed groups before undecayed ones


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; `set_learning_rates` sets its learning rates at each step. Call it when the
    model is on its device."""
    groups = param_groups(model, config)
    is_fused = groups[0]["params"][0].device.type in FUSED_ON
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.betas[0], config.betas[1]), fused=is_fused or None)


def learning_rate(step: int, config: OptimizerConfig, total_steps: int, *, is_vit: bool = False) -> float:
    """Learning rate of optimiser step `step` (0 for the first of `total_steps`).

    poly: (1 - step / total)^power times a linear warm-up that reaches one at its last step. With
    `backbone_warmup_steps` the ViT stays fixed during the others' warm-up and then has its own, so that a randomly
    initialised head cannot damage it (arXiv:2503.19108).
    poly_after_warmup: see the function of that name.
    one_cycle: DINOv3's linear recipe, whose schedule lags one step behind because the first is not counted.
    """
    if config.schedule == "one_cycle":
        return one_cycle(max(step - 1, 0), config.lr, total_steps, config.warmup_steps)
    waits = is_vit and config.backbone_warmup_steps > 0
    if config.schedule == "poly_after_warmup":
        first, warmup_steps = (config.warmup_steps, config.backbone_warmup_steps) if waits else (0, config.warmup_steps)
        return config.lr * poly_after_warmup(step - first, warmup_steps, total_steps - first, config.power)
    done, warmup_steps = step + 1, config.warmup_steps
    if waits:
        done, warmup_steps = max(done - warmup_steps, 0), config.backbone_warmup_steps
    warmup = min(1.0, done / warmup_steps) if warmup_steps else 1.0
    return config.lr * warmup * math.pow(1.0 - step / total_steps, config.power)


def poly_after_warmup(step: int, warmup_steps: int, total_steps: int, power: float) -> float:
    """Fraction of the peak rate at `step` of `total_steps`: 0 up to the first step, rising linearly to 1 at the end of
    the warm-up, then (1 - t)^power over the remaining steps (EoMT, tue-mps/eomt, for each parameter group)."""
    if step < warmup_steps:
        return max(0, step) / warmup_steps
    return float((1.0 - (step - warmup_steps) / max(1, total_steps - warmup_steps)) ** power)


def one_cycle(count: int, max_lr: float, total_steps: int, warmup_steps: int, *, warmup_ratio: float = 1e-6,
              final_div_factor: float = math.inf, anneal_strategy: str = "cos") -> float:
    """Learning rate after `count` scheduler steps: linear warm-up, then "cos" or "linear" annealing to
    max_lr / 25 / final_div_factor.

    Faithful to the reference: annealing counts from step 0, and the warm-up is multiplied by a linear decay, so with
    "cos" the rate jumps up by a few per cent when the warm-up ends. Raises ValueError for another strategy.
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
    """AdamW's beta1 after `count` scheduler steps in the reference's `use_beta1` variant: 0 during warm-up."""
    return 0.0 if count < warmup_steps else beta1


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load saved moments, whole ones also where the parameters are sharded. Settings such as weight decay stay those of
    the current configuration, and the device's: a fused AdamW counts its steps on the device, others on the host."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {number: {name: value.clone() if name == "step" else part_like(parameters[number], value)
                        for name, value in moments.items()} for number, moments in state["state"].items()}
    settings = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    groups = [{**group, **current} for group, current in zip(state["param_groups"], settings, strict=True)]
    optimizer.load_state_dict({**state, "state": moments, "param_groups": groups})


def set_learning_rates(optimizer: torch.optim.Optimizer, step: int, config: OptimizerConfig, total_steps: int) -> None:
    """Set every parameter group's learning rate for this step."""
    for group in optimizer.param_groups:
        group["lr"] = group["lr_scale"] * learning_rate(step, config, total_steps, is_vit=group["is_vit"])


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """Clip gradients to a global L2 norm of `max_norm` (None: no clipping); return the norm before clipping.

    Never synchronises with the device; collective where parameters are sharded. A NaN or infinite norm is returned, for
    the caller to handle.
    """
    parameters = list(parameters)
    norm = whole(nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None]))
    if max_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm
