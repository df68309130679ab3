"""Evaluate a model on the validation split of a shard set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from shards.manifest import ClassInfo
from shards.picture import contact_sheet, overlay
from shards.plan import validation_samples
from shards.reader import ShardReader
from trainer.config import RunConfig
from trainer.data.crops import LabelledImage, WholeImages
from trainer.data.loader import validation_loader
from trainer.distributed import DistContext
from trainer.evaluation.image_scores import ImageScores
from trainer.evaluation.metrics import ConfusionMatrix
from trainer.evaluation.predictor import Predictor
from trainer.models import Segmenter


class Evaluation(NamedTuple):
    """Metrics over the images of all ranks, and pictures and scores of this rank's images."""

    metrics: dict[str, Any]  # ConfusionMatrix.summary(), "baseline_mIoU" and "confused_pairs"
    panels: Image.Image | None  # of the first images
    scores: ImageScores


class EvaluationStopped(Exception):
    """A rank was asked to stop. Raised on every rank."""


def evaluate(
    model: Segmenter, reader: ShardReader, config: RunConfig, context: DistContext, images: int | None = None,
    should_continue: Callable[[], bool] = lambda: True,
) -> Evaluation:
    """Evaluate every image exactly once over all ranks; pixel counts are all-reduced once, after the loop.

    `images` limits the number of images. The model's training mode is restored afterwards. `should_continue` is called
    before each image; if it returns False on one rank, EvaluationStopped is raised on all ranks.
    """
    manifest, was_training = reader.manifest, model.training
    model.eval()
    predict = Predictor(model, config, manifest.num_classes, context.device)
    total = len(reader) if images is None else min(images, len(reader))
    numbers = validation_samples(total, context.rank, context.world_size)
    confusion = ConfusionMatrix(manifest.num_classes, manifest.ignore_index, context.device)
    scores = ImageScores(reader.split)
    rows: list[list[Any]] = []
    captions: list[str] = []
    loader = validation_loader(WholeImages(reader, config.data), numbers, context.device)
    stopped = False
    context.beat("evaluation")
    for item in tqdm(loader, total=len(numbers), desc="evaluating", unit="img", leave=False,
                     disable=None if context.is_main else True):
        context.beat("evaluation")
        stopped = not should_continue()
        if stopped:
            break
        prediction = predict(item.image)
        image = ConfusionMatrix(manifest.num_classes, manifest.ignore_index, context.device)
        image.update(prediction, item.label_map)
        confusion.merge(image)
        scores.add(item.number, item.key, image)
        if len(rows) < config.eval.panels:
            rows.append(panel_row(item, prediction.cpu(), manifest.classes))
            captions.append(f"{item.key}: image, truth, prediction")
    model.train(was_training)
    if context.all_reduce_sum(torch.tensor(float(stopped), device=context.device)) > 0:
        raise EvaluationStopped
    confusion.all_reduce()
    metrics = {**confusion.summary(absent_as_zero=config.eval.reference == "eomt"),
               "baseline_mIoU": confusion.most_frequent_class_miou(),
               "confused_pairs": [pair._asdict() for pair in confusion.confused_pairs()]}
    return Evaluation(metrics, contact_sheet(rows, captions) if rows else None, scores)


def panel_row(item: LabelledImage, prediction: Tensor, classes: Sequence[ClassInfo]) -> list[Any]:
    """[image, truth over image (unlabelled pixels stay uncoloured), prediction over image]."""
    colors = [info.color for info in classes]
    image = item.image.permute(1, 2, 0).numpy()
    truth = item.label_map.numpy()
    return [image, overlay(image, truth, colors), overlay(image, prediction.numpy(), colors)]


def format_metrics(metrics: dict[str, Any], classes: Sequence[ClassInfo]) -> str:
    """Metrics as printed: the means, the baseline, and the IoU of every class that occurs."""
    means = "  ".join(f"{name} {metrics[name]:.4f}" for name in ("mIoU", "aAcc", "mAcc"))
    lines = [f"{means}  (predicting the most frequent class everywhere: mIoU {metrics['baseline_mIoU']:.4f})"]
    rows = [(info.name, iou) for info, iou in zip(classes, metrics["per_class_iou"], strict=True) if iou == iou]
    lines += [f"  {name:30s} {iou:.4f}" for name, iou in rows]
    return "\n".join(lines)
