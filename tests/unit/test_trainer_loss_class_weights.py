"""Class weights: by hand from counts, against torch's cross-entropy, and through tiny runs."""

from __future__ import annotations

import json
import math
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss

from shards.errors import ConfigError
from shards.manifest import Manifest, load_manifest
from tests.support.training_run import TINY, assert_same_end
from trainer.build import resolve_class_weights
from trainer.config import load_run_config
from trainer.distributed import DistContext
from trainer.loop import train
from trainer.loss.class_weights import described, effective_number, inverse_log
from trainer.loss.criterion import MaskCriterion, PixelCriterion
from trainer.loss.mask_classification_loss import MaskClassificationLoss
from trainer.loss.pixel_loss import pixel_cross_entropy
from trainer.reporting.run_logger import read_metrics
from trainer.run.checkpoint import load_checkpoint
from trainer.run.reporter import start_logging
from trainer.run.run import Run
from trainer.train import _dry_run

ALONE = DistContext(rank=0, world_size=1, device=torch.device("cpu"))
CLASSES, INVERSE_LOG = 4, "loss.class_weights=inverse_log"


# -- numbers from counts --------------------------------------------------------------------------------------------


def test_inverse_log_by_hand() -> None:
    """Shares 1/2, 1/4, 1/4: 1/ln(1.52) = 2.38832, 1/ln(1.27) = 4.18379 twice; their mean is 3.58530."""
    assert inverse_log([2, 1, 0, 1]) == pytest.approx([0.66614, 1.16693, 1.0, 1.16693], abs=1e-5)


def test_effective_number_by_hand() -> None:
    """beta 0.5: n = 1 gives 0.5/0.5 = 1, n = 2 gives 0.5/0.75 = 2/3, n = 3 gives 0.5/0.875 = 4/7; mean 47/63."""
    assert effective_number([1, 2, 0, 3], 0.5) == pytest.approx([63 / 47, 42 / 47, 1.0, 36 / 47])


@settings(max_examples=50, deadline=None)
@given(counts=st.lists(st.integers(0, 10**12), min_size=1, max_size=9).filter(any),
       beta=st.sampled_from([0, 0.9, 0.9999]))
def test_the_rarer_a_class_the_higher_its_weight(counts: list[int], beta: float) -> None:
    for weights in (inverse_log(counts), effective_number(counts, beta)):
        present = [(count, weight) for count, weight in zip(counts, weights, strict=True) if count]
        assert math.fsum(weight for _, weight in present) == pytest.approx(len(present))
        assert all(weight == 1 for count, weight in zip(counts, weights, strict=True) if not count)
        by_count = [weight for _, weight in sorted(present, key=lambda pair: pair[0])]
        assert all(before >= after * (1 - 1e-12) for before, after in pairwise(by_count))


def test_beta_0_is_no_weighting_and_beta_near_1_the_inverse_frequency() -> None:
    assert effective_number([3, 500], 0.0) == [1.0, 1.0]
    rare, frequent = effective_number([3, 500], 0.999999999)
    assert rare / frequent == pytest.approx(500 / 3, rel=1e-5)


# -- settings and the manifest --------------------------------------------------------------------------------------


@pytest.fixture
def manifest(scene_shards: Path) -> Manifest:
    return load_manifest(scene_shards)


def resolved(manifest: Manifest, *overrides: str) -> list[float] | None:
    config = load_run_config(TINY, list(overrides))
    info = manifest.splits[config.data.train_split]
    return resolve_class_weights(config, manifest, lambda counts: getattr(info, f"class_{counts}"))


@pytest.mark.parametrize("kind", ["m2f", "linear", "eomt", "pmt"])
def test_weights_are_of_what_the_loss_counts(manifest: Manifest, kind: str) -> None:
    info, head = manifest.splits["train"], f"decoder_head.type={kind}"
    assert info.class_pixels != info.class_samples
    counts = info.class_pixels if kind == "linear" else info.class_samples
    assert resolved(manifest, head) is None
    assert resolved(manifest, head, "loss.class_weights=inverse_log") == inverse_log(counts)
    assert resolved(manifest, head, "loss.class_weights=effective_number", "loss.class_weights_beta=0.9") == \
        effective_number(info.class_samples, 0.9)
    own = list(map(float, range(manifest.num_classes)))
    assert resolved(manifest, head, f"loss.class_weights={own}") == own
    validation = resolved(manifest, head, "loss.class_weights=inverse_log", "data.train_split=val")
    assert validation != inverse_log(counts)


def test_a_list_of_another_length_is_an_error(manifest: Manifest) -> None:
    legal = f"loss.class_weights has 2 numbers, legal: {manifest.num_classes}, one for each class"
    with pytest.raises(ConfigError, match=legal):
        resolved(manifest, "loss.class_weights=[1, 2]")
    with pytest.raises(ValueError, match=r"class_weights has 2 numbers, legal: 4, one per label"):
        mask_loss(class_weights=[1.0, 2.0])


