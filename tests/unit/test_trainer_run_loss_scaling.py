"""Loss scaling: which overflows only lower the scale, and which steps are the non-finite policy's."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tests.unit.test_trainer_models_precision import NoWaiting
from trainer.optimizer import clip_gradients
from trainer.run.loss_scaling import MOST_OVERFLOWS, LossScaler, Outcome, outcome_of

CPU = torch.device("cpu")


@pytest.mark.parametrize(("loss", "norm", "scale", "overflows", "expected"), [
    (1.0, 2.0, None, 0, Outcome.UPDATE), (1.0, 2.0, 65536.0, MOST_OVERFLOWS, Outcome.UPDATE),
    (1.0, math.inf, 65536.0, 0, Outcome.OVERFLOW), (1.0, math.nan, 2.0, MOST_OVERFLOWS - 1, Outcome.OVERFLOW),
    (1.0, math.inf, 65536.0, MOST_OVERFLOWS, Outcome.NON_FINITE),  # again and again
    (1.0, math.nan, 1.0, 0, Outcome.NON_FINITE), (1.0, math.inf, 0.5, 0, Outcome.NON_FINITE),  # not the scale's fault
    (math.nan, 2.0, 65536.0, 0, Outcome.NON_FINITE), (math.inf, math.nan, 65536.0, 0, Outcome.NON_FINITE),
    (1.0, math.nan, None, 0, Outcome.NON_FINITE),  # nothing is scaled
])
def test_only_gradients_that_a_lower_scale_can_mend_are_an_overflow(
        loss: float, norm: float, scale: float | None, overflows: int, expected: Outcome) -> None:
    assert outcome_of({"loss_dice": 0.1, "loss": loss, "grad_norm": norm}, scale, overflows) is expected


class Steps:
    """Steps on one weight, whose unscaled gradient is given."""

    def __init__(self, *, enabled: bool = True) -> None:
        self.weight = nn.Parameter(torch.zeros(1))
        self.optimizer = torch.optim.SGD([self.weight], lr=1.0)
        self.scaler = LossScaler(enabled, CPU)

    def step(self, gradient: float, loss: float = 1.0, clip: float | None = None) -> Outcome:
        self.optimizer.zero_grad()
        self.scaler.scaled((self.weight * gradient).sum()).backward()
        assert self.weight.grad is not None
        if abs(float(self.weight.grad)) > torch.finfo(torch.float16).max:  # as it is in fp16
            self.weight.grad.fill_(math.inf)
        self.scaler.unscale(self.optimizer)
        norm = clip_gradients([self.weight], clip)
        outcome = self.scaler.judge({"loss": loss, "grad_norm": float(norm)})
        if outcome is Outcome.UPDATE:
            self.optimizer.step()
        return outcome


def test_the_scale_halves_until_the_gradients_fit_and_steps_are_unscaled() -> None:
    steps = Steps()
    assert [steps.step(10.0) for _ in range(5)] == [Outcome.OVERFLOW] * 4 + [Outcome.UPDATE]
    assert steps.scaler.scale == 4096 and steps.weight.item() == -10
    assert steps.step(3.0, clip=1.0) is Outcome.UPDATE
    assert steps.weight.item() == pytest.approx(-11), "gradients are clipped after they are unscaled"


def test_an_overflow_at_scale_1_is_a_non_finite_step_and_the_scale_stays() -> None:
    steps = Steps()
    assert [steps.step(math.inf) for _ in range(18)] == [Outcome.OVERFLOW] * 16 + [Outcome.NON_FINITE] * 2
    assert steps.scaler.scale == 1 and steps.weight.item() == 0
    assert steps.step(2.0) is Outcome.UPDATE and steps.weight.item() == -2


def test_a_non_finite_loss_leaves_no_trace_in_the_scaler() -> None:
    steps = Steps()
    steps.step(0.5)
    before = steps.scaler.state()
    for _ in range(3):
        assert steps.step(math.nan, loss=math.nan) is Outcome.NON_FINITE
    assert steps.scaler.state() == before and before is not None and before["_growth_tracker"] == 1


def test_a_good_step_never_waits_for_the_device() -> None:
    steps = Steps()
    loss = (steps.weight * 0.5).sum()
    with NoWaiting():
        steps.scaler.scaled(loss).backward()
        steps.scaler.unscale(steps.optimizer)
        assert steps.scaler.judge({"loss": 0.5, "grad_norm": 0.5}) is Outcome.UPDATE


def test_a_state_continues_where_it_was_saved() -> None:
    whole, halves = Steps(), Steps()
    for number in range(12):
        gradient = 10.0 if number in (2, 3, 4, 5, 9) else 0.5
        if number in (3, 8):
            state, halves.scaler = halves.scaler.state(), LossScaler(enabled=True, device=CPU)
            halves.scaler.restore(state)
        assert whole.step(gradient) == halves.step(gradient)
        assert whole.scaler.state() == halves.scaler.state()
    assert torch.equal(whole.weight, halves.weight) and whole.scaler.state() != Steps().scaler.state()


def test_the_scale_doubles_after_steps_without_an_overflow() -> None:
    steps = Steps()
    state = steps.scaler.state()
    assert state is not None
    steps.scaler.restore({**state, "_growth_tracker": 1999})
    steps.step(1e-3)
    assert steps.scaler.scale == 2 * 65536


def test_without_scaling_everything_passes_unchanged() -> None:
    steps, loss = Steps(enabled=False), torch.ones(())
    assert steps.scaler.scaled(loss) is loss
    assert steps.step(2.0) is Outcome.UPDATE and steps.weight.item() == -2
    assert steps.step(math.inf) is Outcome.NON_FINITE
    assert steps.scaler.state() is None and steps.scaler.logged() == {} and steps.scaler.scale is None
