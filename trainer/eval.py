"""Evaluate a checkpoint on the validation split: mIoU, with sliding windows and test-time augmentation as configured.

example: python trainer/eval.py --config runs/ade20k-m2f/config.yaml --checkpoint runs/ade20k-m2f/checkpoints/best.pt
The network is the checkpoint's own; `data`, `eval` and `device` come from the configuration, and so does
`backbone.source`, as the ViT may have moved since. A file of another program, such as Meta's Mask2Former or linear
head, contains only weights: then all settings come from the configuration, and the classes from the shard set.
Killed, it goes on with what is done when the same command is given again, with any number of processes.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

try:
    from shards.cli.command_line import add_overrides, config_files, config_parser, run_entry_point
    from shards.errors import ConfigError
    from shards.files.storage import local_path
    from shards.manifest import hash_of
    from trainer.config import RunConfig, load_run_config
    from trainer.stopping import die_with_launcher
except ImportError as error:
    raise SystemExit(f"error: {error}; is MaskStream installed (pip install -e .), or does another package named "
                     "shards or trainer shadow it?") from None

if TYPE_CHECKING:
    import torch

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
                        "(default: evaluation/ in the folder of the run or export)")
    parser.add_argument("--images", help="evaluate on a folder of images instead of data.root")
    parser.add_argument("--labels", help="folder of their label maps, at the same paths below it: PNGs of "
                        "class ids, 255 where unlabelled")
    parser.add_argument("--reduce-zero-label", action="store_true", help="label maps hold ids from 1, and 0 where "
                        "unlabelled, like ADE20K's")
    add_overrides(parser)
    arguments = parser.parse_intermixed_args()
    config = load_run_config(config_files(arguments), arguments.overrides)
    checkpoint_path = Path(arguments.checkpoint)
    folder = checkpoint_path if checkpoint_path.is_dir() else checkpoint_path.parent.parent
    output = folder / "evaluation" if arguments.output is None else local_path(arguments.output, "--output")
    if output.exists() and not output.is_dir():
        raise ConfigError(f"--output {output} is a file, legal: a folder")
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
    from trainer.evaluation.results import draw_extremes, save_panels, write_results

    with distributed(config.device, config.train.hang_timeout) as context:
        pretrained, images = _model_and_images(config, checkpoint_path, arguments, context)
        settings = pretrained.config
        journal = Journal(output, evaluation_identity(pretrained, images, context.device))
        result = evaluate(pretrained.model, images, settings, context, config.eval.max_images, journal=journal)
        scored = result.scores.gather(context, len(images.classes))
        if context.is_main:
            kind = {} if pretrained.weights is None else {"weights": pretrained.weights}
            record = {**result.metrics, "step": pretrained.step, "checkpoint": str(checkpoint_path), **kind}
            names = write_results(output, record, scored, images.classes, settings.eval.reference == "eomt")
            predict = Predictor(pretrained.model, settings, len(images.classes), context.device)
            panels = draw_extremes(scored, images, predict, config.eval.panels)
            if panels is not None:
                save_panels(panels, output)
                names.append("panels.png")
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
    if pretrained.classes != list(reader.manifest.classes):
        raise ConfigError(f"{config.data.root} and {checkpoint_path} have different class tables "
                          f"({reader.manifest.num_classes} and {len(pretrained.classes)} classes)")
    return pretrained, WholeImages(reader, config.data)


def evaluation_identity(pretrained: Pretrained, images: ValidationImages, device: torch.device) -> str:
    """Hex sha256 of what determines the counts of an evaluation: weights, settings, images, device and precision."""
    import torch

    from trainer.pretrained import model_identity

    settings = pretrained.config.eval
    return hash_of({**model_identity(pretrained), "window_batch": settings.window_batch, "limit": settings.max_images,
                    "images": images.identity, "split": images.split, "device": device.type,
                    "torch": torch.__version__})


if __name__ == "__main__":
    run_entry_point(main)