def test_the_range_is_described(manifest: Manifest) -> None:
    weights = [1.0] * manifest.num_classes
    weights[1], weights[2] = 0.25, 3.5
    names = [item.name for item in manifest.classes]
    assert described(weights, manifest) == f"0.25 (1 {names[1]}) to 3.5 (2 {names[2]})"


# -- pixels ---------------------------------------------------------------------------------------------------------


def pixels(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, CLASSES, 6, 5, generator=generator).requires_grad_()
    labels = torch.randint(0, CLASSES, (2, 6, 5), generator=generator)
    labels[0, :3] = 255
    return logits, labels, torch.tensor([0.5, 2.0, 0.0, 1.5])


def test_weighted_pixels_equal_torchs_sum_over_the_number_of_pixels() -> None:
    logits, labels, weights = pixels()
    ours = pixel_cross_entropy(logits, labels, 255, weights)
    expected = F.cross_entropy(logits, labels, weight=weights, ignore_index=255, reduction="sum") / labels.numel()
    torch.testing.assert_close(ours, expected)
    for gradient, reference in zip(*(torch.autograd.grad(loss, [logits]) for loss in (ours, expected)), strict=True):
        torch.testing.assert_close(gradient, reference)
    ones = pixel_cross_entropy(logits, labels, 255, torch.ones(CLASSES))
    assert torch.equal(ones, pixel_cross_entropy(logits, labels, 255))


def test_weighted_pixels_by_hand_and_torchs_mean_up_to_the_weights_of_the_batch() -> None:
    logits = torch.zeros(1, 2, 1, 4)  # every pixel costs ln 2
    labels = torch.tensor([[[0, 0, 1, 255]]])
    weights = torch.tensor([1.0, 3.0])
    loss = pixel_cross_entropy(logits, labels, 255, weights)
    assert loss.item() == pytest.approx((1 + 1 + 3) * math.log(2) / 4)
    torchs = F.cross_entropy(logits, labels, weight=weights, ignore_index=255)
    assert loss.item() == pytest.approx(torchs.item() * 5 / 4)


def test_weighted_pixels_do_not_depend_on_how_a_batch_is_split() -> None:
    logits, labels, weights = pixels()
    parts = [pixel_cross_entropy(logits[image, None], labels[image, None], 255, weights) for image in range(2)]
    torch.testing.assert_close(torch.stack(parts).mean(), pixel_cross_entropy(logits, labels, 255, weights))


def test_the_criterion_passes_its_weights_on() -> None:
    logits, labels, weights = pixels()
    targets = [{"segment_map": segments.to(torch.uint8), "labels": torch.arange(CLASSES)} for segments in labels]
    none = torch.ones(()), torch.Generator()
    loss = PixelCriterion(255, weights.tolist())({"logits": logits}, targets, *none)
    assert torch.equal(loss.total, pixel_cross_entropy(logits, labels, 255, weights))
    assert PixelCriterion(255)({"logits": logits}, targets, *none).total != loss.total


# -- queries --------------------------------------------------------------------------------------------------------


def mask_loss(**extra: Any) -> MaskClassificationLoss:
    return MaskClassificationLoss(16, 3.0, 0.75, 5.0, 5.0, 2.0, CLASSES, 0.1, **extra)


def queries(seed: int = 0) -> tuple[dict[str, Any], list[dict[str, torch.Tensor]]]:
    generator = torch.Generator().manual_seed(seed)
    items = [{"pred_logits": torch.randn(2, 6, CLASSES + 1, generator=generator).requires_grad_(),
              "pred_masks": torch.randn(2, 6, 8, 8, generator=generator)} for _ in range(2)]
    targets = [{"segment_map": torch.randint(0, 3, (16, 16), generator=generator).to(torch.uint8),
                "labels": torch.tensor(labels)} for labels in ([0, 1, 3], [1, 2, 3])]
    return {**items[0], "aux_outputs": items[1:]}, targets


def test_weighted_classes_equal_torchs_cross_entropy_of_the_same_matches() -> None:
    (outputs, targets), weights = queries(), [0.5, 2.0, 0.0, 1.5]
    weighted, plain = mask_loss(class_weights=weights), mask_loss()
    assert weighted.empty_weight.tolist() == pytest.approx([*weights, 0.1])
    seen: list[torch.Tensor] = []

    def remember(loss: MaskClassificationLoss) -> None:
        original = loss.matcher.match

        def match(*arguments: Any) -> torch.Tensor:
            seen.append(original(*arguments))
            return seen[-1]

        loss.matcher.match = match  # type: ignore[method-assign]

    remember(weighted)
    remember(plain)
    ours, theirs = (loss.step(outputs, targets, 6.0, torch.Generator().manual_seed(1)) for loss in (weighted, plain))
    assert torch.equal(*seen)  # weights do not change the matching
    for layer, (item, name) in enumerate(zip([outputs, *outputs["aux_outputs"]], ("", "_0"), strict=True)):
        images, of_queries, of_targets = seen[0][layer]
        classes = torch.full((2, 6), CLASSES)
        classes[images, of_queries] = torch.stack([target["labels"] for target in targets])[images, of_targets]
        expected = F.cross_entropy(item["pred_logits"].transpose(1, 2), classes, weighted.empty_weight)
        torch.testing.assert_close(ours.losses[f"loss_cross_entropy{name}"], expected.detach())
        assert ours.losses[f"loss_cross_entropy{name}"] != theirs.losses[f"loss_cross_entropy{name}"]
        for part in ("mask", "dice"):
            assert torch.equal(ours.losses[f"loss_{part}{name}"], theirs.losses[f"loss_{part}{name}"])


