"""`MaskClassificationLoss` in the place of EoMT's class: code that was written for that one runs on ours unchanged.

What that class does beyond its parent, transformers' `Mask2FormerLoss`, is known as facts and written down here once
more, slowly, from the parent's parts (`expected_losses`); the parent itself is run.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import Mask2FormerHungarianMatcher, Mask2FormerLoss

from shards.errors import ConfigError
from tests.support.zygote import call_on_ranks
from tests.unit.test_trainer_loss_mask_classification_loss import CLASSES, CPU, SETTINGS, outputs_of, seeded, targets_of
from trainer.config import load_run_config
from trainer.data.targets import to_dense
from trainer.loop import _count_masks
from trainer.loss.mask_classification_loss import MaskClassificationLoss
from trainer.loss.matcher import NonFiniteLossError
from trainer.loss.packed_targets import SoftTargets, pack_targets

Targets = Sequence[dict[str, Any]]


def expected_losses(masks: Tensor, targets: Targets, classes: Tensor, divisor: str = "matched") -> dict[str, Tensor]:
    """The losses of EoMT's class: its parent's, divided by the number of matched masks."""
    parent = Mask2FormerLoss(Mask2FormerConfig(num_labels=CLASSES, train_num_points=48, dice_weight=4.0), {})
    mask_labels = [target["masks"].to(masks.dtype) for target in targets]
    labels = [target["labels"].long() for target in targets]
    indices = parent.matcher(masks, classes, mask_labels, labels)
    counts = [min(len(own), masks.shape[1]) if divisor == "matched" else len(own) for own in labels]
    return (parent.loss_masks(masks, mask_labels, indices, max(1, sum(counts)))
            | parent.loss_labels(classes, labels, indices))


def both(masks: Tensor, targets: Targets, classes: Tensor, seed: int = 0, **settings: Any
         ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(ours, expected), from the same state of torch's generator."""
    torch.manual_seed(seed)
    ours = MaskClassificationLoss(**SETTINGS, **settings)(masks, targets, classes)
    torch.manual_seed(seed)
    return ours, expected_losses(masks, targets, classes, settings.get("num_masks_counts", "matched"))


def assert_same(ours: dict[str, Tensor], expected: dict[str, Tensor], leaves: Sequence[Tensor]) -> None:
    assert list(ours) == list(expected) == ["loss_mask", "loss_dice", "loss_cross_entropy"]
    for name, value in ours.items():
        assert value.shape == ()
        torch.testing.assert_close(value, expected[name], rtol=2e-5, atol=2e-6)
        for gradient, reference in zip(torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True),
                                       torch.autograd.grad(expected[name], leaves, retain_graph=True,
                                                           allow_unused=True), strict=True):
            assert (gradient is None) == (reference is None)
            if gradient is not None:
                torch.testing.assert_close(gradient, reference, rtol=1e-3, atol=2e-6)


def dense_case(counts: Sequence[int], queries: int) -> tuple[Tensor, Targets, Tensor]:
    outputs = outputs_of(len(counts), queries, (6, 8), layers=1)
    targets = [dict(to_dense(target)) for target in targets_of(counts, (24, 32))]
    return outputs["pred_masks"], targets, outputs["pred_logits"]


def ignore_log(name: str, value: Tensor | None, **options: bool) -> None:
    pass


# -- more targets than queries --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["matched", "all"])
@pytest.mark.parametrize("counts", [[4], [9, 2, 0], [9, 9]], ids=str)
@pytest.mark.parametrize("queries", [1, 3, 12])
def test_surplus_targets_count_as_the_rule_says(rule: str, counts: list[int], queries: int) -> None:
    masks, targets, classes = dense_case(counts, queries)
    ours, expected = both(masks, targets, classes, num_masks_counts=rule)
    assert_same(ours, expected, [masks, classes])


