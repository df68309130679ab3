"""Targets, points, matcher and losses, against transformers' Mask2FormerLoss and against slow formulas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from tests.support.replay import ReplayedLoss, in_drawing_order, replay
from tests.support.zygote import call_on_ranks
from trainer.data.targets import dense_masks, ignore_value, label_map_from_segments, segment_map_from_masks, to_dense
from trainer.evaluation.metrics import ConfusionMatrix
from trainer.loss.mask_classification_loss import MaskClassificationLoss
from trainer.loss.matcher import (
    HungarianMatcher,
    NonFiniteLossError,
    Prediction,
    pairwise_dice_cost,
    pairwise_mask_cost,
    rows_of_points,
    sum_over_points_,
)
from trainer.loss.packed_targets import pack_targets
from trainer.loss.pixel_loss import pixel_cross_entropy
from trainer.loss.point_losses import SampledPoints, point_losses
from trainer.loss.point_sampling import point_sample, sample_uncertain_points, uniform_draw

NUM_LABELS = 5
CPU = torch.device("cpu")


def make_loss(kind: type[MaskClassificationLoss] = MaskClassificationLoss, num_points: int = 40,
              **changed: Any) -> Any:
    settings: dict[str, Any] = {
        "num_points": num_points, "oversample_ratio": 3.0, "importance_sample_ratio": 0.75, "mask_coefficient": 5.0,
        "dice_coefficient": 5.0, "class_coefficient": 2.0, "num_labels": NUM_LABELS, "no_object_coefficient": 0.1,
    }
    return kind(**(settings | changed))


def random_target(counts: int, generator: torch.Generator, size: tuple[int, int] = (24, 32)) -> dict[str, Tensor]:
    """A segment map of `counts` segments, with some ignored pixels."""
    segment_map = torch.randint(0, counts + 1, size, generator=generator).to(torch.uint8)
    segment_map[segment_map == counts] = 255
    return {"segment_map": segment_map, "labels": torch.randint(0, NUM_LABELS, (counts,), generator=generator)}


def random_outputs(generator: torch.Generator, batch: int, queries: int = 7, aux: int = 2) -> dict[str, Any]:
    def prediction() -> dict[str, Any]:
        return {"pred_logits": torch.randn(batch, queries, NUM_LABELS + 1, generator=generator).requires_grad_(),
                "pred_masks": (3 * torch.randn(batch, queries, 6, 8, generator=generator)).requires_grad_()}

    return prediction() | {"aux_outputs": [prediction() for _ in range(aux)]}


def make_case(counts: Sequence[int], seed: int = 0, **kwargs: int) -> tuple[dict[str, Any], list[dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(seed)
    outputs = random_outputs(generator, len(counts), **kwargs)
    return outputs, [to_dense(random_target(count, generator)) for count in counts]


def leaves(outputs: dict[str, Any]) -> list[Tensor]:
    return [item[key] for item in (outputs, *outputs["aux_outputs"]) for key in ("pred_logits", "pred_masks")]


# Targets


def test_segment_maps_and_masks_are_inverse() -> None:
    target = random_target(4, torch.Generator().manual_seed(0))
    masks = dense_masks(target["segment_map"], 4)
    assert masks.dtype == torch.bool
    assert masks.shape == (4, 24, 32)
    assert torch.equal(masks.any(0), target["segment_map"] != 255)
    assert torch.equal(segment_map_from_masks(masks), target["segment_map"])
    assert dense_masks(target["segment_map"], 0).shape == (0, 24, 32)
    assert torch.equal(segment_map_from_masks(masks[:0]), torch.full((24, 32), 255, dtype=torch.uint8))


def test_more_than_255_segments_need_int32() -> None:
    masks = F.one_hot(torch.arange(400).view(20, 20)).permute(2, 0, 1)[:300]
    segment_map = segment_map_from_masks(masks)
    assert segment_map.dtype == torch.int32
    assert int(segment_map[-1, -1]) == ignore_value(torch.int32) == 65535
    assert torch.equal(dense_masks(segment_map, 300), masks.bool())
    with pytest.raises(ValueError, match="300, legal"):
        dense_masks(segment_map.to(torch.uint8), 300)
    with pytest.raises(ValueError, match="uint8 or int32"):
        ignore_value(torch.int64)


def test_overlapping_masks_have_no_segment_map() -> None:
    with pytest.raises(ValueError, match="4 pixels"):
        segment_map_from_masks(torch.ones(2, 2, 2))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_label_map_looks_labels_up(dtype: torch.dtype) -> None:
    segment_map = torch.tensor([[0, 1], [ignore_value(dtype), 1]], dtype=dtype)
    label_map = label_map_from_segments(segment_map, torch.tensor([149, 3]), ignore_index=255)
    assert label_map.tolist() == [[149, 3], [255, 3]]
    assert label_map.dtype == torch.int64


def test_targets_of_wrong_form_are_refused() -> None:
    with pytest.raises(ValueError, match="needs masks or segment_map"):
        to_dense({"labels": torch.zeros(1)})
    with pytest.raises(ValueError, match="N = 2 labels"):
        to_dense({"masks": torch.zeros(3, 4, 4), "labels": torch.zeros(2)})
    with pytest.raises(ValueError, match="a batch has no targets"):
        pack_targets([], CPU)


# Points


def test_point_sample_is_bilinear_between_pixel_centres_and_zero_outside() -> None:
    maps = torch.tensor([[[[1.0, 3.0], [5.0, 7.0]]]])
    points = torch.tensor([[[0.25, 0.25], [0.5, 0.5], [0.75, 0.5], [0.0, 0.25]]])  # (x, y)
    assert point_sample(maps, points)[0, 0].tolist() == [1.0, 4.0, 5.0, 0.5]
    assert point_sample(maps.bool(), points).dtype == torch.float32


def test_uncertain_points_are_the_least_certain_candidates() -> None:
    ramp = torch.linspace(-8, 8, 64).expand(2, 64, 64).contiguous()  # zero in the middle column
    draw = uniform_draw(CPU, torch.Generator().manual_seed(0))
    points, logits = sample_uncertain_points(ramp, 100, 3.0, 0.75, draw)
    assert points.shape == (2, 100, 2)
    torch.testing.assert_close(logits, point_sample(ramp[:, None], points)[:, 0])
    from_middle = (points[..., 0] - 0.5).abs()
    assert from_middle[:, :75].max() < 0.2  # a quarter of 300 candidates lies within 0.125
    assert from_middle[:, 75:].max() > 0.3  # the uniform rest does not


@pytest.mark.parametrize(("ratio", "draws"), [(0.0, 2), (0.75, 2), (1.0, 1)])
def test_uniform_points_are_drawn_only_when_some_are_wanted(ratio: float, draws: int) -> None:
    shapes: list[tuple[int, ...]] = []

    def draw(shape: tuple[int, ...]) -> Tensor:
        shapes.append(shape)
        return torch.rand(shape)

    points, _ = sample_uncertain_points(torch.randn(3, 8, 8), 10, 3.0, ratio, draw)
    assert points.shape == (3, 10, 2)
    assert len(shapes) == draws


# Matcher


def test_pairwise_costs_equal_the_losses_of_every_pair() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 10 * torch.randn(2, 3, 50, generator=generator)
    truth = torch.rand(2, 4, 50, generator=generator)
    pairs = [(b, q, n) for b in range(2) for q in range(3) for n in range(4)]
    x = torch.stack([logits[b, q] for b, q, _ in pairs])
    y = torch.stack([truth[b, n] for b, _, n in pairs])
    for counted in (None, (torch.rand(2, 50, generator=generator) > 0.3).float()):
        weights = None if counted is None else torch.stack([counted[b] for b, _, _ in pairs])
        mask, dice = point_losses(SampledPoints(torch.empty(0), x, y, weights))
        sums = sum_over_points_(logits.clone(), rows_of_points(truth, counted), torch.empty_like(logits).mT)
        torch.testing.assert_close(pairwise_mask_cost(sums).flatten(), mask, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(pairwise_dice_cost(sums).flatten(), dice, rtol=1e-5, atol=1e-5)


def test_a_batch_is_matched_like_its_images_alone() -> None:
    outputs, targets = make_case([3, 1, 5])
    matcher = HungarianMatcher(30, 5.0, 5.0, 2.0)
    predictions = [Prediction(item["pred_logits"], item["pred_masks"]) for item in (outputs, *outputs["aux_outputs"])]
    points = torch.rand(3, 3, 30, 2, generator=torch.Generator().manual_seed(1))  # [L, B, P, 2]

    together = matcher.match(predictions, pack_targets(targets, CPU), replay(points))
    assert together.shape == (3, 3, 9)
    for image in range(3):
        alone = matcher.match([Prediction(c[image:image + 1], m[image:image + 1]) for c, m in predictions],
                              pack_targets(targets[image:image + 1], CPU), replay(points[:, image:image + 1]))
        part = together[:, 1:, together[0, 0] == image]
        assert torch.equal(part, alone[:, 1:])


def test_matching_is_the_cheapest_assignment_and_ordered_by_query() -> None:
    outputs, targets = make_case([4])
    matcher = HungarianMatcher(30, 5.0, 5.0, 2.0)
    prediction, packed = Prediction(outputs["pred_logits"], outputs["pred_masks"]), pack_targets(targets, CPU)
    points = torch.rand(1, 30, 2)
    rows, columns = linear_sum_assignment(matcher.costs([prediction], packed, points[None])[0, 0].detach())
    images, queries, chosen = matcher.match([prediction], packed, lambda shape: points)[0].tolist()
    assert images == [0] * 4
    assert queries == rows.tolist() == sorted(queries)
    assert chosen == columns.tolist()


# The loss


def test_hugging_face_loss_is_equal_with_the_same_points(monkeypatch: pytest.MonkeyPatch, loss_path: str) -> None:
    from transformers import Mask2FormerConfig
    from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss

    recorded: list[Tensor] = []
    original = torch.rand

    def recording(*args: Any, **kwargs: Any) -> Tensor:
        recorded.append(original(*args, **kwargs))
        return recorded[-1]

    config = Mask2FormerConfig(num_labels=NUM_LABELS, train_num_points=40)
    for seed, counts in enumerate([[3, 2], [1], [0, 4], [9, 2], [0, 0]]):
        outputs, targets = make_case(counts, seed)
        predictions = [outputs, *outputs["aux_outputs"]]
        theirs_in = [{"masks_queries_logits": p["pred_masks"], "class_queries_logits": p["pred_logits"]}
                     for p in predictions]
        recorded.clear()
        with monkeypatch.context() as patched:
            patched.setattr(torch, "rand", recording)
            theirs = Mask2FormerLoss(config, {})(
                **theirs_in[0], mask_labels=[t["masks"].float() for t in targets],
                class_labels=[t["labels"] for t in targets], auxiliary_predictions=theirs_in[1:])
        # They draw prediction by prediction; we draw all matcher points first.
        per_prediction = len(counts) + 2
        rounds = [recorded[i:i + per_prediction] for i in range(0, len(recorded), per_prediction)]
        assert len(rounds) == len(predictions)
        loss = make_loss(ReplayedLoss, num_masks_counts="all")
        loss.recorded = in_drawing_order([p for r in rounds for p in r[:-2]], [r[-2] for r in rounds],
                                         [r[-1] for r in rounds])
        total, ours, *_ = loss.step(outputs, targets)
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert value.shape == ()
            torch.testing.assert_close(value, theirs[name].reshape(()), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(total, loss.loss_total(ours, lambda name, value, **options: None))
        weights = {"mask": 5.0, "dice": 5.0, "cross": 2.0}
        their_total = sum(weights[name.split("_")[1]] * value.sum() for name, value in theirs.items())
        our_grads = torch.autograd.grad(total, leaves(outputs))
        their_grads = torch.autograd.grad(their_total, leaves(outputs))
        for our_grad, their_grad in zip(our_grads, their_grads, strict=True):
            torch.testing.assert_close(our_grad, their_grad, rtol=1e-3, atol=1e-6)


def test_one_prediction_draws_in_the_reference_order_from_the_global_generator() -> None:
    outputs, targets = make_case([3, 2], aux=0)
    torch.manual_seed(7)
    plain = make_loss()(outputs["pred_masks"], targets, outputs["pred_logits"])
    torch.manual_seed(7)
    replayed = make_loss(ReplayedLoss)
    replayed.recorded = [torch.rand(shape) for shape in ((1, 40, 2), (1, 40, 2), (5, 120, 2), (5, 10, 2))]
    again = replayed(outputs["pred_masks"], targets, outputs["pred_logits"])
    assert list(plain) == ["loss_mask", "loss_dice", "loss_cross_entropy"]
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_dense_targets_of_any_dtype_equal_segment_maps() -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = random_outputs(generator, 2)
    maps = [random_target(count, generator) for count in (4, 2)]
    forms = [maps] + [[{"masks": to_dense(t)["masks"].to(dtype), "labels": t["labels"]} for t in maps]
                      for dtype in (torch.bool, torch.uint8, torch.float32)]
    forms.append([{"segment_map": torch.where(t["segment_map"] == 255, 65535, t["segment_map"].int()),
                   "labels": t["labels"]} for t in maps])
    losses = [make_loss().step(outputs, form, generator=torch.Generator().manual_seed(1)).losses for form in forms]
    for other in losses[1:]:
        assert all(torch.equal(losses[0][name], value) for name, value in other.items())


def test_more_targets_than_queries_drop_the_surplus() -> None:
    outputs, targets = make_case([9, 2], queries=4)
    matcher = HungarianMatcher(30, 5.0, 5.0, 2.0)
    matches = matcher.match([Prediction(outputs["pred_logits"], outputs["pred_masks"])],
                            pack_targets(targets, CPU), uniform_draw(CPU, None))
    assert matches[0, 0].bincount().tolist() == [4, 2]
    loss = make_loss().step(outputs, targets)
    assert loss.unmatched == 5 and all(value.isfinite() for value in loss.losses.values())


@pytest.mark.parametrize("counts", [[0, 0], [0, 3]])
def test_empty_targets_give_finite_gradients_everywhere(counts: list[int]) -> None:
    outputs, targets = make_case(counts)
    loss = make_loss()
    total, losses, *_ = loss.step(outputs, targets)
    if not sum(counts):
        assert all(float(value.detach()) == 0 for name, value in losses.items() if "cross" not in name)
    total.backward()
    for leaf in leaves(outputs):
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("counts", [[3, 2], [2, 0], [0, 0]])
def test_non_finite_masks_name_layer_and_image(bad: float, counts: list[int]) -> None:
    outputs, targets = make_case(counts)
    with torch.no_grad():
        outputs["aux_outputs"][1]["pred_masks"][1, 4] = bad
    with pytest.raises(NonFiniteLossError, match=r"aux_outputs\[1\].* image 1 "):
        make_loss().step(outputs, targets)


def test_non_finite_classes_name_the_final_prediction() -> None:
    outputs, targets = make_case([3, 2])
    with torch.no_grad():
        outputs["pred_logits"][0, 2, 1] = torch.nan
    with pytest.raises(NonFiniteLossError, match=r"the final prediction .* image 0 "):
        make_loss().step(outputs, targets)


@pytest.mark.parametrize("label", [-1, NUM_LABELS, 255])
def test_a_label_out_of_range_is_named(label: int) -> None:
    outputs, targets = make_case([3, 2])
    targets[1]["labels"][1] = label
    with pytest.raises(ValueError, match=rf"image 1 .*{label}.*legal: 0 to {NUM_LABELS - 1}"):
        make_loss().step(outputs, targets)


def test_shapes_that_do_not_fit_are_refused() -> None:
    outputs, targets = make_case([3, 2])
    with pytest.raises(ValueError, match="6 classes"):
        make_loss(num_labels=9).step(outputs, targets)
    with pytest.raises(ValueError, match="1 targets"):
        make_loss().step(outputs, targets[:1])


def test_half_precision_under_autocast_is_computed_in_float32() -> None:
    outputs, targets = make_case([3, 2])
    halved = {key: outputs[key].detach().bfloat16() for key in ("pred_logits", "pred_masks")}
    exact = {key: value.float() for key, value in halved.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = make_loss().step(halved, targets, generator=torch.Generator().manual_seed(0)).losses
    high = make_loss().step(exact, targets, generator=torch.Generator().manual_seed(0)).losses
    for name, value in low.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, high[name])


def test_num_masks_divides_mask_and_dice_only() -> None:
    outputs, targets = make_case([3, 2])

    def run(num_masks: Tensor | float | None) -> dict[str, Tensor]:
        return make_loss().step(outputs, targets, num_masks, torch.Generator().manual_seed(0)).losses

    default, doubled = run(None), run(torch.tensor(10.0))
    for name, value in default.items():
        factor = 1.0 if "cross" in name else 2.0
        torch.testing.assert_close(factor * doubled[name], value)
    assert float(make_loss().count_masks([], 7)) == 1.0


def test_a_perfect_prediction_costs_next_to_nothing() -> None:
    target = to_dense({"segment_map": (torch.arange(32)[None] // 16).repeat(24, 1).to(torch.uint8),
                       "labels": torch.tensor([1, 3])})
    classes = F.one_hot(torch.tensor([[3, NUM_LABELS, 1]]), NUM_LABELS + 1) * 40.0 - 20.0
    masks = torch.stack([target["masks"][1], torch.zeros(24, 32), target["masks"][0]])[None].float() * 20.0 - 10.0

    def run(classes: Tensor) -> dict[str, Tensor]:
        return make_loss(num_points=400, importance_sample_ratio=0.0).step(
            {"pred_logits": classes, "pred_masks": masks}, [target], generator=torch.Generator().manual_seed(0)).losses

    assert all(float(value) < 0.2 for value in run(classes).values())  # points near the border cost a little
    assert float(run(classes.roll(1, dims=1))["loss_cross_entropy"]) > 1.0  # control: the wrong classes do not


# Pixels, and ranks


def test_pixel_loss_counts_ignored_pixels_in_the_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 3, 4, 4, generator=generator).requires_grad_()
    labels = torch.randint(0, 3, (1, 4, 4), generator=generator)
    half = labels.clone()
    half[:, :2] = 255
    expected = F.cross_entropy(logits[:, :, 2:], labels[:, 2:]) / 2
    torch.testing.assert_close(pixel_cross_entropy(logits, half), expected)
    (empty,) = torch.autograd.grad(pixel_cross_entropy(logits, torch.full_like(labels, 255)), [logits])
    assert empty.eq(0).all()
    assert pixel_cross_entropy(logits.bfloat16(), labels).dtype == torch.float32


def _on_rank(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    targets = [{"labels": torch.zeros(count)} for count in ((3, 2), (4, 0))[rank]]
    assert float(make_loss().count_masks(targets, 7)) == 4.5
    assert float(make_loss().count_masks(targets, 3)) == 4.0, "(3 + 2) and (3 + 0) find a query"
    assert float(make_loss(num_masks_counts="all").count_masks(targets, 3)) == 4.5
    assert float(make_loss().count_masks([], 7)) == 1.0
    matrix = ConfusionMatrix(2)
    matrix.update(torch.tensor([rank]), torch.tensor([0]))
    matrix.all_reduce()
    assert matrix.counts.tolist() == [[1, 1], [0, 0]]
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_share_mask_count_and_confusion_matrix(tmp_path: Any) -> None:
    call_on_ranks(_on_rank, str(tmp_path / "store"))