def test_weighted_classes_equal_transformers_loss_with_the_same_empty_weight() -> None:
    generator, loss = torch.Generator().manual_seed(0), mask_loss(class_weights=[0.5, 2.0, 0.25, 1.5])
    logits = torch.randn(2, 6, CLASSES + 1, generator=generator)
    labels = [torch.tensor([3, 0]), torch.tensor([2])]
    indices = [(torch.tensor([5, 1]), torch.tensor([0, 1])), (torch.tensor([2]), torch.tensor([0]))]
    theirs = Mask2FormerLoss.loss_labels(loss, logits, labels, indices)["loss_cross_entropy"]
    matches = torch.tensor([[[0, 0, 1], [5, 1, 2], [0, 1, 0]]])
    padded = torch.tensor([[3, 0], [2, 0]])
    ours = loss._class_losses([type("P", (), {"class_logits": logits})()], padded, matches)[0]
    torch.testing.assert_close(ours, theirs)


def test_a_batch_whose_classes_have_no_weight_has_no_class_loss() -> None:
    outputs, targets = queries()
    loss = MaskClassificationLoss(16, 3.0, 0.75, 5.0, 5.0, 2.0, CLASSES, 0.0, class_weights=[0.0, 0.0, 0.0, 0.0])
    step = loss.step(outputs, targets, 6.0, torch.Generator().manual_seed(1))
    assert step.losses["loss_cross_entropy"] == 0 and torch.isfinite(step.total)


# -- runs -----------------------------------------------------------------------------------------------------------


def trained_run(root: Path, folder: Path, *overrides: str) -> Run:
    places = [f"data.root={root}", f"output_dir={folder}", "eval.max_images=1", "eval.panels=0", *overrides]
    return train(load_run_config(TINY, places), ALONE)


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("draw_curves", "write_report"):
        monkeypatch.setattr(f"trainer.run.reporter.{name}", lambda *_: None)


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("kind", ["m2f", "linear"])
def test_a_run_says_and_keeps_its_weights(scene_shards: Path, tmp_path: Path, kind: str, manifest: Manifest,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    info = manifest.splits["train"]
    expected = inverse_log(info.class_pixels if kind == "linear" else info.class_samples)
    trained = trained_run(scene_shards, run, f"decoder_head.type={kind}", INVERSE_LOG, "train.total_steps=1")
    saved = json.loads((run / "class-weights.json").read_text())
    assert saved == dict(zip([item.name for item in manifest.classes], expected, strict=True))
    line = f"class weights from {described(expected, manifest)}, all in class-weights.json"
    assert line in capsys.readouterr().out
    assert line in [record.get("what") for record in read_metrics(run)]
    loss = trained.criterion
    used = loss.loss.empty_weight[:-1] if isinstance(loss, MaskCriterion) else loss.class_weights
    assert used.tolist() == pytest.approx(expected)
    trained.class_weights = None  # as when the run is continued without the setting
    start_logging(trained).close()
    assert not (run / "class-weights.json").exists()


@pytest.mark.usefixtures("no_pictures")
def test_a_continued_run_keeps_its_weights(scene_shards: Path, tmp_path: Path) -> None:
    common = ("decoder_head.type=linear", "train.checkpoint_every=1", "train.total_steps=2")
    one, whole = tmp_path / "one", tmp_path / "whole"
    trained_run(scene_shards, whole, *common, INVERSE_LOG)
    shutil.copytree(whole, one)
    for path in (one / "checkpoints").glob("*.pt"):  # as if killed after step 1
        if load_checkpoint(path).step == 2:
            path.unlink()
    (one / "class-weights.json").unlink()
    trained_run(scene_shards, one, *common, INVERSE_LOG)
    assert_same_end(one, whole)
    assert (one / "class-weights.json").read_bytes() == (whole / "class-weights.json").read_bytes()


def test_a_dry_run_names_weights_and_refuses_wrong_ones(scene_shards: Path, tmp_path: Path, manifest: Manifest,
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    places = [f"data.root={scene_shards}", f"output_dir={tmp_path}", "decoder_head.type=linear"]
    _dry_run(load_run_config(TINY, [*places, "loss.class_weights=effective_number"]))
    assert "class weights from" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"loss.class_weights has 1 numbers"):
        _dry_run(load_run_config(TINY, [*places, "loss.class_weights=[1]"]))