@pytest.mark.parametrize("form", ["maps", "dense", "soft"])
@pytest.mark.parametrize("ignore", ["background", "exclude"])
def test_every_path_divides_by_the_masks_that_were_matched(form: str, ignore: str) -> None:
    """One query, four targets, one image: the one match counts fully, where transformers' rule makes it a quarter."""
    outputs, maps = outputs_of(1, 1, (6, 8), layers=2), targets_of([4], (24, 32))
    dense: Targets = [dict(to_dense(target)) for target in maps]
    soft: Targets = [{**target, "masks": target["masks"].float()} for target in dense]
    targets = {"maps": maps, "dense": dense, "soft": soft}[form]
    found = {}
    for rule in ("matched", "all"):
        loss = MaskClassificationLoss(**SETTINGS, ignore=ignore, num_masks_counts=rule)
        torch.manual_seed(0)
        single = loss(outputs["pred_masks"], targets, outputs["pred_logits"])
        _, step, *_ = loss.step(outputs, targets, generator=seeded())
        found[rule] = [single["loss_mask"], single["loss_dice"], step["loss_mask"], step["loss_dice_0"]]
    for matched, of_all in zip(found["matched"], found["all"], strict=True):
        torch.testing.assert_close(matched, 4 * of_all)


def test_training_divides_by_the_masks_that_were_matched() -> None:
    """The number is known before the forward pass, from the counts of the whole step."""
    batches = [SimpleNamespace(counts=counts) for counts in ([9, 2], [1, 0])]
    context: Any = SimpleNamespace(device=CPU, world_size=1, all_reduce_sum=lambda numbers: numbers)
    for rule, expected in ((), 3.0), (("loss.num_masks_counts=all",), 6.0):
        config = load_run_config(None, ["decoder_head.num_queries=3", *rule])
        assert float(_count_masks(batches, config, context)) == expected  # type: ignore[arg-type]


def test_matched_is_the_default_and_others_are_refused() -> None:
    assert MaskClassificationLoss(**SETTINGS).num_masks_counts == "matched"
    with pytest.raises(ValueError, match="num_masks_counts is 'some', legal: matched, all"):
        MaskClassificationLoss(**SETTINGS, num_masks_counts="some")


# -- the interface --------------------------------------------------------------------------------------------------


def test_signatures_are_those_of_the_original() -> None:
    loss = MaskClassificationLoss(48, 3.0, 0.75, 5.0, 4.0, 2.0, CLASSES, 0.1)
    assert isinstance(loss, Mask2FormerLoss) and isinstance(loss.matcher, Mask2FormerHungarianMatcher)
    assert list(inspect.signature(loss.forward).parameters) == ["masks_queries_logits", "targets",
                                                                "class_queries_logits"]
    assert list(inspect.signature(loss.loss_masks).parameters) == ["masks_queries_logits", "mask_labels", "indices"]
    assert list(inspect.signature(loss.loss_total).parameters) == ["losses_all_layers", "log_fn"]
    for name in ("loss_labels", "get_num_masks", "sample_points_using_uncertainty", "calculate_uncertainty"):
        assert inspect.signature(getattr(loss, name)) == inspect.signature(getattr(Mask2FormerLoss(
            Mask2FormerConfig(num_labels=CLASSES), {}), name))
    assert (loss.mask_coefficient, loss.dice_coefficient, loss.class_coefficient, loss.eos_coef) == (5.0, 4.0, 2.0, 0.1)
    assert (loss.matcher.num_points, loss.matcher.cost_mask, loss.matcher.cost_dice, loss.matcher.cost_class
            ) == (48, 5.0, 4.0, 2.0)


def test_the_state_dict_is_the_original_s() -> None:
    loss = MaskClassificationLoss(**SETTINGS)
    assert list(loss.state_dict()) == ["empty_weight"]
    assert loss.empty_weight.tolist() == pytest.approx([1.0] * CLASSES + [0.1])
    loss.load_state_dict({"empty_weight": torch.full((CLASSES + 1,), 0.5)})
    assert loss.empty_weight[0] == 0.5 and list(loss.parameters()) == []


def test_the_matcher_called_as_the_original_s_is_that_one() -> None:
    masks, targets, classes = dense_case([3, 5], queries=4)
    arguments = {"masks_queries_logits": masks, "class_queries_logits": classes,
                 "mask_labels": [target["masks"].float() for target in targets],
                 "class_labels": [target["labels"] for target in targets]}
    torch.manual_seed(0)
    ours = MaskClassificationLoss(**SETTINGS).matcher(**arguments)
    torch.manual_seed(0)
    theirs = Mask2FormerHungarianMatcher(2.0, 5.0, 4.0, 48)(**arguments)
    assert all(torch.equal(one, other) for pair in zip(ours, theirs, strict=True)
               for one, other in zip(*pair, strict=True))


