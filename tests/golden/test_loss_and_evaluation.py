"""Loss and evaluation against numbers recorded from the public reference code. Sizes come from the golden files."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.mutations import mutate
from tests.support.replay import ReplayedLoss, in_drawing_order, replay
from tests.support.view_scores import view_scores
from trainer.config import EvalConfig, RunConfig
from trainer.evaluation.metrics import ConfusionMatrix
from trainer.evaluation.predictor import Predictor
from trainer.loss.matcher import HungarianMatcher, Prediction
from trainer.loss.packed_targets import pack_targets
from trainer.loss.pixel_loss import pixel_cross_entropy
from trainer.models.heads import LinearHead, MaskClassificationHead
from trainer.models.resizing import Rows, Size
from trainer.optimizer import one_cycle, one_cycle_beta1

FORWARD = {"rtol": 1e-4, "atol": 1e-5}
LOSS = {"rtol": 1e-5, "atol": 1e-6}
CPU = torch.device("cpu")
SUMMARY_NAMES = {"mIoU": "mIoU", "acc": "mAcc", "aAcc": "aAcc", "dice": "mDice", "fscore": "mF1",
                 "precision": "mPrecision", "recall": "mRecall"}


def assert_gradients_close(actual: Tensor, expected: Tensor) -> None:
    floor = 1e-5 * float(expected.abs().max())
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=floor)


class MaskLossCase:
    """The parts of `mask_loss_small` shared by the tests below."""

    def __init__(self, info: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.info, self.tensors = info, tensors
        self.layers = [f"layer{index}/" for index in range(info["layers"])]
        self.images = range(info["batch"])
        self.targets = [{"masks": tensors[f"targets/{b}.masks"], "labels": tensors[f"targets/{b}.labels"]}
                        for b in self.images]
        self.coefficients = [info[f"{name}_coefficient"] for name in ("mask", "dice", "class")]

    def loss(self, **changed: Any) -> ReplayedLoss:
        names = ("num_points", "oversample_ratio", "importance_sample_ratio", "mask_coefficient", "dice_coefficient",
                 "class_coefficient", "num_labels", "no_object_coefficient")
        return ReplayedLoss(**({name: self.info[name] for name in names} | changed))

    def prediction(self, layer: str) -> Prediction:
        return Prediction(self.tensors[f"{layer}inputs/pred_logits"].clone().requires_grad_(),
                          self.tensors[f"{layer}inputs/pred_masks"].clone().requires_grad_())

    def matcher_points(self, layer: str) -> list[Tensor]:
        return [self.tensors[f"{layer}points/matcher.{b}"] for b in self.images]

    def loss_points(self, layer: str) -> list[Tensor]:
        return [self.tensors[f"{layer}points/{name}"] for name in ("oversampled", "random")]


@pytest.fixture
def mask_loss(golden: Any) -> MaskLossCase:
    return MaskLossCase(*golden("mask_loss_small"))


def test_golden_matcher_costs_and_assignments(mask_loss: MaskLossCase) -> None:
    case = mask_loss
    matcher = HungarianMatcher(case.info["num_points"], *case.coefficients)
    packed = pack_targets(case.targets, CPU)
    predictions = [case.prediction(layer) for layer in case.layers]
    points = [case.matcher_points(layer) for layer in case.layers]
    matches = matcher.match(predictions, packed, replay([p for of_layer in points for p in of_layer]))
    all_costs = matcher.costs(predictions, packed, torch.stack([torch.cat(of_layer) for of_layer in points])).detach()
    for layer, costs, match in zip(case.layers, all_costs, matches, strict=True):
        for b in case.images:
            torch.testing.assert_close(costs[b, :, :packed.counts[b]], case.tensors[f"{layer}matcher/cost.{b}"],
                                       **LOSS)
            _, queries, chosen = match[:, match[0] == b]
            assert torch.equal(queries, case.tensors[f"{layer}matcher/query_idx.{b}"])
            assert torch.equal(chosen, case.tensors[f"{layer}matcher/target_idx.{b}"])


def test_golden_assignments_survive_bf16(mask_loss: MaskLossCase) -> None:
    case = mask_loss
    matcher = HungarianMatcher(case.info["num_points"], *case.coefficients)
    predictions = [Prediction(*(logits.bfloat16() for logits in case.prediction(layer))) for layer in case.layers]
    points = [points for layer in case.layers for points in case.matcher_points(layer)]
    with torch.autocast("cpu", torch.bfloat16):
        matches = matcher.match(predictions, pack_targets(case.targets, CPU), replay(points))
    for layer, match in zip(case.layers, matches, strict=True):
        for b in case.images:
            _, queries, chosen = match[:, match[0] == b]
            assert torch.equal(queries, case.tensors[f"{layer}matcher/query_idx.{b}"])
            assert torch.equal(chosen, case.tensors[f"{layer}matcher/target_idx.{b}"])


def test_golden_mask_loss_of_each_prediction(mask_loss: MaskLossCase) -> None:
    case = mask_loss
    loss = case.loss()
    torch.testing.assert_close(loss.empty_weight, case.tensors["empty_weight"])
    for layer in case.layers:
        class_logits, mask_logits = case.prediction(layer)
        loss.recorded = case.matcher_points(layer) + case.loss_points(layer)
        losses = loss(mask_logits, case.targets, class_logits)
        for name, value in losses.items():
            torch.testing.assert_close(value, case.tensors[f"{layer}losses/{name}"][0], **LOSS)
        total = loss.loss_total(losses, lambda name, value, **options: None)
        torch.testing.assert_close(total, case.tensors[f"{layer}losses/weighted_total"][0], **LOSS)
        class_grad, mask_grad = torch.autograd.grad(total, [class_logits, mask_logits])
        assert_gradients_close(class_grad, case.tensors[f"{layer}grads/pred_logits"])
        assert_gradients_close(mask_grad, case.tensors[f"{layer}grads/pred_masks"])


def test_golden_mask_loss_of_all_predictions_at_once(mask_loss: MaskLossCase) -> None:
    case = mask_loss
    loss = case.loss()
    candidates, rests = zip(*map(case.loss_points, case.layers), strict=True)
    matcher_points = [p for layer in case.layers for p in case.matcher_points(layer)]
    loss.recorded = in_drawing_order(matcher_points, candidates, rests)
    items = [{"pred_logits": p.class_logits, "pred_masks": p.mask_logits} for p in map(case.prediction, case.layers)]
    total, *_ = loss.step(items[0] | {"aux_outputs": items[1:]}, case.targets)
    torch.testing.assert_close(total, case.tensors["losses/sum_over_layers"][0], **LOSS)
    gradients = torch.autograd.grad(total, [item[name] for item in items for name in ("pred_logits", "pred_masks")])
    for layer, class_grad, mask_grad in zip(case.layers, gradients[::2], gradients[1::2], strict=True):
        assert_gradients_close(class_grad, case.tensors[f"{layer}grads/pred_logits"])
        assert_gradients_close(mask_grad, case.tensors[f"{layer}grads/pred_masks"])


@pytest.mark.parametrize(("test", "mutation"), [
    *((test_golden_matcher_costs_and_assignments, name) for name in ("mask cost", "dice cost", "class cost",
                                                                      "assignment")),
    *((test_golden_assignments_survive_bf16, name) for name in ("assignment", "costs in bf16")),
    *((test_golden_mask_loss_of_each_prediction, name) for name in ("mask loss", "dice loss", "class loss", "divisor")),
    *((test_golden_mask_loss_of_all_predictions_at_once, name)
      for name in ("mask loss", "dice loss", "class loss", "divisor", "gradient at points", "gradient of pixels")),
], ids=lambda value: value if isinstance(value, str) else value.__name__.removeprefix("test_golden_"))
def test_golden_comparisons_notice(test: Any, mutation: str, mask_loss: MaskLossCase,
                                   monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(monkeypatch, mutation)
    with pytest.raises(AssertionError):
        test(mask_loss)


@pytest.mark.parametrize(("changed", "moved"), [
    ({"no_object_coefficient": 0.2}, "loss_cross_entropy"),
    ({"points": "mirrored"}, "loss_mask"),
    ({"points": "mirrored"}, "loss_dice"),
])
def test_golden_mask_loss_notices_wrong_maths(mask_loss: MaskLossCase, changed: dict[str, Any], moved: str) -> None:
    case, layer = mask_loss, mask_loss.layers[0]
    mirrored = changed == {"points": "mirrored"}
    loss = case.loss(**({} if mirrored else changed))
    points = case.matcher_points(layer) + case.loss_points(layer)
    loss.recorded = [1 - p for p in points] if mirrored else points
    class_logits, mask_logits = case.prediction(layer)
    value = loss(mask_logits, case.targets, class_logits)[moved]
    assert abs(float(value.detach() - case.tensors[f"{layer}losses/{moved}"][0])) > 1e-3


def test_golden_pixel_cross_entropy(golden: Any) -> None:
    _, tensors = golden("pixel_ce_small")
    pred = tensors["pred"].clone().requires_grad_()
    loss = pixel_cross_entropy(pred, tensors["gt"])
    torch.testing.assert_close(loss, tensors["loss"][0], **FORWARD)
    assert_gradients_close(torch.autograd.grad(loss, pred)[0], tensors["grads/pred"])


def test_golden_learning_rates(golden: Any) -> None:
    info, _ = golden("lr_schedule_small")
    for case in info["cases"]:
        kwargs = case["kwargs"]
        warmup = kwargs["warmup_iters"]
        for iteration, lr, beta1 in case["iteration_lr_beta1"]:
            count = max(iteration - 1, 0)
            ours = one_cycle(count, case["lr"], case["total"], warmup, warmup_ratio=kwargs["warmup_ratio"],
                             final_div_factor=float(kwargs["final_div_factor"]),
                             anneal_strategy=kwargs["anneal_strategy"])
            assert ours == pytest.approx(lr, rel=1e-6, abs=1e-15), (case["total"], iteration)
            if kwargs["use_beta1"]:
                assert one_cycle_beta1(count, case["iteration_lr_beta1"][-1][2], warmup) == beta1, iteration


def areas_of(matrix: ConfusionMatrix) -> Tensor:
    return torch.stack(list(matrix.areas())).float()


def assert_summary(matrix: ConfusionMatrix, final: dict[str, float]) -> None:
    summary = matrix.summary()
    for name, value in final.items():
        assert summary[SUMMARY_NAMES[name]] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_golden_metrics(golden: Any) -> None:
    info, tensors = golden("metrics_small")
    for index, case in enumerate(info["cases"]):
        prefix = f"case{index}/"
        matrix = ConfusionMatrix(case["num_classes"], ignore_index=255)
        for n in range(len(case["sizes"])):
            image = ConfusionMatrix(case["num_classes"], ignore_index=255)
            image.update(tensors[f"{prefix}pred.{n}"], tensors[f"{prefix}label_reduced.{n}"])
            assert torch.equal(areas_of(image), tensors[f"{prefix}areas.{n}"])
            matrix.merge(image)
        assert torch.equal(areas_of(matrix), tensors[f"{prefix}totals"])
        assert_summary(matrix, info["final"][prefix])
        per_class = torch.tensor(matrix.summary()["per_class_iou"])
        torch.testing.assert_close(per_class, tensors[f"{prefix}per_class_iou"], equal_nan=True, **FORWARD)


class ToyModel:
    """The recorded predictor as a network of ours: maps from colours against the crop's mean, plus ramps down and
    across the crop. What turns them into scores is the product's own code."""

    def __init__(self, tensors: dict[str, Tensor], kind: str) -> None:
        self.weights = {key.split("/")[1]: value for key, value in tensors.items() if key.startswith("predictor/")}
        self.kind = kind
        self.crops: list[tuple[int, int]] = []

    def __call__(self, crop: Tensor) -> dict[str, Any]:
        self.crops += [(crop.shape[2], crop.shape[3])] * len(crop)
        if self.kind == "linear":
            return {"logits": self._maps(crop, *(self.weights[name] for name in "Wbrs"))}
        masks = self._maps(crop, *(self.weights[f"{name}m"] for name in "Wbrs"))
        means = crop.mean((1, 2, 3))[:, None, None]
        return {"pred_logits": self.weights["cls"] * (1 + means), "pred_masks": masks}

    def semantic_logits(self, outputs: dict[str, Any], size: Size, dtype: torch.dtype, rows: Rows) -> Tensor:
        head: Any = LinearHead if self.kind == "linear" else MaskClassificationHead
        scores: Tensor = head.semantic_logits(self, outputs, size, dtype, rows)
        return scores

    @staticmethod
    def _maps(crop: Tensor, weight: Tensor, bias: Tensor, down: Tensor, across: Tensor) -> Tensor:
        height, width = crop.shape[2:]
        centred = crop - crop.mean((2, 3), keepdim=True)
        maps = torch.einsum("ck,bkhw->bchw", weight, centred) + bias[:, None, None]
        maps = maps + down[:, None, None] * torch.linspace(0, 1, height)[:, None]
        return maps + across[:, None, None] * torch.linspace(0, 1, width)


