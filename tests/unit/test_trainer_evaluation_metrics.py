"""The confusion matrix and its metrics, against counting by hand."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from trainer.evaluation import metrics
from trainer.evaluation.metrics import ConfusionMatrix


def counted(pred: list[int], label: list[int], num_classes: int) -> ConfusionMatrix:
    matrix = ConfusionMatrix(num_classes)
    matrix.update(torch.tensor(pred), torch.tensor(label))
    return matrix


def test_areas_count_sets_of_pixels() -> None:
    generator = torch.Generator().manual_seed(0)
    pred = torch.randint(0, 4, (20, 30), generator=generator)
    label = torch.randint(0, 5, (20, 30), generator=generator)
    label[label == 4] = 255
    matrix = ConfusionMatrix(4)
    matrix.update(pred.to(torch.uint8), label.to(torch.uint8))
    for c in range(4):
        of_pred, of_label = (pred == c) & (label != 255), label == c
        areas = [int(area[c]) for area in matrix.areas()]
        assert areas == [int(s.sum()) for s in (of_pred & of_label, of_pred | of_label, of_pred, of_label)]


def test_summary_by_hand() -> None:
    # class 0: 2 of 3 found; class 1: 1 of 1 found, one false; class 2: absent; class 3: labelled, never found
    summary = counted([0, 0, 1, 1, 0], [0, 0, 0, 1, 3], 4).summary()
    assert summary["per_class_iou"][:2] == pytest.approx([2 / 4, 1 / 2])
    assert math.isnan(summary["per_class_iou"][2])
    assert summary["per_class_iou"][3] == 0.0
    assert summary["mIoU"] == pytest.approx(1 / 3)  # the absent class is skipped, the missed one is not
    assert summary["aAcc"] == pytest.approx(3 / 5)
    assert summary["mAcc"] == summary["mRecall"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert summary["mPrecision"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert summary["mDice"] == pytest.approx((4 / 6 + 2 / 3 + 0) / 3)
    assert summary["mF1"] == pytest.approx((2 / 3 + 2 / 3) / 2)  # a class without intersection has no F1


def test_no_pixels_give_nan_and_no_warning() -> None:
    matrix = ConfusionMatrix(3)
    matrix.update(torch.zeros(2, 2), torch.full((2, 2), 255))
    assert math.isnan(matrix.summary()["mIoU"])
    assert math.isnan(matrix.most_frequent_class_miou())


def test_most_frequent_class_equals_predicting_it() -> None:
    label = [0] * 5 + [2] * 7 + [3] * 1 + [255] * 4
    assert counted([1] * 17, label, 5).most_frequent_class_miou() == pytest.approx(
        counted([2] * 17, label, 5).summary()["mIoU"])


def test_merge_equals_counting_together() -> None:
    together, first, second = counted([0, 1, 1], [1, 1, 0], 2), counted([0], [1], 2), counted([1, 1], [1, 0], 2)
    first.merge(second)
    assert torch.equal(first.counts, together.counts)
    first.all_reduce()  # one process: nothing to add
    assert torch.equal(first.counts, together.counts)
    with pytest.raises(ValueError, match="3 classes into 2"):
        first.merge(ConfusionMatrix(3))


@pytest.mark.parametrize("value", [-1, 3])
def test_values_out_of_range_are_named(value: int) -> None:
    with pytest.raises(ValueError, match=rf"1 predictions .*0 to 2.*{value}"):
        counted([0, value], [0, 1], 3)
    with pytest.raises(ValueError, match=rf"1 labels .*0 to 2.*{value}"):
        counted([0, 1], [0, value], 3)
    assert counted([0, value], [0, 255], 3).counts.sum() == 1  # ignored pixels may hold anything


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        ConfusionMatrix(2).update(torch.zeros(4), torch.zeros(2, 2))


def some_maps(num_classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    pred = torch.randint(0, num_classes, (40, 50), generator=generator)
    label = torch.where(torch.rand(40, 50, generator=generator) < 0.7, pred, pred.roll(7))
    label[:, :5] = 255
    return pred, label


def test_confused_pairs_equal_a_count_pixel_by_pixel() -> None:
    pred, label = some_maps(6)
    matrix = ConfusionMatrix(6)
    matrix.update(pred, label)
    pairs = list(zip(label.flatten().tolist(), pred.flatten().tolist(), strict=True))
    labelled = Counter(truth for truth, _ in pairs)
    wrong = Counter((truth, prediction) for truth, prediction in pairs if truth not in (255, prediction))
    found = matrix.confused_pairs(limit=1000)
    assert {(pair.truth, pair.prediction): pair.pixels for pair in found} == wrong
    assert all(pair.share == pair.pixels / labelled[pair.truth] for pair in found)
    assert [pair.pixels for pair in found] == sorted(wrong.values(), reverse=True)
    assert [pair.pixels for pair in matrix.confused_pairs(limit=3)] == sorted(wrong.values(), reverse=True)[:3]


def test_many_classes_cost_no_square_and_have_the_same_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    square = ConfusionMatrix(6)
    monkeypatch.setattr(metrics, "PAIRS_UP_TO", 5)
    rows = ConfusionMatrix(6)
    for matrix in (square, rows):
        matrix.update(*some_maps(6))
        matrix.merge(matrix)
    assert rows.counts.shape == (3, 6) and rows.summary() == square.summary() and rows.confused_pairs() == []
    assert rows.most_frequent_class_miou() == square.most_frequent_class_miou()
    assert ConfusionMatrix(65535, ignore_index=65535).counts.numel() == 3 * 65535
