"""Evaluate a model on whole labelled images: each exactly once, over any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from shards.errors import RunError
from shards.manifest import ClassInfo
from shards.picture import contact_sheet, overlay
from shards.plan import validation_groups
from trainer.config import RunConfig
from trainer.data.loader import validation_loader
from trainer.data.whole_images import LabelledImage, ValidationImages
from trainer.distributed import DistContext
from trainer.evaluation.counts import Counts
from trainer.evaluation.image_scores import ImageScores
from trainer.evaluation.journal import CountedImage, Journal, JournalGroup
from trainer.evaluation.predictor import Predictor
from trainer.models import Segmenter

Group = JournalGroup | list[CountedImage]


class Evaluation(NamedTuple):
    """Metrics over the images of all ranks, and pictures and scores of this rank's images."""

    metrics: dict[str, Any]  # Counts.summary(), "baseline_mIoU" and "confused_pairs"
    panels: Image.Image | None  # of the first images
    scores: ImageScores


class EvaluationStopped(Exception):
    """A rank was asked to stop. Raised on every rank."""


def evaluate(
    model: Segmenter, images: ValidationImages, config: RunConfig, context: DistContext, limit: int | None = None,
    should_continue: Callable[[], bool] = lambda: True, *, panels: int = 0, journal: Journal | None = None,
) -> Evaluation:
    """Evaluate every image exactly once over all ranks; counts are all-reduced once, after the loop.

    `limit` is the number of images, from the first on; `panels`, of how many this rank draws. With a `journal`, images
    that an interrupted evaluation has counted are not evaluated again. The model's training mode is restored
    afterwards. `should_continue` is called after each group of images; if it returns False on one rank,
    EvaluationStopped is raised on all ranks. Raises what reading an image raises, and RunError when one is missing.
    """
    was_training = model.training
    model.eval()
    total = len(images) if limit is None else min(limit, len(images))
    counts = Counts(len(images.classes), images.ignore_index, context.device)
    scores, drawn = ImageScores(images.split), _Panels(images.classes, panels)
    groups = validation_groups(total, config.eval.window_batch)
    done = _read_journal(journal, counts, context)
    mine = _unfinished(groups, done, context)[context.rank :: context.world_size]
    stopped = False
    context.beat("evaluation")
    with tqdm(total=sum(map(len, mine)), desc="evaluating", unit="img", leave=False,
              disable=None if context.is_main else True) as bar:
        finished: Iterable[Group] = _evaluate_groups(model, images, config, context, mine, drawn, journal)
        for counted in chain[Group](done.values(), finished):
            for image in counted:
                counts.merge(image.counts)
                scores.add(*image)
            context.beat("evaluation")
            bar.update(len(counted))
            stopped = not should_continue()
            if stopped:
                break
    model.train(was_training)
    if context.all_reduce_sum(torch.tensor(float(stopped), device=context.device)) > 0:
        raise EvaluationStopped
    counts.all_reduce()
    if int(counts.images) != total:
        raise RunError(f"{int(counts.images)} images were evaluated, expected {total}")
    confusion = counts.confusion
    metrics = {**counts.summary(absent_as_zero=config.eval.reference == "eomt"),
               "baseline_mIoU": confusion.most_frequent_class_miou(),
               "confused_pairs": [pair._asdict() for pair in confusion.confused_pairs()]}
    return Evaluation(metrics, drawn.sheet(), scores)


def _read_journal(journal: Journal | None, counts: Counts, context: DistContext) -> dict[int, JournalGroup]:
    """The finished groups by first number. Only rank 0 reads and counts them: another may not see the same files."""
    return journal.read(counts) if journal is not None and context.is_main else {}


def _unfinished(groups: Sequence[range], done: Iterable[int], context: DistContext) -> list[range]:
    """The groups that rank 0 does not have, on all ranks."""
    flags = torch.zeros(len(groups), device=context.device)
    finished = set(done)
    for number, group in enumerate(groups):
        flags[number] = float(group.start in finished)
    return [group for group, flag in zip(groups, context.all_reduce_sum(flags).tolist(), strict=True) if not flag]


def _evaluate_groups(model: Segmenter, images: ValidationImages, config: RunConfig, context: DistContext,
                     groups: Sequence[range], drawn: _Panels, journal: Journal | None) -> Iterator[list[CountedImage]]:
    predict = Predictor(model, config, len(images.classes), context.device)
    loader = validation_loader(images, [number for group in groups for number in group], context.device)
    for group in groups:
        items = list(islice(loader, len(group)))
        counted = []
        for item, found in zip(items, predict.segment([item.image for item in items], "confidence"), strict=True):
            context.beat("evaluation")
            counts = Counts(len(images.classes), images.ignore_index, context.device)
            counts.add_image(item.label_map, found.label_map, found.confidence)
            counted.append(CountedImage(item.number, item.key, counts))
            drawn.add(item, found.label_map)
        if journal is not None:
            journal.add(context.rank, group.start, counted)
        yield counted
    next(loader, None)  # the loader's own end, where it checks that nothing is left


class _Panels:
    """Pictures of the first images: image, truth, prediction."""

    def __init__(self, classes: Sequence[ClassInfo], count: int) -> None:
        self.classes, self.count = classes, count
        self.rows: list[list[Any]] = []
        self.captions: list[str] = []

    def add(self, item: LabelledImage, prediction: Tensor) -> None:
        if len(self.rows) < self.count:
            self.rows.append(panel_row(item, prediction.cpu(), self.classes))
            self.captions.append(f"{item.key}: image, truth, prediction")

    def sheet(self) -> Image.Image | None:
        return contact_sheet(self.rows, self.captions) if self.rows else None


def panel_row(item: LabelledImage, prediction: Tensor, classes: Sequence[ClassInfo]) -> list[Any]:
    """[image, truth over image (unlabelled pixels stay uncoloured), prediction over image]."""
    colors = [info.color for info in classes]
    image = item.image.permute(1, 2, 0).numpy()
    truth = item.label_map.numpy()
    return [image, overlay(image, truth, colors), overlay(image, prediction.numpy(), colors)]


def format_metrics(metrics: dict[str, Any], classes: Sequence[ClassInfo]) -> str:
    """Metrics as printed: the means, the baseline, and the IoU of every class that occurs."""
    means = "  ".join(f"{name} {metrics[name]:.4f}" for name in ("mIoU", "aAcc", "mAcc", "fwIoU", "mBoundaryIoU",
                                                                 "ECE"))
    lines = [f"{means}  (predicting the most frequent class everywhere: mIoU {metrics['baseline_mIoU']:.4f})"]
    rows = [(info.name, iou) for info, iou in zip(classes, metrics["per_class_iou"], strict=True) if iou == iou]
    lines += [f"  {name:30s} {iou:.4f}" for name, iou in rows]
    return "\n".join(lines)
