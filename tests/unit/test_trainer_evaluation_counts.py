"""Counts of an evaluation and the metrics made of them, against scikit-learn, torchmetrics and scipy."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, jaccard_score
from torch import Tensor
from torchmetrics.classification import MulticlassCalibrationError, MulticlassJaccardIndex

from shards.files.strict_json import to_json
from trainer.evaluation.bootstrap import bootstrap
from trainer.evaluation.boundary import boundary_pixels, boundary_width
from trainer.evaluation.counts import Counts
from trainer.evaluation.journal import CountedImage, Journal

CLASSES = 5


def picture(seed: int, size: tuple[int, int] = (40, 60), classes: int = CLASSES) -> tuple[Tensor, Tensor, Tensor]:
    """(labels with ignored pixels, predictions, confidences): blocks, partly wrong."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, classes, (size[0] // 8 + 1, size[1] // 8 + 1)).repeat(8, 0).repeat(8, 1)
    label = blocks[: size[0], : size[1]].copy()
    pred = np.roll(label, rng.integers(0, 3, 2), (0, 1))
    pred[rng.random(size) < 0.05] = 0
    label[rng.random(size) < 0.1] = 255
    return torch.from_numpy(label), torch.from_numpy(pred), torch.from_numpy(rng.random(size).astype(np.float32))


def counted(*images: tuple[Tensor, Tensor, Tensor], classes: int = CLASSES) -> Counts:
    total = Counts(classes, 255)
    for label, pred, confidence in images:
        image = Counts(classes, 255)
        image.add_image(label, pred, confidence)
        total.merge(image)
    return total


def flat(images: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Any, Any, Tensor]:
    label, pred, confidence = (torch.cat([parts[place].flatten() for parts in images]) for place in range(3))
    kept = label != 255
    return label[kept].numpy(), pred[kept].numpy(), confidence[kept]


def test_metrics_are_those_of_scikit_learn_and_torchmetrics() -> None:
    images = [picture(seed, size) for seed, size in enumerate(((40, 60), (33, 20), (64, 64)))]
    label, pred, confidence = flat(images)
    summary = counted(*images).summary()
    iou = jaccard_score(label, pred, average=None)
    assert summary["per_class_iou"] == pytest.approx(iou.tolist())
    assert summary["mIoU"] == pytest.approx(iou.mean())
    assert summary["aAcc"] == pytest.approx(accuracy_score(label, pred))
    assert summary["mAcc"] == pytest.approx(balanced_accuracy_score(label, pred))
    assert summary["mDice"] == pytest.approx(f1_score(label, pred, average="macro"))
    assert summary["fwIoU"] == pytest.approx(jaccard_score(label, pred, average="weighted"))
    theirs = MulticlassJaccardIndex(CLASSES, average="macro")(torch.tensor(pred), torch.tensor(label))
    assert summary["mIoU"] == pytest.approx(float(theirs), rel=1e-6)
    # torchmetrics takes probabilities of all classes: the confidence in the prediction, and the rest elsewhere.
    sure = confidence.clamp(min=0.6)
    images = [(a, b, c.clamp(min=0.6)) for a, b, c in images]
    probabilities = torch.zeros(len(pred), CLASSES).scatter_(1, torch.tensor(pred)[:, None], sure[:, None])
    probabilities[torch.arange(len(pred)), (torch.tensor(pred) + 1) % CLASSES] = 1 - sure
    expected = MulticlassCalibrationError(CLASSES, n_bins=15, norm="l1")(probabilities, torch.tensor(label))
    assert counted(*images).summary()["ECE"] == pytest.approx(float(expected), abs=2e-5)


def test_a_class_that_is_nowhere_is_skipped() -> None:
    label, pred, confidence = picture(1, classes=3)
    summary = counted((label, pred, confidence)).summary()
    assert math.isnan(summary["per_class_iou"][4]) and math.isnan(summary["per_class_boundary_iou"][4])
    assert summary["mIoU"] == pytest.approx(np.mean(summary["per_class_iou"][:3]))
    assert summary["mBoundaryIoU"] == pytest.approx(np.mean(summary["per_class_boundary_iou"][:3]))


def test_sums_do_not_depend_on_order_and_confidence_may_be_left_out() -> None:
    images = [picture(seed) for seed in range(4)]
    assert torch.equal(counted(*images).data, counted(*images[::-1]).data)
    without = Counts(CLASSES, 255)
    without.add_image(*images[0][:2])
    assert math.isnan(without.summary()["ECE"]) and without.summary()["images"] == 1
    assert without.summary()["mIoU"] == counted(images[0]).summary()["mIoU"]


def eroded_boundary(ids: np.ndarray, distance: int) -> np.ndarray:
    """The paper's definition: a class's mask minus its erosion by 3x3, `distance` times; outside is background."""
    near = np.zeros(ids.shape, bool)
    for value in np.unique(ids):
        mask = ids == value
        near |= mask & ~ndimage.binary_erosion(mask, np.ones((3, 3)), iterations=distance, border_value=0)
    return near


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_pixels_near_a_boundary_are_those_that_erosion_removes(height: int, width: int, distance: int,
                                                               seed: int) -> None:
    rng = np.random.default_rng(seed)
    ids = np.zeros((height, width), np.int64)
    for _ in range(rng.integers(0, 4)):
        top, left = rng.integers(0, height), rng.integers(0, width)
        ids[top : top + rng.integers(1, 20), left : left + rng.integers(1, 20)] = rng.integers(0, 4)
    assert np.array_equal(boundary_pixels(torch.from_numpy(ids), distance).numpy(), eroded_boundary(ids, distance))