def test_the_parts_put_together_by_hand_are_forward() -> None:
    """As in code that extends the original: matcher, then `loss_masks`, then `loss_labels`."""
    masks, targets, classes = dense_case([9, 2], queries=5)
    loss = MaskClassificationLoss(**SETTINGS)
    mask_labels, labels = [t["masks"].float() for t in targets], [t["labels"] for t in targets]
    torch.manual_seed(0)
    indices = loss.matcher(masks, classes, mask_labels, labels)
    parts = loss.loss_masks(masks, mask_labels, indices) | loss.loss_labels(classes, labels, indices)
    torch.manual_seed(0)
    assert_same(loss(masks, targets, classes), parts, [masks, classes])
    assert float(loss.get_num_masks(labels, CPU)) == 11.0, "the parent's, which counts all"
    points = loss.sample_points_using_uncertainty(masks[0][:, None], loss.calculate_uncertainty, 48, 3, 0.75)
    assert points.shape == (5, 48, 2)


@pytest.mark.parametrize("part", ["subclass", "instance", "matcher", "points"])
def test_a_part_that_was_replaced_is_used(part: str) -> None:
    masks, targets, classes = dense_case([2, 3], queries=5)

    class Extended(MaskClassificationLoss):
        def loss_labels(self, *arguments: Any) -> dict[str, Tensor]:
            return {"loss_cross_entropy": 3 * super().loss_labels(*arguments)["loss_cross_entropy"]}

    class FirstQueries(nn.Module):
        def forward(self, masks_queries_logits: Tensor, class_queries_logits: Tensor, mask_labels: Any,
                    class_labels: Any) -> Any:
            return [(torch.arange(len(labels)), torch.arange(len(labels))) for labels in class_labels]

    loss, expected = MaskClassificationLoss(**SETTINGS), both(masks, targets, classes)[1]
    if part == "subclass":
        loss = Extended(**SETTINGS)
    elif part == "instance":
        loss.loss_labels = lambda *_: {"loss_cross_entropy": 3 * expected["loss_cross_entropy"]}
    elif part == "matcher":
        loss.matcher = FirstQueries()  # type: ignore[assignment]
    else:
        loss.sample_points_using_uncertainty = lambda logits, *_: torch.zeros(  # type: ignore[method-assign]
            len(logits), 48, 2)
    torch.manual_seed(0)
    found = loss(masks, targets, classes)
    if part in ("subclass", "instance"):
        torch.testing.assert_close(found["loss_cross_entropy"], 3 * expected["loss_cross_entropy"])
        torch.testing.assert_close(found["loss_mask"], expected["loss_mask"])
    else:
        assert not torch.isclose(found["loss_mask"], expected["loss_mask"])
    loss.ignore = "exclude"
    with pytest.raises(ValueError, match="ignore is 'exclude' but a part of the loss is replaced"):
        loss(masks, targets, classes)


def test_coefficients_that_change_while_training_take_effect() -> None:
    masks, targets, classes = dense_case([2], queries=5)
    loss = MaskClassificationLoss(**SETTINGS)
    before = loss.step({"pred_masks": masks, "pred_logits": classes}, targets, generator=seeded())
    loss.class_coefficient = 0.0
    after = loss.step({"pred_masks": masks, "pred_logits": classes}, targets, generator=seeded())
    torch.testing.assert_close(before.total - after.total, 2.0 * before.losses["loss_cross_entropy"])


def test_a_loss_of_nothing_is_refused() -> None:
    """Like the original's, the matcher then has no cost to compare; a configuration is refused earlier."""
    nothing = [f"loss.{name}_coefficient=0" for name in ("mask", "dice", "class")]
    with pytest.raises(ConfigError, match="class_coefficient are all 0, legal: at least one above 0"):
        load_run_config(None, nothing)
    assert load_run_config(None, nothing[:2]).loss.class_coefficient == 2.0


# -- loss_total -----------------------------------------------------------------------------------------------------


