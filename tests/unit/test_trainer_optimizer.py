"""Parameter groups, schedules and clipping."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from trainer.config import OptimizerConfig
from trainer.optimizer import (
    build_optimizer,
    clip_gradients,
    learning_rate,
    one_cycle,
    param_groups,
    set_learning_rates,
)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Linear(3, 3).requires_grad_(False)
        self.conv = nn.Conv2d(3, 4, 1)
        self.bn = nn.SyncBatchNorm(4)
        self.ln = nn.LayerNorm(4)
        self.gn = nn.GroupNorm(2, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.query_feat = nn.Embedding(5, 4)
        self.query_pos = nn.Parameter(torch.zeros(5, 4))
        self.level_embed = nn.Parameter(torch.zeros(3, 4))
        self.level_encoding = nn.Parameter(torch.zeros(3, 4))
        self.tied = nn.Conv2d(3, 4, 1)
        self.tied.weight = self.conv.weight


DECAYED = {"conv.weight", "attention.in_proj_weight", "attention.out_proj.weight"}


def test_every_trainable_parameter_is_in_exactly_one_group() -> None:
    model = Model()
    groups = param_groups(model, OptimizerConfig(weight_decay=0.05))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    grouped = [[names[id(parameter)] for parameter in group["params"]] for group in groups]
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0]
    assert set(grouped[0]) == DECAYED
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert sorted(grouped[0] + grouped[1]) == sorted(trainable)


def test_decay_all_makes_one_group() -> None:
    (group,) = param_groups(Model(), OptimizerConfig(weight_decay=0.001, decay_all=True))
    assert group["weight_decay"] == 0.001
    assert len(group["params"]) == sum(parameter.requires_grad for parameter in Model().parameters())
    with pytest.raises(ValueError, match="no trainable parameter"):
        param_groups(nn.Linear(2, 2).requires_grad_(False), OptimizerConfig())


def test_build_optimizer_follows_the_config() -> None:
    optimizer = build_optimizer(Model(), OptimizerConfig(lr=0.3, betas=[0.8, 0.9], weight_decay=0.2))
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.0]
    assert all(group["betas"] == (0.8, 0.9) and group["lr"] == 0.3 for group in optimizer.param_groups)
    set_learning_rates(optimizer, 0, OptimizerConfig(lr=0.125, warmup_steps=0), 10)
    assert all(group["lr"] == 0.125 for group in optimizer.param_groups)


def test_poly_warms_up_then_decays_to_almost_zero() -> None:
    config = OptimizerConfig(lr=1.0, warmup_steps=10, power=0.9)
    rates = [learning_rate(step, config, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[4] == pytest.approx(0.5 * 0.96**0.9)
    assert rates[9] == pytest.approx(0.91**0.9)
    assert all(later < earlier for earlier, later in pairwise(rates[9:]))
    assert 0 < rates[-1] == pytest.approx(0.01**0.9)
    assert learning_rate(0, OptimizerConfig(lr=1.0, warmup_steps=0), 100) == 1.0


def test_one_cycle_is_the_published_recipe_one_step_late() -> None:
    config = OptimizerConfig(lr=1e-3, schedule="one_cycle", warmup_steps=1500)
    assert learning_rate(0, config, 40000) == learning_rate(1, config, 40000) == pytest.approx(1e-9)
    assert learning_rate(1500, config, 40000) / 1e-3 == pytest.approx(0.9619, abs=1e-4)
    assert learning_rate(1501, config, 40000) / 1e-3 == pytest.approx(0.9965, abs=1e-4)
    assert learning_rate(20000, config, 40000) == pytest.approx(5e-4)


def test_one_cycle_linear_annealing_and_floor() -> None:
    assert one_cycle(50, 1.0, 200, 20, anneal_strategy="linear") == pytest.approx(0.75)
    assert one_cycle(199, 1.0, 200, 20, final_div_factor=4.0) == pytest.approx(0.01)
    with pytest.raises(ValueError, match="cosine"):
        one_cycle(0, 1.0, 10, 1, anneal_strategy="cosine")


def test_clipping_returns_the_norm_before_and_scales_jointly() -> None:
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(3))]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])  # the third has none
    assert float(clip_gradients(parameters, None)) == 5.0
    assert float(clip_gradients(iter(parameters), 1.0)) == 5.0
    assert parameters[0].grad.tolist() == pytest.approx([0.6, 0.0], abs=1e-5)
    assert parameters[1].grad.tolist() == pytest.approx([0.8], abs=1e-5)
    parameters[1].grad.fill_(math.nan)
    assert clip_gradients(parameters, 1.0).isnan()


def test_poly_after_warmup_is_the_published_schedule() -> None:
    """EoMT's ADE20K recipe, by hand: the head rises to step 2000; the ViT is 0 until then, and rises to step 5000."""
    config = OptimizerConfig(lr=2e-4, schedule="poly_after_warmup", warmup_steps=2000, backbone_warmup_steps=3000)
    table = {  # step: rates of head and ViT, as parts of 2e-4
        0: (0.0, 0.0),
        1: (1 / 2000, 0.0),
        1000: (0.5, 0.0),
        1999: (1999 / 2000, 0.0),
        2000: (1.0, 0.0),
        2001: ((18207 / 18208) ** 0.9, 1 / 3000),
        3500: ((16708 / 18208) ** 0.9, 0.5),
        4999: ((15209 / 18208) ** 0.9, 2999 / 3000),
        5000: ((15208 / 18208) ** 0.9, 1.0),
        12604: ((7604 / 18208) ** 0.9, 0.5**0.9),
        20207: ((1 / 18208) ** 0.9, (1 / 15208) ** 0.9),
    }
    for step, (head, vit) in table.items():
        assert learning_rate(step, config, 20208) == pytest.approx(2e-4 * head, rel=1e-12, abs=0), step
        assert learning_rate(step, config, 20208, is_vit=True) == pytest.approx(2e-4 * vit, rel=1e-12, abs=0), step


def test_poly_after_warmup_without_warmups() -> None:
    config = OptimizerConfig(lr=1.0, schedule="poly_after_warmup", warmup_steps=0, power=1.0)
    for is_vit in (False, True):
        assert [learning_rate(step, config, 4, is_vit=is_vit) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]
    both = OptimizerConfig(lr=1.0, schedule="poly_after_warmup", warmup_steps=2, power=1.0)
    assert [learning_rate(step, both, 4, is_vit=True) for step in range(4)] == [0.0, 0.5, 1.0, 0.5], "as the head"
    short = OptimizerConfig(lr=1.0, schedule="poly_after_warmup", warmup_steps=9)
    assert learning_rate(3, short, 4) == pytest.approx(1 / 3), "a run that ends in its warm-up"