def test_boundary_iou_by_the_papers_definition() -> None:
    label, pred, confidence = picture(3, (120, 160))
    summary, distance = counted((label, pred, confidence)).summary(), boundary_width(120, 160)
    assert distance == 4
    label, pred = label.numpy(), np.where(label.numpy() == 255, 255, pred.numpy())
    near_label, near_pred = eroded_boundary(label, distance), eroded_boundary(pred, distance)
    for value in range(CLASSES):
        ours, theirs = (label == value) & near_label, (pred == value) & near_pred
        expected = (ours & theirs).sum() / (ours | theirs).sum()
        assert summary["per_class_boundary_iou"][value] == pytest.approx(expected)


def test_boundaries_are_harder_than_regions() -> None:
    """A shifted square: what IoU hardly sees."""
    label = torch.zeros(200, 200, dtype=torch.int64)
    label[50:150, 50:150] = 1
    summary = counted((label, label.roll(5, 0), torch.ones(200, 200)), classes=2).summary()
    assert summary["mIoU"] > 0.9 > 0.6 > summary["per_class_boundary_iou"][1]


# -- intervals ------------------------------------------------------------------------------------------------


def test_intervals_contain_the_value_and_shrink_with_more_images() -> None:
    rng = np.random.default_rng(0)

    def areas(images: int) -> np.ndarray:
        label = rng.integers(50, 150, (images, 3))
        intersect = (label * rng.uniform(0.3, 0.9, (images, 3))).astype(np.int64)
        return np.stack((intersect, label, label), 1)

    few, many = areas(20), areas(2000)
    widths = []
    for counts in (few, many):
        low, high = bootstrap(counts).miou
        intersect, pred, label = counts.sum(0)
        assert low < np.mean(intersect / (pred + label - intersect)) < high
        widths.append(high - low)
    assert 5 < widths[0] / widths[1] < 20  # by about sqrt(100)
    assert bootstrap(few) .miou == bootstrap(few).miou != bootstrap(few, seed=1).miou


def test_intervals_have_the_coverage_that_they_claim() -> None:
    """Of 200 samples of 60 images, the 95 % interval contains the value of the population in most."""
    rng = np.random.default_rng(1)
    label = np.full((60_000, 1), 1000)
    intersect = (label * rng.beta(4, 3, label.shape)).astype(np.int64)
    population = np.stack((intersect, label, label), 1)
    sums = population.sum(0)[:, 0]
    true = sums[0] / (sums[1] + sums[2] - sums[0])
    hits = 0
    for _ in range(200):
        low, high = bootstrap(population[rng.integers(0, len(population), 60)], replicates=300).miou
        hits += low <= true <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_intervals_of_absent_classes_and_of_nothing() -> None:
    areas = np.array([[[5, 0], [5, 0], [10, 0]]] * 3)
    found = bootstrap(areas)
    assert found.miou == (0.5, 0.5) and np.isnan(found.iou[1]).all()
    assert bootstrap(areas, absent_as_zero=True).miou == (0.25, 0.25)
    assert math.isnan(bootstrap(np.zeros((0, 3, 2), np.int64)).miou[0])


# -- the journal ----------------------------------------------------------------------------------------------


def test_a_journal_gives_back_what_was_counted(tmp_path: Path) -> None:
    images = [CountedImage(number, f"key/{number}", counted(picture(number))) for number in range(4)]
    for rank, group in ((0, images[:2]), (1, images[2:])):
        Journal(tmp_path, "a" * 64).add(rank, group[0].number, group)
    found = Journal(tmp_path, "a" * 64).read(Counts(CLASSES, 255))
    assert sorted(found) == [0, 2] and [len(found[first]) for first in (0, 2)] == [2, 2]
    for original, restored in zip(images, [*found[0], *found[2]], strict=True):
        assert restored[:2] == original[:2] and torch.equal(restored.counts.data, original.counts.data)
    assert not Journal(tmp_path, "b" * 64).read(Counts(CLASSES, 255)), "of another evaluation"
    Journal(tmp_path, "a" * 64).remove()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["cut", "zeros", "other", "negative place", "negative count", "no images", "gap"])
def test_a_damaged_line_is_a_missing_group(tmp_path: Path, damage: str) -> None:
    journal = Journal(tmp_path, "a" * 64)
    for number in range(3):
        journal.add(0, number, [CountedImage(number, "key", counted(picture(number)))])
    (path,) = journal.folder.iterdir()
    lines = path.read_bytes().splitlines(keepends=True)
    record = json.loads(lines[2])
    (image,) = record["images"]
    changed = {"negative place": [{**image, "places": [-1, *image["places"][1:]]}], "no images": [],
               "negative count": [{**image, "counts": [-1, *image["counts"][1:]]}], "gap": [{**image, "number": 3}]}
    lines[2] = {"cut": lines[2][:-40], "zeros": b"\0" * 100, "other": b'{"first": 2, "images": [{"number": 2}]}\n',
                **{name: to_json({**record, "images": images}).encode() for name, images in changed.items()}}[damage]
    path.write_bytes(b"".join(lines))
    assert sorted(journal.read(Counts(CLASSES, 255))) == [0, 1]


def test_a_full_disk_names_the_journal(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "a" * 64)
    journal.folder.mkdir(parents=True)
    (journal.folder / f"rank-0-{journal._name}.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '\S+/unfinished/\S+/rank-0-"):
        journal.add(0, 0, [CountedImage(0, "key", counted(picture(0)))])
