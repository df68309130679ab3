"""The options that name a trained model. Imports torch only when opening it, so that --help need not wait."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from shards.class_list import parse_classes
from shards.cli.recipes import file_or_recipe
from shards.errors import ConfigError
from trainer.config import load_run_config

if TYPE_CHECKING:
    from trainer.pretrained import Pretrained


def add_checkpoint_options(parser: argparse.ArgumentParser) -> None:
    """--checkpoint, --set, and what another program's weights need besides: --config and --classes."""
    parser.add_argument("--checkpoint", required=True, help="checkpoint file, e.g. <run>/checkpoints/best.pt, or a "
                        "directory that trainer/export.py wrote")
    parser.add_argument("--set", action="append", default=[], metavar="key=value", dest="overrides",
                        help="change a setting of the run, e.g. --set eval.tta_flip=true (repeatable; settings as in "
                        "trainer/eval.py --help; default: as trained)")
    parser.add_argument("--config", action="append", metavar="FILE", dest="configs", help="another program's weights "
                        "only: YAML file, or recipe, of settings with the network's sizes (repeatable: laid over one "
                        "another)")
    parser.add_argument("--classes", help="another program's weights only: text file with one class name per line, in "
                        "id order, e.g. preprocess/ade20k_classes.txt")


def open_pretrained(arguments: argparse.Namespace) -> Pretrained:
    """What the options name. Raises ConfigError when it cannot be had or the options do not suit it."""
    from trainer.distributed import pick_device
    from trainer.models.weights import WeightsFile
    from trainer.pretrained import from_external_weights, load_pretrained
    from trainer.run.checkpoint import open_checkpoint

    found = open_checkpoint(arguments.checkpoint)
    if not isinstance(found, WeightsFile) or found.is_self_contained:
        if arguments.configs is not None or arguments.classes is not None:
            raise ConfigError(f"{arguments.checkpoint} brings its own settings and classes; leave out --config and "
                              "--classes, change settings with --set")
        return load_pretrained(found, overrides=arguments.overrides)
    if arguments.configs is None or arguments.classes is None:
        raise ConfigError(f"{arguments.checkpoint} holds weights only; also give --config, a YAML file with the "
                          "network's sizes, and --classes, a text file with one class name per line")
    try:
        text = Path(arguments.classes).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--classes {arguments.classes} cannot be read: {error}") from error
    config = load_run_config([file_or_recipe(given) for given in arguments.configs], arguments.overrides)
    return from_external_weights(found, config, parse_classes(text, arguments.classes), pick_device(config.device))