def test_loss_total_logs_as_a_lightning_module_wants_it() -> None:
    logged: list[tuple[str, float, dict[str, bool]]] = []

    def log_fn(name: str, value: Tensor, **options: bool) -> None:
        logged.append((name, float(value), options))

    loss = MaskClassificationLoss(**SETTINGS | {"mask_coefficient": 2.0, "dice_coefficient": 3.0,
                                                "class_coefficient": 4.0})
    losses = {"loss_mask": torch.tensor(1.0), "loss_dice_block_-3": torch.tensor(10.0),
              "aux_loss_dice": torch.tensor(1000.0), "loss_cross_entropy_8": torch.tensor(100.0)}
    total = loss.loss_total(losses, log_fn)
    assert total is not None and float(total) == 2.0 + 30.0 + 3000.0 + 400.0
    assert logged == [
        ("losses/train_loss_mask", 1.0, {"sync_dist": True}),
        ("losses/train_loss_dice_block_-3", 10.0, {"sync_dist": True}),
        ("losses/train_aux_loss_dice", 1000.0, {"sync_dist": True}),
        ("losses/train_loss_cross_entropy_8", 100.0, {"sync_dist": True}),
        ("losses/train_loss_total", 3432.0, {"sync_dist": True, "prog_bar": True}),
    ]
    with pytest.raises(ValueError, match=r"loss .loss_boxes. has no coefficient, legal: .*mask, dice or cross_entropy"):
        loss.loss_total({"loss_boxes": torch.tensor(1.0)}, ignore_log)


def test_the_total_of_no_losses_is_none() -> None:
    assert MaskClassificationLoss(**SETTINGS).loss_total({}, ignore_log) is None


# -- targets --------------------------------------------------------------------------------------------------------


def test_other_entries_of_a_target_are_left_alone() -> None:
    masks, targets, classes = dense_case([3, 2], queries=5)
    strange: Targets = [{**target, "is_crowd": [False], "file_name": "a.jpg", "area": None} for target in targets]
    plain, _ = both(masks, targets, classes)
    for values in (both(masks, strange, classes)[0],
                   MaskClassificationLoss(**SETTINGS).step({"pred_masks": masks, "pred_logits": classes}, strange,
                                                           generator=seeded()).losses):
        assert all(value.isfinite() for value in values.values())
    assert all(torch.equal(value, both(masks, strange, classes)[0][name]) for name, value in plain.items())


def soft_targets(counts: Sequence[int], sizes: Sequence[tuple[int, int]]) -> Targets:
    return [{"masks": torch.rand(count, *size, generator=seeded(count)),
             "labels": torch.randint(0, CLASSES, (count,), generator=seeded(count))}
            for count, size in zip(counts, sizes, strict=True)]


@pytest.mark.parametrize("counts", [[3, 5], [2, 0], [9, 1], [0, 0]], ids=str)
@pytest.mark.parametrize("sizes", [((24, 32), (24, 32)), ((24, 32), (40, 17)), ((6, 8), (3, 3))], ids=str)
def test_soft_masks_and_images_of_different_sizes_count_as_they_do_in_the_original(
        counts: list[int], sizes: tuple[tuple[int, int], tuple[int, int]]) -> None:
    outputs = outputs_of(2, 7, (6, 8), layers=1)
    ours, expected = both(outputs["pred_masks"], soft_targets(counts, sizes), outputs["pred_logits"])
    assert_same(ours, expected, [outputs["pred_masks"], outputs["pred_logits"]])


@pytest.mark.parametrize("ignore", ["background", "exclude"])
@pytest.mark.parametrize("sizes", [((24, 32), (24, 32)), ((24, 32), (40, 17))], ids=str)
def test_a_step_takes_soft_masks_and_different_sizes_as_forward_does(
        ignore: str, sizes: tuple[tuple[int, int], tuple[int, int]]) -> None:
    outputs, targets = outputs_of(2, 7, (6, 8), layers=1), soft_targets([3, 5], sizes)
    for target in targets:
        target["masks"][:, :4] = 0
    loss = MaskClassificationLoss(**SETTINGS, ignore=ignore)
    torch.manual_seed(0)
    single = loss(outputs["pred_masks"], targets, outputs["pred_logits"])
    torch.manual_seed(0)
    for name, value in loss.step(outputs, targets).losses.items():
        torch.testing.assert_close(value, single[name].detach(), rtol=1e-6, atol=1e-7)


def test_half_a_mask_is_not_a_whole_one() -> None:
    """Negative control of the above: masks of 0.5 do not cost the same as masks of 1."""
    masks, targets, classes = dense_case([3], queries=5)
    half: Targets = [{**targets[0], "masks": targets[0]["masks"] * 0.5}]
    whole, _ = both(masks, targets, classes)
    assert not torch.isclose(both(masks, half, classes)[0]["loss_mask"], whole["loss_mask"])