def reference_predictor(model: ToyModel, num_classes: int, crop: int, stride: int) -> Predictor:
    """The behaviour that `eval.reference=dinov3` gives users."""
    settings = EvalConfig(reference="dinov3", crop_size=crop, stride=stride)
    return Predictor(model, RunConfig(eval=settings), num_classes, CPU)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["linear", "m2f"])
def test_golden_sliding_window(golden: Any, kind: str) -> None:
    info, tensors = golden("slide_inference_small")
    for index, case in enumerate(info["cases"]):
        model = ToyModel(tensors, kind)
        assert case["crop"][0] == case["crop"][1] and case["stride"][0] == case["stride"][1]
        predictor = reference_predictor(model, info["num_classes"], case["crop"][0], case["stride"][0])
        image = tensors[f"case{index}/inputs/image"]
        # m2f: a bf16 score may round the other way, one step of 2^-8
        tolerance = {"rtol": 1e-2, "atol": 1e-5} if kind == "m2f" else FORWARD
        slide = view_scores(predictor, image, tuple(case["image"]), False)
        torch.testing.assert_close(slide, tensors[f"case{index}/{kind}/slide"], **tolerance)
        assert model.crops == [(h, w) for h, w, _ in info["crops_seen_h_w_rescale"][f"case{index}/{kind}"]]
        probabilities = view_scores(predictor, image, tuple(case["rescale_to"]), False).softmax(1)
        torch.testing.assert_close(probabilities, tensors[f"case{index}/{kind}/make_inference"], **tolerance)
        mirrored = view_scores(predictor, image, tuple(case["rescale_to"]), True)
        torch.testing.assert_close(mirrored, tensors[f"case{index}/{kind}/make_inference_flipped_noact"], **tolerance)


