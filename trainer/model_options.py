"""Command-line options that select a trained model. Imports torch only when opening it, to keep --help fast."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from shards.class_list import parse_classes
from shards.cli.recipes import file_or_recipe
from shards.errors import ConfigError, StorageError
from shards.files.plain_file import read_plain_text
from trainer.config import load_run_config

if TYPE_CHECKING:
    from trainer.pretrained import Pretrained


def add_checkpoint_options(parser: argparse.ArgumentParser) -> None:
    """Add --checkpoint and --set, and --config and --classes for weights of other programs."""
    parser.add_argument("--checkpoint", required=True, help="checkpoint file, e.g. <run>/checkpoints/best.pt, or a "
                        "directory written by trainer/export.py")
    parser.add_argument("--set", action="append", default=[], metavar="key=value", dest="overrides",
                        help="override a setting of the run, e.g. --set eval.tta_flip=true (repeatable; default: as "
                        "trained; trainer/eval.py --help lists all settings)")
    parser.add_argument("--config", action="append", metavar="FILE", dest="configs", help="only for weights of other "
                        "programs: YAML file or recipe with the network's settings (repeatable; later ones override "
                        "earlier ones)")
    parser.add_argument("--classes", help="only for weights of other programs: text file with one class name per line, "
                        "in id order, e.g. preprocess/layouts/tables/ade20k.txt")


def open_pretrained(arguments: argparse.Namespace, *, for_export: bool = False) -> Pretrained:
    """Open the model that the options select; `for_export` as in `load_pretrained`. Raises ConfigError if it cannot be
    loaded or the options do not fit."""
    from trainer.distributed import pick_device
    from trainer.models.weights import WeightsFile
    from trainer.pretrained import from_external_weights, load_pretrained
    from trainer.run.checkpoint import open_checkpoint

    source = open_checkpoint(arguments.checkpoint)
    if not isinstance(source, WeightsFile) or source.is_self_contained:
        if arguments.configs is not None or arguments.classes is not None:
            raise ConfigError(f"{arguments.checkpoint} contains its own settings and classes; leave out --config and "
                              "--classes, and change settings with --set")
        pretrained = load_pretrained(source, overrides=arguments.overrides, for_export=for_export)
        if pretrained.weights is not None:
            print(f"{arguments.checkpoint}: {pretrained.weights} weights of step {pretrained.step} (eval.weights)")
        return pretrained
    if arguments.configs is None or arguments.classes is None:
        raise ConfigError(f"{arguments.checkpoint} contains only weights; also give --config, a YAML file with the "
                          "network's sizes, and --classes, a text file with one class name per line")
    try:
        text = read_plain_text(arguments.classes)
    except (OSError, StorageError, UnicodeDecodeError) as error:
        raise ConfigError(f"--classes {arguments.classes} cannot be read: {error}") from error
    config = load_run_config([file_or_recipe(given) for given in arguments.configs], arguments.overrides)
    return from_external_weights(source, config, parse_classes(text, arguments.classes), pick_device(config.device),
                                 for_export=for_export)
