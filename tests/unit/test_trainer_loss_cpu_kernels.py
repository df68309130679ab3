"""CPU kernels against the path of other devices, which also runs on a CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.unit.test_trainer_loss_mask_classification_loss import (
    SETTINGS,
    items_of,
    outputs_of,
    seeded,
    targets_of,
)
from trainer.loss import cpu_kernels
from trainer.loss.mask_classification_loss import MaskClassificationLoss
from trainer.loss.point_sampling import smallest


@pytest.mark.parametrize("ignore", ["background", "exclude"])
def test_a_step_has_the_same_losses_and_gradients_on_either_path(ignore: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for is_cpu in (True, False):
        monkeypatch.setattr(cpu_kernels, "serve", lambda values, is_cpu=is_cpu: is_cpu)
        outputs, targets = outputs_of(3, 9, (8, 8)), targets_of([4, 0, 2], (32, 32))
        loss = MaskClassificationLoss(**SETTINGS, ignore=ignore).step(outputs, targets, generator=seeded())
        loss.total.backward()
        found.append([*loss.losses.values(), *(item["pred_masks"].grad for item in items_of(outputs))])
    for on_cpu, on_device in zip(*found, strict=True):
        torch.testing.assert_close(on_cpu, on_device, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("values", [
    torch.rand(3, 1000, generator=torch.Generator().manual_seed(0)),
    torch.rand(2, 17, generator=torch.Generator().manual_seed(0)),
    torch.zeros(2, 100),  # ties only
    torch.arange(160.0).remainder(16).expand(2, -1).contiguous(),  # what is looked at first is the smallest of all,
    15 - torch.arange(160.0).remainder(16).expand(2, -1).contiguous(),  # or the largest
], ids=["many", "few", "equal", "low bound", "high bound"])
def test_the_smallest_values_are_found_exactly(values: Tensor, loss_path: str) -> None:
    for count in (1, 2, values.shape[1] // 4, values.shape[1] - 1, values.shape[1]):
        found = smallest(values, count)
        assert found.shape == (len(values), count) and all(len(set(row)) == count for row in found.tolist())
        assert torch.equal(values.gather(1, found).sort(1).values, values.sort(1).values[:, :count])


def test_points_are_ordered_and_none_is_lost_or_changed() -> None:
    points = torch.rand(2, 3, 1000, 2, generator=torch.Generator().manual_seed(0))
    points[0, 0, :4] = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0], [0.99999994, 0.5]])
    ordered = cpu_kernels.sort_by_location(points)
    assert ordered.shape == points.shape
    rows = (ordered[..., 1] * 128).int()
    assert (rows.diff(dim=-1) >= 0)[1:].all() and (rows[0, 0].clamp(max=127).diff() >= 0).all()
    for before, after in zip(points.flatten(0, 1), ordered.flatten(0, 1), strict=True):
        assert sorted(map(tuple, before.tolist())) == sorted(map(tuple, after.tolist()))