def reduce_zero_label(label: Tensor) -> Tensor:
    reduced = label.to(torch.int64) - 1
    return torch.where((label == 0) | (label == 255), 255, reduced)


@pytest.mark.parametrize("kind", ["linear", "m2f"])
def test_golden_test_time_augmentation(golden: Any, kind: str) -> None:
    info, tensors = golden("slide_inference_small")
    tta = info["tta"]
    predictor = reference_predictor(ToyModel(tensors, kind), info["num_classes"], tta["crop"], tta["stride"])
    matrix = ConfusionMatrix(info["num_classes"], ignore_index=255)
    for image in range(tta["images"]):
        label = tensors[f"tta/gt{image}"]
        views = [tensors[f"tta/image{image}.view{v}"] for v in range(2 * len(tta["resized"][image]))]
        total = sum(
            view_scores(predictor, view, (label.shape[0], label.shape[1]), 2 * v >= len(views)).softmax(1)
            for v, view in enumerate(views))
        assert isinstance(total, Tensor)
        labels = total.argmax(1)[0]
        assert torch.equal(labels.to(torch.uint8), tensors[f"tta/{kind}/pred{image}"])
        single = ConfusionMatrix(info["num_classes"], ignore_index=255)
        single.update(labels, reduce_zero_label(label))
        assert torch.equal(areas_of(single), tensors[f"tta/{kind}/areas{image}"])
        matrix.merge(single)
    summary = matrix.summary()
    for name, percent in info["tta_final_metrics_percent"][kind].items():
        value = summary[SUMMARY_NAMES[name]]
        assert math.isclose(round(100 * value, 2), percent, abs_tol=0.011), name


def test_golden_view_sizes(golden: Any) -> None:
    from trainer.evaluation.sliding_window import view_size

    info, _ = golden("slide_inference_small")
    for size, resized in zip(info["tta"]["gt_sizes"], info["tta"]["resized"], strict=True):
        for view in resized:
            assert view_size((size[0], size[1]), min(view), None) == tuple(view)


def test_golden_softmax_is_over_classes(golden: Any) -> None:
    _, tensors = golden("slide_inference_small")
    noact, activated = (tensors[f"case0/linear/make_inference{suffix}"] for suffix in ("_flipped_noact", ""))
    torch.testing.assert_close(F.softmax(noact.flip(3), 1), activated, **FORWARD)
