"""The loss of a whole step: the reference's numbers, with one device wait, few operations and little memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import Mask2FormerForUniversalSegmentation, Mask2FormerLoss

from tests.support.mutations import mutate
from tests.support.replay import ReplayedLoss, in_drawing_order
from tests.support.zygote import call_on_ranks
from tests.unit.test_trainer_models_precision import WAITING, images, model_of
from trainer.data.targets import to_dense
from trainer.loss import cpu_kernels, mask_gradients, point_losses, point_sampling
from trainer.loss.mask_classification_loss import MaskClassificationLoss, StepLoss
from trainer.loss.matcher import HungarianMatcher, Prediction
from trainer.loss.packed_targets import pack_targets
from trainer.loss.point_losses import SampledPoints, losses_and_gradients

CLASSES = 6
SETTINGS: dict[str, Any] = {
    "num_points": 48, "oversample_ratio": 3.0, "importance_sample_ratio": 0.75, "mask_coefficient": 5.0,
    "dice_coefficient": 4.0, "class_coefficient": 2.0, "num_labels": CLASSES, "no_object_coefficient": 0.1,
}
CPU = torch.device("cpu")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def targets_of(counts: Sequence[int], size: tuple[int, int], seed: int = 0) -> list[dict[str, Tensor]]:
    """Segment maps with `counts` segments and a fifth of the pixels ignored."""
    generator = seeded(seed)
    found = []
    for count in counts:
        segments = torch.randint(0, max(count, 1), size, generator=generator)
        blank = torch.rand(size, generator=generator) < (0.2 if count else 1.1)
        found.append({"segment_map": torch.where(blank, 255, segments).to(torch.uint8),
                      "labels": torch.randint(0, CLASSES, (count,), generator=generator)})
    return found


def outputs_of(batch: int, queries: int, size: tuple[int, int], layers: int = 3, seed: int = 0,
               factors: int = 0) -> dict[str, Any]:
    """Random predictions; with `factors`, masks are products of embeddings and features of that width."""
    generator = seeded(seed)
    features = torch.randn(batch, factors, *size, generator=generator).requires_grad_() if factors else None
    items = []
    for _ in range(layers):
        item = {"pred_logits": torch.randn(batch, queries, CLASSES + 1, generator=generator).requires_grad_()}
        if features is None:
            item["pred_masks"] = (3 * torch.randn(batch, queries, *size, generator=generator)).requires_grad_()
        else:
            item["mask_embeddings"] = torch.randn(batch, queries, factors, generator=generator).requires_grad_()
            item["mask_features"] = features
        items.append(item)
    return {**items[0], "aux_outputs": items[1:]}


def items_of(outputs: dict[str, Any]) -> list[dict[str, Tensor]]:
    return [outputs, *outputs["aux_outputs"]]


# -- the reference's numbers ----------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(counts=st.lists(st.integers(0, 9), min_size=1, max_size=3), queries=st.integers(1, 8),
       height=st.integers(2, 9), width=st.integers(2, 9), scale=st.integers(1, 4), seed=st.integers(0, 999))
def test_a_step_equals_transformers_loss(
    counts: list[int], queries: int, height: int, width: int, scale: int, seed: int
) -> None:
    """Any batch: more targets than queries, none at all, non-square sizes, ignored pixels; gradients too."""
    outputs = outputs_of(len(counts), queries, (height, width), seed=seed)
    targets = targets_of(counts, (scale * height, scale * width), seed)
    dense = [to_dense(target) for target in targets]
    recorded: list[Tensor] = []
    with recording_draws(recorded):
        theirs = Mask2FormerLoss(Mask2FormerConfig(num_labels=CLASSES, train_num_points=48, dice_weight=4.0), {})(
            outputs["pred_masks"], outputs["pred_logits"], [target["masks"].float() for target in dense],
            [target["labels"] for target in dense],
            [{"masks_queries_logits": item["pred_masks"], "class_queries_logits": item["pred_logits"]}
             for item in outputs["aux_outputs"]])
    loss = ReplayedLoss(**SETTINGS, num_masks_counts="all")
    rounds = [recorded[start:start + len(counts) + 2] for start in range(0, len(recorded), len(counts) + 2)]
    loss.recorded = in_drawing_order([points for one in rounds for points in one[:-2]], [one[-2] for one in rounds],
                                     [one[-1] for one in rounds])
    total, ours, *_ = loss.step(outputs, targets)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name].detach().reshape(()), rtol=2e-5, atol=2e-6)
    leaves = [item[name] for item in items_of(outputs) for name in ("pred_logits", "pred_masks")]
    weights = {"mask": 5.0, "dice": 4.0, "cross": 2.0}
    expected = torch.autograd.grad(sum(weights[name.split("_")[1]] * value.sum() for name, value in theirs.items()),
                                   leaves)
    for gradient, reference in zip(torch.autograd.grad(total, leaves), expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-3, atol=2e-6)


@contextmanager
def recording_draws(recorded: list[Tensor]) -> Iterator[None]:
    original = torch.rand

    def rand(*args: Any, **kwargs: Any) -> Tensor:
        recorded.append(original(*args, **kwargs))
        return recorded[-1]

    torch.rand = rand  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.rand = original


@pytest.mark.parametrize("ignore", ["background", "exclude"])
@pytest.mark.parametrize("counts", [[3, 0, 5], [0, 0], [9, 1]], ids=str)
def test_one_prediction_alone_equals_its_part_of_a_step(counts: list[int], ignore: str) -> None:
    """forward() differentiates by autograd, step() by the closed form: losses and gradients agree."""
    outputs, targets = outputs_of(len(counts), 7, (6, 8), layers=1), targets_of(counts, (12, 16))
    loss = MaskClassificationLoss(**SETTINGS, ignore=ignore)
    torch.manual_seed(0)
    single = loss(outputs["pred_masks"], targets, outputs["pred_logits"])
    torch.manual_seed(0)
    total, losses, *_ = loss.step(outputs, targets)
    for name, value in losses.items():
        torch.testing.assert_close(value, single[name].detach(), rtol=1e-6, atol=1e-7)
    leaves = [outputs["pred_masks"], outputs["pred_logits"]]
    expected = torch.autograd.grad(loss.loss_total(single, lambda name, value, **options: None), leaves)
    for gradient, reference in zip(torch.autograd.grad(total, leaves), expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("mutation", ["mask loss", "dice loss", "class loss", "divisor", "assignment",
                                      "gradient at points", "gradient of pixels"])
def test_the_comparison_with_transformers_notices(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compare = test_a_step_equals_transformers_loss.hypothesis.inner_test  # type: ignore[attr-defined]
    compare([3, 0, 2], queries=5, height=6, width=8, scale=2, seed=1)
    mutate(monkeypatch, mutation)
    with pytest.raises(AssertionError):
        compare([3, 0, 2], queries=5, height=6, width=8, scale=2, seed=1)


@pytest.mark.parametrize("mutation", ["gradient at points", "gradient of pixels"])
def test_the_comparison_of_both_forms_notices(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(monkeypatch, mutation)
    with pytest.raises(AssertionError, match="not close"):
        test_one_prediction_alone_equals_its_part_of_a_step([3, 0, 5], "background")


def test_gradients_in_closed_form_equal_autograd() -> None:
    generator = seeded()
    logits = (4 * torch.randn(5, 30, generator=generator, dtype=torch.float64)).requires_grad_()
    truth = torch.rand(5, 30, generator=generator, dtype=torch.float64)
    for counted in (None, (torch.rand(5, 30, generator=generator) > 0.4).double()):
        sampled = SampledPoints(torch.empty(0), logits, truth, counted)
        mask, dice = point_losses.point_losses(sampled)
        (expected,) = torch.autograd.grad((3 * mask + 2 * dice).sum(), logits)
        losses, gradient = losses_and_gradients(sampled, 3.0, 2.0)
        torch.testing.assert_close(gradient.detach(), expected, rtol=1e-10, atol=1e-12)
        assert all(torch.equal(one, other) for one, other in zip(losses, (mask, dice), strict=True))


# -- matched queries alone ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [[3, 0, 5], [9, 2, 1], [0, 0, 0]], ids=str)
@pytest.mark.parametrize("shared", [True, False], ids=["m2f", "eomt"])
def test_only_matched_queries_carry_the_same_gradients(counts: list[int], shared: bool) -> None:
    """Features shared by all predictions, as in Mask2Former, or separate for each, as in EoMT."""
    outputs = outputs_of(3, 7, (6, 8), factors=16)
    if not shared:
        for item in outputs["aux_outputs"]:
            item["mask_features"] = torch.randn(3, 16, 6, 8, generator=seeded(5)).requires_grad_()
    targets, found = targets_of(counts, (24, 32)), []
    leaves = [item[name] for item in items_of(outputs) for name in ("mask_embeddings", "mask_features", "pred_logits")]
    for matched in (False, True):
        items = []
        for item in items_of(outputs):
            masks = torch.einsum("bqd,bdhw->bqhw", item["mask_embeddings"], item["mask_features"])
            items.append({**item, "pred_masks": masks.detach()} if matched else
                         {"pred_logits": item["pred_logits"], "pred_masks": masks})
        total, *_ = MaskClassificationLoss(**SETTINGS).step({**items[0], "aux_outputs": items[1:]}, targets,
                                                           generator=seeded())
        found.append((total, torch.autograd.grad(total, leaves)))
    (total, gradients), (again, others) = found
    assert torch.equal(total, again)
    for gradient, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(other, gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shared", [True, False], ids=["m2f", "eomt"])
def test_the_comparison_of_factors_notices(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(monkeypatch, "gradient of factors")
    with pytest.raises(AssertionError, match="not close"):
        test_only_matched_queries_carry_the_same_gradients([3, 0, 5], shared)


@pytest.mark.parametrize("head", ["m2f", "eomt", "pmt"])
def test_the_switch_changes_no_gradient_of_the_model(head: str) -> None:
    targets, gradients = targets_of([2, 3], (64, 96)), []
    loss = MaskClassificationLoss(**{**SETTINGS, "num_labels": 5})
    targets = [{**target, "labels": target["labels"] % 5} for target in targets]
    for setting in ("true", "false"):
        model = model_of(head, f"loss.matched_gradients={setting}", "adapter.drop_path=0").train()
        torch.manual_seed(0)
        outputs = model(images())
        assert outputs["pred_masks"].requires_grad == (setting == "false")
        loss.step(outputs, targets, generator=seeded()).total.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradients[1][name] is not None
        scale = float(gradients[1][name].abs().max())
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-5, atol=1e-5 * scale + 1e-6, msg=name)


# -- targets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ignore", ["background", "exclude"])
def test_dense_targets_and_segment_maps_agree_to_the_last_bit(ignore: str) -> None:
    outputs, maps = outputs_of(3, 7, (6, 8)), targets_of([4, 0, 9], (24, 32))
    found = []
    for targets in (maps, [to_dense(target) for target in maps]):
        total, losses, *_ = MaskClassificationLoss(**SETTINGS, ignore=ignore).step(outputs, targets, generator=seeded())
        found.append((total, *losses.values()))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_masks_at_points_are_those_of_grid_sample() -> None:
    maps = targets_of([4, 9], (13, 21))
    points = torch.rand(2, 500, 2, generator=seeded())
    expected = torch.stack([point_sampling.point_sample(
        torch.cat([to_dense(target)["masks"].float(), torch.zeros(9 - len(target["labels"]), 13, 21)])[None],
        points[b:b + 1])[0] for b, target in enumerate(maps)])
    for targets in (maps, [to_dense(target) for target in maps]):
        packed = pack_targets(targets, CPU)
        torch.testing.assert_close(packed.at_points(points), expected, rtol=0, atol=1e-6)
        matched = packed.at_matched_points(torch.tensor([1, 0]), torch.tensor([7, 2]), points.flip(0))
        torch.testing.assert_close(matched, torch.stack([expected[1, 7], expected[0, 2]]), rtol=0, atol=1e-6)


def test_excluded_pixels_do_not_count() -> None:
    """Predictions there affect neither losses nor gradients; if the pixels were background, they would."""
    targets = [{"segment_map": torch.tensor([0] * 8 + [255] * 8, dtype=torch.uint8).repeat(16, 1),
                "labels": torch.tensor([2])}]
    for ignore, same in (("exclude", True), ("background", False)):
        totals = []
        for value in (-4.0, 4.0):
            outputs = outputs_of(1, 2, (16, 16), layers=1)
            with torch.no_grad():
                outputs["pred_masks"][..., 9:] = value  # column 8 is read by points of column 7 too
            loss = MaskClassificationLoss(**{**SETTINGS, "importance_sample_ratio": 0.0}, ignore=ignore)
            total, *_ = loss.step(outputs, targets, generator=seeded())
            (gradient,) = torch.autograd.grad(total, outputs["pred_masks"])
            totals.append(total.detach())
            assert (gradient[..., 9:].abs().max() == 0) == same
        assert torch.equal(totals[0], totals[1]) == same

def test_excluded_pixels_do_not_decide_who_is_matched() -> None:
    """Two queries say about the same where it counts, the first a little better; where it does not, the second does
    as the background would, and the first the opposite."""
    target = {"segment_map": torch.tensor([0] * 4 + [1] * 4 + [255] * 8, dtype=torch.uint8).repeat(16, 1),
              "labels": torch.tensor([2, 4])}
    left = torch.tensor([3.0] * 4 + [-3.0] * 4)
    border = torch.tensor([-3.0])  # read by points of column 7 too
    masks = torch.stack([torch.cat([1.1 * left, border, torch.full((7,), 6.0)]),
                         torch.cat([left, border, torch.full((7,), -6.0)]),
                         torch.cat([-left, border, torch.full((7,), -6.0)])])[None, :, None].expand(1, 3, 16, 16)
    prediction, draw = Prediction(torch.zeros(1, 3, CLASSES + 1), masks.contiguous()), point_sampling.uniform_draw
    for exclude, query in ((True, 0), (False, 1)):
        packed = pack_targets([target], CPU, exclude_ignored=exclude)
        (match,) = HungarianMatcher(500, 5.0, 5.0, 2.0).match([prediction], packed, draw(CPU, seeded()))
        assert int(match[1, match[2] == 0]) == query and int(match[1, match[2] == 1]) == 2


def test_what_is_ignored_has_two_meanings() -> None:
    with pytest.raises(ValueError, match="ignore is 'drop', legal: background, exclude"):
        MaskClassificationLoss(**SETTINGS, ignore="drop")


# -- what it costs --------------------------------------------------------------------------------------------------


class HostCalls(TorchFunctionMode):
    """Counts Python calls that make the host wait for an accelerator: reading values, copying tensors over."""

    NAMES = ("item", "cpu", "numpy", "tolist", "nonzero", "masked_select", "unique", "__bool__", "__int__", "__float__",
             "__index__", "__array__", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        masked = name in ("__getitem__", "__setitem__") and any(
            isinstance(index, Tensor) and index.dtype == torch.bool
            for index in (args[1] if isinstance(args[1], tuple) else (args[1],)))
        if name in self.NAMES or masked or (name == "where" and len(args) == 1):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


class Operations(TorchDispatchMode):
    """Counts dispatched operations and those that wait, and records the largest float tensor created."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.largest, self.waiting = 0, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        self.waiting += func.overloadpacket in WAITING - {torch.ops.aten.lift_fresh}
        result = func(*args, **(kwargs or {}))
        for item in torch.utils._pytree.tree_leaves(result):
            if isinstance(item, Tensor) and item.is_floating_point():
                self.largest = max(self.largest, item.untyped_storage().nbytes() // item.element_size())
        return result


def on_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the code paths of devices other than the CPU."""
    monkeypatch.setattr(cpu_kernels, "serve", lambda values: False)


def whole_step(counts: Sequence[int], *, dense: bool = False, ignore: str = "background") -> Callable[[], StepLoss]:
    """A step on ten predictions, ready to run."""
    outputs, targets = outputs_of(len(counts), 9, (8, 8), 10, factors=4), targets_of(counts, (32, 32))
    if dense:
        targets = [to_dense(target) for target in targets]
    for item in items_of(outputs):
        item["pred_masks"] = torch.einsum("bqd,bdhw->bqhw", item["mask_embeddings"], item["mask_features"]).detach()
    return partial(MaskClassificationLoss(**SETTINGS, ignore=ignore).step, outputs, targets, generator=seeded())


@pytest.mark.parametrize("ignore", ["background", "exclude"])
@pytest.mark.parametrize("dense", [False, True], ids=["maps", "dense"])
@pytest.mark.parametrize("counts", [[3, 2], [0, 0], [4] * 16], ids=str)
def test_a_step_waits_for_the_device_once(counts: list[int], dense: bool, ignore: str,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    on_accelerator(monkeypatch)
    step = whole_step(counts, dense=dense, ignore=ignore)
    with HostCalls() as calls, Operations() as operations:
        step().total.backward()
    assert calls.seen == ["cpu", "numpy"], "the costs of all predictions, in one copy"
    assert operations.waiting == 0


@pytest.mark.parametrize("stray", [
    lambda x: x.sum().item(), lambda x: x.cpu(), lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: float(x.sum()),
    lambda x: x.tolist(), lambda x: bool(x.any()),
], ids=["item", "cpu", "mask", "nonzero", "float", "tolist", "bool"])
def test_a_stray_wait_is_counted(stray: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    on_accelerator(monkeypatch)
    right = mask_gradients.with_gradients

    def with_stray(value: Tensor, *args: Any) -> Tensor:
        stray(value[None])
        return right(value, *args)

    monkeypatch.setattr("trainer.loss.mask_classification_loss.with_gradients", with_stray)
    step = whole_step([3, 2])
    with HostCalls() as calls:
        step()
    assert len(calls.seen) > 2


def operations_of(step: Callable[[], Any]) -> int:
    with Operations() as operations:
        step()
    return operations.count


@pytest.mark.parametrize(("dense", "ignore", "most"), [
    (False, "background", 1000), (True, "background", 1000), (False, "exclude", 1200), (True, "exclude", 1250)])
def test_the_number_of_operations_is_small_and_does_not_grow_with_the_batch(
    dense: bool, ignore: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_accelerator(monkeypatch)
    few, many = (operations_of(whole_step([4] * batch, dense=dense, ignore=ignore)) for batch in (4, 16))
    assert many <= most
    assert many - few <= 12 * (5 if ignore == "background" else 9), "bringing targets over is per image, nothing else"


def test_a_loop_over_images_or_predictions_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    on_accelerator(monkeypatch)
    right = HungarianMatcher.costs

    def one_by_one(self: HungarianMatcher, predictions: Any, targets: Any, points: Tensor) -> Tensor:
        for prediction in predictions:
            for masks in prediction.mask_logits:
                masks.sum()
        return right(self, predictions, targets, points)

    monkeypatch.setattr(HungarianMatcher, "costs", one_by_one)
    assert operations_of(whole_step([4] * 16)) > 1000


def test_masks_of_full_size_never_exist_as_floats() -> None:
    targets = targets_of([4, 4], (256, 256))
    outputs = outputs_of(2, 9, (8, 8))
    with Operations() as operations:
        MaskClassificationLoss(**SETTINGS).step(outputs, targets, generator=seeded()).total.backward()
    assert operations.largest < 256 * 256, "not even one"


def test_a_float_mask_of_full_size_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def with_floats(targets: Any, *args: Any, **kwargs: Any) -> Any:
        to_dense(targets[0])["masks"].float()
        return pack_targets(targets, *args, **kwargs)

    monkeypatch.setattr("trainer.loss.mask_classification_loss.pack_targets", with_floats)
    with pytest.raises(AssertionError, match="not even one"):
        test_masks_of_full_size_never_exist_as_floats()


def test_little_is_kept_for_the_backward_pass() -> None:
    """At most a quarter of what transformers' loss keeps."""
    outputs = outputs_of(2, 20, (32, 32), layers=4, factors=8)
    for item in items_of(outputs):
        item["pred_masks"] = torch.einsum("bqd,bdhw->bqhw", item["mask_embeddings"], item["mask_features"])
    targets = targets_of([8, 8], (128, 128))
    points = {**SETTINGS, "num_points": 3136}
    dense = [to_dense(target) for target in targets]
    theirs = Mask2FormerLoss(Mask2FormerConfig(num_labels=CLASSES, train_num_points=3136), {})
    kept = []
    for run in (
        lambda: MaskClassificationLoss(**points).step(outputs, targets),
        lambda: [theirs(item["pred_masks"], item["pred_logits"], [target["masks"].float() for target in dense],
                        [target["labels"] for target in dense]) for item in items_of(outputs)],
    ):
        storages: dict[int, int] = {}
        alive = []

        def pack(tensor: Tensor, storages: dict[int, int] = storages, alive: list[Tensor] = alive) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            alive.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            run()
        kept.append(sum(storages.values()))
    assert kept[0] <= 0.25 * kept[1], kept


# -- elsewhere ------------------------------------------------------------------------------------------------------


def test_it_stands_in_for_transformers_loss_in_its_model() -> None:
    """Three lines of adapter, and Mask2FormerForUniversalSegmentation trains with ours."""
    config = Mask2FormerConfig(
        num_labels=CLASSES, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32,
        dim_feedforward=32, encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=5,
        train_num_points=48,
        backbone_config={"model_type": "swin", "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1],
                         "out_features": ["stage1", "stage2", "stage3", "stage4"], "image_size": 64})
    torch.manual_seed(0)
    model = Mask2FormerForUniversalSegmentation(config).eval()
    dense = [to_dense(target) for target in targets_of([2, 3], (64, 64))]
    inputs = {"pixel_values": torch.randn(2, 3, 64, 64), "mask_labels": [target["masks"].float() for target in dense],
              "class_labels": [target["labels"] for target in dense]}
    torch.manual_seed(1)
    expected = model(**inputs).loss

    class Adapter(MaskClassificationLoss):
        def forward(self, masks_queries_logits: Tensor, class_queries_logits: Tensor, mask_labels: Any,
                    class_labels: Any, auxiliary_predictions: Any = None) -> dict[str, Tensor]:
            targets = [{"masks": masks, "labels": labels}
                       for masks, labels in zip(mask_labels, class_labels, strict=True)]
            losses = super().forward(masks_queries_logits, targets, class_queries_logits)
            for number, item in enumerate(auxiliary_predictions):
                other = super().forward(item["masks_queries_logits"], targets, item["class_queries_logits"])
                losses |= {f"{name}_{number}": value for name, value in other.items()}
            return losses

    model.criterion = Adapter(**{**SETTINGS, "dice_coefficient": 5.0})
    torch.manual_seed(1)
    found = model(**inputs).loss
    torch.testing.assert_close(found.reshape(()), expected.reshape(()), rtol=1e-5, atol=1e-5)
    found.sum().backward()


def test_bf16_predictions_are_matched_and_charged_as_their_float32_values() -> None:
    outputs, targets = outputs_of(3, 9, (8, 8)), targets_of([4, 0, 6], (32, 32))
    rounded = [{name: value.detach().bfloat16() for name, value in item.items() if name != "aux_outputs"}
               for item in items_of(outputs)]
    exact = [{name: value.float() for name, value in item.items()} for item in rounded]
    matcher, packed = HungarianMatcher(48, 5.0, 4.0, 2.0), pack_targets(targets, CPU)
    matches, losses = [], []
    for items in (rounded, exact):
        with torch.autocast("cpu", torch.bfloat16, enabled=items is rounded):
            predictions = [Prediction(item["pred_logits"], item["pred_masks"]) for item in items]
            matches.append(matcher.match(predictions, packed, point_sampling.uniform_draw(CPU, seeded())))
            losses.append(MaskClassificationLoss(**SETTINGS).step({**items[0], "aux_outputs": items[1:]}, targets,
                                                                  generator=seeded()))
    assert torch.equal(*matches)
    assert all(value.dtype == torch.float32 and torch.equal(value, losses[1].losses[name])
               for name, value in losses[0].losses.items())


def test_a_trained_model_is_matched_alike_in_bf16_and_in_float32() -> None:
    model, pixels = model_of("m2f").train(), images()
    blocks = torch.arange(3, dtype=torch.uint8).repeat_interleave(32).expand(64, 96)
    targets = [{"segment_map": blocks, "labels": torch.tensor([4, 0, 2])},
               {"segment_map": blocks.flip(1), "labels": torch.tensor([1, 3, 2])}]
    loss = MaskClassificationLoss(**SETTINGS | {"num_points": 256, "num_labels": 5})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    for step in range(30):
        total, losses, *_ = loss.step(model(pixels), targets, generator=seeded(step))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        if step == 0:
            first = total.detach()
    assert total.detach() < 0.5 * first, "it has learned something"
    matches = []
    for enabled in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            outputs = model(pixels)
            _, losses, *_ = loss.step(outputs, targets, generator=seeded())
            predictions = [Prediction(item["pred_logits"], item["pred_masks"]) for item in items_of(outputs)]
            draw = point_sampling.uniform_draw(CPU, seeded())
            matches.append(loss.matcher.match(predictions, pack_targets(targets, CPU), draw))
    assert outputs["pred_masks"].dtype == torch.bfloat16
    assert all(value.dtype == torch.float32 for value in losses.values())
    assert torch.equal(*matches)


@pytest.mark.parametrize("test", [test_bf16_predictions_are_matched_and_charged_as_their_float32_values,
                                  test_a_trained_model_is_matched_alike_in_bf16_and_in_float32],
                         ids=lambda test: test.__name__[5:20])
def test_other_matches_in_bf16_are_noticed(test: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(monkeypatch, "costs in bf16")
    with pytest.raises(AssertionError):
        test()


RANKS = [[3, 2], [0, 0]]  # the second rank has no mask at all


def _joined(counts: Sequence[int]) -> tuple[dict[str, Any], list[dict[str, Tensor]]]:
    return outputs_of(len(counts), 7, (6, 8)), targets_of(counts, (24, 32))


class Scaled(nn.Module):
    """A model whose only parameter is a factor of each query's masks."""

    def __init__(self) -> None:
        super().__init__()
        self.factors = nn.Parameter(torch.linspace(0.5, 1.5, 7)[:, None, None])

    def forward(self, outputs: dict[str, Any], images: slice) -> dict[str, Any]:
        items = [{"pred_logits": item["pred_logits"][images], "pred_masks": item["pred_masks"][images] * self.factors}
                 for item in items_of(outputs)]
        return {**items[0], "aux_outputs": items[1:]}


def _rank_loss(rank: int, store: str, folder: str, divisor: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=len(RANKS))
    outputs, targets = _joined([*RANKS[0], *RANKS[1]])
    mine = slice(2 * rank, 2 * rank + 2)
    model = Scaled()
    loss = ReplayedLoss(**{**SETTINGS, "class_coefficient": 0.0})  # that loss is a mean of the rank's own queries
    if divisor == "its own":
        own = torch.tensor(max(1.0, sum(RANKS[rank])))
        loss.count_masks = lambda *_: own  # type: ignore[assignment, method-assign]
    loss.recorded = _points(rank)
    reductions = 0
    all_reduce = dist.all_reduce

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal reductions
        reductions += 1
        return all_reduce(*args, **kwargs)

    dist.all_reduce = counting
    total, losses, *_ = loss.step(model(outputs, mine), targets[mine])
    assert reductions == (divisor == "the mean")
    total.backward()
    found = {name: value for name, value in losses.items() if "cross" not in name}
    torch.save((found, model.factors.grad), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def _points(rank: int | None) -> list[Tensor]:
    """Recorded points of 4 images and of the 5 masks, all of which belong to the first two images."""
    generator = seeded(9)
    matcher = [torch.rand(4, 48, 2, generator=generator) for _ in range(3)]
    candidates, rests = ([torch.rand(5, count, 2, generator=generator) for _ in range(3)] for count in (144, 12))
    if rank is not None:
        matcher = [points[2 * rank:2 * rank + 2] for points in matcher]
    if rank == 1:
        candidates, rests = ([points[:0] for points in recorded] for recorded in (candidates, rests))
    return in_drawing_order(matcher, candidates, rests)


@pytest.mark.slow
@pytest.mark.parametrize("divisor", ["the mean", "its own"])
def test_two_ranks_add_up_to_the_joined_batch(divisor: str, tmp_path: Any) -> None:
    """Each rank divides by the mean number of masks per rank: the ranks' mean, which DDP takes of gradients, is the
    joined batch's. Divided by the rank's own number it is not."""
    call_on_ranks(_rank_loss, str(tmp_path / "store"), str(tmp_path), divisor)
    (first, gradient), (second, other) = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    outputs, targets = _joined([*RANKS[0], *RANKS[1]])
    loss, model = ReplayedLoss(**{**SETTINGS, "class_coefficient": 0.0}), Scaled()
    loss.recorded = _points(None)
    total, joined, *_ = loss.step(model(outputs, slice(None)), targets)
    total.backward()
    right = divisor == "the mean"
    for name, value in first.items():
        assert np.isclose(float(value + second[name]) / 2, float(joined[name]), rtol=1e-5) == right, name
    assert model.factors.grad is not None
    assert torch.allclose((gradient + other) / 2, model.factors.grad, rtol=1e-4, atol=1e-7) == right


def test_factors_in_some_predictions_only_are_refused() -> None:
    outputs, factors = outputs_of(2, 9, (8, 8), 3), outputs_of(2, 9, (8, 8), 3, factors=4)
    for item, made_of in zip(items_of(outputs)[1:], items_of(factors)[1:], strict=True):
        item |= {name: made_of[name] for name in ("mask_embeddings", "mask_features")}
    with pytest.raises(ValueError, match="1 of 3 predictions lack mask_embeddings"):
        MaskClassificationLoss(**SETTINGS).step(outputs, targets_of([2, 1], (32, 32)))
