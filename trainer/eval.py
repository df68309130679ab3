"""Evaluate a checkpoint on the validation split: mIoU, with sliding windows and test-time augmentation as configured.

example: python trainer/eval.py --config runs/ade20k-m2f/config.yaml --checkpoint runs/ade20k-m2f/checkpoints/best.pt
The network is the checkpoint's own; `data`, `eval` and `device` come from the configuration, and so does
`backbone.source`, as the ViT may have moved since. A file of another program, such as Meta's Mask2Former or linear
head, contains only weights: then all settings come from the configuration, and the classes from the shard set.
Killed, it goes on with what is done when the same command is given again, with any number of processes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    from shards.cli.command_line import add_overrides, config_files, config_parser, run_entry_point
    from shards.errors import ConfigError
    from shards.files.storage import local_path, output_folder
    from shards.manifest import hash_of
    from trainer.config import RunConfig, load_run_config
    from trainer.evaluation.record import metrics_record, usual_folder
    from trainer.stopping import die_with_launcher
except ImportError as error:
    raise SystemExit(f"error: {error}; is MaskStream installed (pip install -e .), or does another package named "
                     "shards or trainer shadow it?") from None

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from shards.manifest import ClassInfo
    from trainer.config import EvalConfig
    from trainer.data.whole_images import ValidationImages
    from trainer.distributed import DistContext
    from trainer.pretrained import Pretrained

DEFAULT_RECIPE = "config-ade20k-m2f-inference"


def main() -> int:
    die_with_launcher()
    parser = config_parser(str(__doc__), RunConfig, DEFAULT_RECIPE)
    parser.add_argument("--checkpoint", required=True, help="checkpoint file, e.g. <run>/checkpoints/best.pt, or "
                        "another program's head")
    parser.add_argument("--output", default=None, help="folder for metrics and pictures "
                        "(default: evaluation/ in the folder of the run or export; for a hub id there is none)")
    parser.add_argument("--images", help="evaluate on a folder of images instead of data.root")
    parser.add_argument("--labels", help="folder of their label maps, at the same paths below it: PNGs of "
                        "class ids, 255 where unlabelled")
    parser.add_argument("--reduce-zero-label", action="store_true", help="label maps hold ids from 1, and 0 where "
                        "unlabelled, like ADE20K's")
    add_overrides(parser)
    arguments = parser.parse_intermixed_args()
    config = load_run_config(config_files(arguments), arguments.overrides)
    checkpoint_path = Path(arguments.checkpoint)
    if arguments.output is None and not checkpoint_path.exists():
        raise ConfigError(f"--checkpoint {checkpoint_path} does not exist here; if it is an id on the hub, also give "
                          "--output, a folder for the results")
    output = output_folder(str(usual_folder(checkpoint_path)) if arguments.output is None else arguments.output,
                           "--output")
    if (arguments.images is None) != (arguments.labels is None):
        raise ConfigError("--images and --labels belong together; give both or neither")
    if arguments.reduce_zero_label and arguments.images is None:
        raise ConfigError("--reduce-zero-label is for --images and --labels; in shards the labels are already mapped")
    if config.data.root is None and arguments.images is None:
        raise ConfigError("data.root is not set. Try for example: python trainer/eval.py "
                          f"--checkpoint {checkpoint_path} data.root=<folder of shards>")
    return _evaluate(config, checkpoint_path, output, arguments)


def _evaluate(config: RunConfig, checkpoint_path: Path, output: Path, arguments: argparse.Namespace) -> int:
    from trainer.distributed import distributed
    from trainer.evaluation.evaluation import evaluate, format_metrics
    from trainer.evaluation.journal import Journal
    from trainer.evaluation.predictor import Predictor
    from trainer.evaluation.results import write_pictures, write_results
    from trainer.pretrained import model_identity
    from trainer.run.failures import explain_lost_rank, place_of

    with distributed(config.device, config.train.hang_timeout) as context, explain_lost_rank(
            lambda: place_of(context), "The same command goes on with what is done"):
        pretrained, images = _model_and_images(config, checkpoint_path, arguments, context)
        settings, model = pretrained.config, model_identity(pretrained)
        journal = Journal(output, evaluation_identity(model, settings.eval, images, context.device))
        result = evaluate(pretrained.model, images, settings, context, config.eval.max_images, journal=journal)
        scored = result.scores.gather(context, len(images.classes))
        if context.is_main:
            kind = {} if pretrained.weights is None else {"weights": pretrained.weights}
            predictor = Predictor(pretrained.model, settings, len(images.classes), context.device)

            def predict(image: Tensor) -> Tensor:
                context.beat("evaluation")
                return predictor(image)

            context.beat("evaluation")
            record = kind | metrics_record(result.metrics, model=model, split=images.split, step=pretrained.step,
                                    is_folder=arguments.images is not None, checkpoint=checkpoint_path)
            names = write_results(output, record, scored, images.classes, settings.eval.reference == "eomt")
            names += write_pictures(output, record, scored, images, predict, settings.eval.panels)
            print(format_metrics(result.metrics, images.classes))
            if kind:
                print(f"these are the {pretrained.weights} weights of step {pretrained.step} (eval.weights)")
            print(f"{', '.join(names)} written to {output}")
            journal.remove()
    return 0


def _model_and_images(config: RunConfig, checkpoint_path: Path, arguments: argparse.Namespace,
                      context: DistContext) -> tuple[Pretrained, ValidationImages]:
    """The model, with the settings to evaluate it by, and the images, with equal class tables."""
    from trainer.data.crops import open_reader
    from trainer.data.whole_images import FolderImages, WholeImages
    from trainer.models.weights import WeightsFile
    from trainer.pretrained import from_external_weights, load_pretrained
    from trainer.run.checkpoint import open_checkpoint

    source = open_checkpoint(checkpoint_path)
    reader = open_reader(config.data, config.data.val_split) if arguments.images is None else None
    if isinstance(source, WeightsFile) and not source.is_self_contained:
        if reader is None:
            raise ConfigError(f"{checkpoint_path} contains only weights, and a folder of images has no class names; "
                              "evaluate on shards (data.root), or export it first (trainer/export.py --classes)")
        pretrained = from_external_weights(source, config, reader.manifest.classes, context.device)
    else:
        pretrained = load_pretrained(source, overrides=[f"eval.weights={config.eval.weights}"],
                                     backbone_source=config.backbone.source, device=context.device)
        pretrained = replace(pretrained, config=replace(pretrained.config, data=config.data, eval=config.eval))
    if reader is None:
        folders = (local_path(arguments.images, "--images"), local_path(arguments.labels, "--labels"))
        return pretrained, FolderImages(*folders, pretrained.classes, config.data, arguments.reduce_zero_label)
    if pretrained.classes != (stored := list(reader.manifest.classes)):
        raise ConfigError(f"{config.data.root} and {checkpoint_path} have different class tables ({len(stored)} and "
                          f"{len(pretrained.classes)} classes): {_first_difference(stored, pretrained.classes)}")
    return pretrained, WholeImages(reader, config.data)


def _first_difference(ours: Sequence[ClassInfo], theirs: Sequence[ClassInfo]) -> str:
    """Where two class tables that are not equal differ."""
    for number, pair in enumerate(zip_longest(ours, theirs)):
        if pair[0] != pair[1]:
            names = ["none" if info is None else f"{info.name!r} of colour {info.color}" for info in pair]
            return f"class {number} is {names[0]} and {names[1]}"
    raise AssertionError("the class tables are equal")


def evaluation_identity(model: dict[str, Any], settings: EvalConfig, images: ValidationImages,
                        device: torch.device) -> str:
    """Hex sha256 of what determines the counts of an evaluation: the model's identity, settings, images and device."""
    import torch

    return hash_of({**model, "window_batch": settings.window_batch, "limit": settings.max_images,
                    "images": images.identity, "split": images.split, "device": device.type,
                    "torch": torch.__version__})


if __name__ == "__main__":
    run_entry_point(main)