@pytest.mark.parametrize("exclude", [False, True])
def test_hard_masks_read_softly_are_the_same_bits(exclude: bool) -> None:
    maps = targets_of([4, 9], (13, 21))
    hard = pack_targets(maps, CPU, exclude_ignored=exclude)
    soft = pack_targets([{**to_dense(target), "masks": to_dense(target)["masks"].float()} for target in maps], CPU,
                        exclude_ignored=exclude)
    assert isinstance(soft, SoftTargets)
    points, images = torch.rand(2, 500, 2, generator=seeded()), torch.tensor([1, 0])
    points[0, :4] = torch.tensor([[0.0, 0.0], [1.0, 1.0], [1.0, 0.0], [0.5, 0.0]])
    chosen = torch.tensor([7, 2])
    assert torch.equal(soft.at_points(points), hard.at_points(points))
    assert torch.equal(soft.at_matched_points(images, chosen, points), hard.at_matched_points(images, chosen, points))
    if exclude:
        for one, other in ((soft.counted_at_points(points), hard.counted_at_points(points)),
                           (soft.counted(images, points), hard.counted(images, points))):
            assert one is not None and other is not None and torch.equal(one, other)


@pytest.mark.parametrize(("change", "error", "message"), [
    (lambda masks, targets: masks.detach()[0, 0].fill_(torch.nan), NonFiniteLossError, "the final prediction"),
    (lambda masks, targets: targets[0]["labels"].fill_(CLASSES), ValueError, f"legal: 0 to {CLASSES - 1}"),
])
def test_what_the_original_hides_is_refused(change: Callable[..., Any], error: type[Exception], message: str) -> None:
    masks, targets, classes = dense_case([3], queries=5)
    change(masks, targets)
    with pytest.raises(error, match=message):
        MaskClassificationLoss(**SETTINGS)(masks, targets, classes)
    with pytest.raises(ValueError, match="class_queries_logits is None"):
        MaskClassificationLoss(**SETTINGS)(masks, targets)


# -- ranks ----------------------------------------------------------------------------------------------------------


def _on_rank(rank: int, store: str, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    masks, targets, classes = dense_case(([9, 2], [1, 0])[rank], queries=3)
    torch.manual_seed(rank)
    losses = MaskClassificationLoss(**SETTINGS)(masks, targets, classes)
    torch.manual_seed(rank)
    parts = MaskClassificationLoss(**SETTINGS)
    parts.loss_labels = lambda *_: {}
    by_parts = parts(masks, targets, classes)
    torch.save([(value.detach(), by_parts[name].detach()) for name, value in losses.items() if name in by_parts],
               f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_divide_by_the_mean_of_what_they_matched(tmp_path: Any) -> None:
    call_on_ranks(_on_rank, str(tmp_path / "store"), str(tmp_path))
    for rank, (counts, matched) in enumerate((([9, 2], 5), ([1, 0], 1))):
        masks, targets, classes = dense_case(counts, queries=3)
        torch.manual_seed(rank)
        alone = expected_losses(masks, targets, classes)
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, pair in zip(("loss_mask", "loss_dice"), found, strict=True):
            for value in pair:
                torch.testing.assert_close(value, alone[name].detach() * matched / 3.0, rtol=2e-5, atol=2e-6)


def test_cross_entropy_of_matched_queries_is_the_weighted_mean() -> None:
    """An independent slow computation: every query has a class, and "no object" weighs a tenth."""
    masks, targets, classes = dense_case([2], queries=5)
    loss = MaskClassificationLoss(**SETTINGS)
    torch.manual_seed(0)
    ((queries, chosen),) = loss.matcher(masks, classes, [targets[0]["masks"].float()], [targets[0]["labels"]])
    torch.manual_seed(0)
    found = loss(masks, targets, classes)["loss_cross_entropy"]
    wanted = torch.full((5,), CLASSES)
    wanted[queries] = targets[0]["labels"][chosen]
    weights = torch.where(wanted == CLASSES, 0.1, 1.0)
    losses = F.cross_entropy(classes[0], wanted, reduction="none")
    torch.testing.assert_close(found, (weights * losses).sum() / weights.sum())
