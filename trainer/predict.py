"""Predict images with a trained checkpoint: a PNG of class ids and an overlay picture for each.

example: python trainer/predict.py --checkpoint runs/ade20k-m2f/checkpoints/best.pt --output out photo.jpg
A head that another program saved (Meta's Mask2Former or linear head) brings weights only: add --config and --classes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from tqdm import tqdm

from shards.class_list import parse_classes
from shards.command_line import run_entry_point
from shards.config_file import override_config
from shards.errors import ConfigError
from shards.manifest import ClassInfo
from trainer.config import RunConfig, load_run_config


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="checkpoint file, e.g. <run>/checkpoints/best.pt")
    parser.add_argument("--output", required=True, help="folder for <name>.png (class ids) and <name>-overlay.png")
    parser.add_argument("--set", action="append", default=[], metavar="key=value", dest="overrides",
                        help="change a setting of the run, e.g. --set eval.tta_flip=true (repeatable; settings as in "
                        "trainer/eval.py --help; default: as trained)")
    parser.add_argument("--config", action="append", metavar="FILE", dest="configs", help="another program's head "
                        "only: YAML file of settings with the network's sizes (repeatable: laid over one another)")
    parser.add_argument("--classes", help="another program's head only: text file with one class name per line, in id "
                        "order, e.g. preprocess/ade20k_classes.txt")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="JPEG or PNG files")
    arguments = parser.parse_args()
    check_outputs([Path(image) for image in arguments.images], Path(arguments.output))
    return _predict(arguments)


def output_names(image: Path) -> tuple[str, str]:
    """File names of an image's class-id map and overlay."""
    return f"{image.stem}.png", f"{image.stem}-overlay.png"


def check_outputs(images: list[Path], output: Path) -> None:
    """Raise ConfigError when an image is no file, or a prediction would overwrite an image or another prediction."""
    written: dict[Path, Path] = {}
    for image in images:
        if not image.is_file():
            raise ConfigError(f"image {image} {'is a folder' if image.is_dir() else 'does not exist'}")
        for name in output_names(image):
            other = written.setdefault(output / name, image)
            if other is not image:
                raise ConfigError(f"predictions of {other} and {image} would both be written to {output / name}; "
                                  "predict them into different folders")
    inputs = {image.resolve() for image in images}
    for path, image in written.items():
        if path.resolve() in inputs:
            raise ConfigError(f"the prediction of {image} would overwrite the image {path}; choose another --output")


def _predict(arguments: argparse.Namespace) -> int:
    import numpy as np
    import torch
    from PIL import Image

    from shards.picture import overlay
    from shards.sample import decode_image
    from trainer.build import model_from_weights, restore_model
    from trainer.checkpoint import Checkpoint, open_checkpoint
    from trainer.distributed import distributed
    from trainer.evaluation import Predictor

    checkpoint = open_checkpoint(arguments.checkpoint)
    if isinstance(checkpoint, Checkpoint):
        if arguments.configs is not None or arguments.classes is not None:
            raise ConfigError(f"{arguments.checkpoint} brings its own settings and classes; leave out --config and "
                              "--classes, change settings with --set")
        config, classes = override_config(checkpoint.run_config, arguments.overrides), checkpoint.class_infos
    else:
        config, classes = _settings_of_a_foreign_head(arguments)
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    colors = [info.color for info in classes]
    dtype = np.uint8 if len(colors) <= 256 else np.uint16
    with distributed(config.device) as context:
        if isinstance(checkpoint, Checkpoint):
            model = restore_model(checkpoint, config.backbone.source, context.device)
        else:
            model = model_from_weights(checkpoint, config, len(classes), context.device)
        predict = Predictor(model, config, len(colors), context.device)
        for path in tqdm(arguments.images, desc="predicting", unit="img", disable=None):
            pixels = decode_image(Path(path).read_bytes(), path)
            label_map = predict(torch.from_numpy(pixels.transpose(2, 0, 1).copy())).cpu().numpy().astype(dtype)
            map_name, overlay_name = output_names(Path(path))
            Image.fromarray(label_map).save(output / map_name)
            Image.fromarray(overlay(pixels, label_map, colors)).save(output / overlay_name)
    legend = {number: info.name for number, info in enumerate(classes)}
    (output / "classes.json").write_text(json.dumps(legend, indent=1))
    print(f"{len(arguments.images)} predictions are in {output} (class ids, overlays, classes.json)")
    return 0


def _settings_of_a_foreign_head(arguments: argparse.Namespace) -> tuple[RunConfig, list[ClassInfo]]:
    """What a file of weights alone does not say: the network and the classes."""
    if arguments.configs is None or arguments.classes is None:
        raise ConfigError(f"{arguments.checkpoint} holds weights only; also give --config, a YAML file with the "
                          "network's sizes, and --classes, a text file with one class name per line")
    try:
        text = Path(arguments.classes).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--classes {arguments.classes} cannot be read: {error}") from error
    return load_run_config(arguments.configs, arguments.overrides), parse_classes(text, arguments.classes)


if __name__ == "__main__":
    run_entry_point(main)
