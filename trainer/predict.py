"""Segment images with a trained model: writes a PNG of class ids and an overlay for each image.
Images are rotated as their EXIF orientation says before prediction, so both PNGs match what an image viewer shows.

example: python trainer/predict.py --checkpoint runs/ade20k-m2f/checkpoints/best.pt --output out photo.jpg
--checkpoint also takes a directory written by trainer/export.py. A file of another program (Meta's Mask2Former or
linear head, EoMT from Hugging Face) contains only weights: add --config and --classes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

try:
    from shards.cli.command_line import run_entry_point
    from shards.errors import ConfigError, MaskStreamError, RunError
    from shards.files.atomic import write_atomically
    from shards.files.strict_json import to_json
    from trainer.model_options import add_checkpoint_options, open_pretrained
except ImportError as error:
    raise SystemExit(f"error: {error}; is MaskStream installed (pip install -e .), or does another package named "
                     "shards or trainer shadow it?") from None

if TYPE_CHECKING:
    from trainer.pretrained import Pretrained


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_checkpoint_options(parser)
    parser.add_argument("--output", required=True, help="folder for <name>.png (class ids) and <name>-overlay.png")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="JPEG or PNG files")
    arguments = parser.parse_args()
    images = usable_images([Path(image) for image in arguments.images])
    check_outputs(images, Path(arguments.output))
    return _predict(arguments, images)


def output_names(image: Path) -> tuple[str, str]:
    """File names of an image's class-id map and overlay."""
    return f"{image.stem}.png", f"{image.stem}-overlay.png"


def usable_images(images: list[Path]) -> list[Path]:
    """Return the images as given; raises ConfigError when none of them is a file, before a model is loaded."""
    problems = []
    for image in images:
        if not image.is_file():
            hint = f"; to change a setting, use --set {image}" if "=" in str(image) else ""
            problems.append(f"image {image} {'is a folder' if image.is_dir() else f'does not exist{hint}'}")
    if len(problems) == len(images):
        raise ConfigError(problems[0])
    return images


def check_outputs(images: list[Path], output: Path) -> None:
    """Raise ConfigError when a prediction would overwrite an image or another prediction."""
    written: dict[Path, Path] = {}
    for image in images:
        for name in output_names(image):
            other = written.setdefault(output / name, image)
            if other is not image:
                raise ConfigError(f"predictions of {other} and {image} would both be written to {output / name}; "
                                  "use a different --output for each")
    inputs = {image.resolve() for image in images}
    for path, image in written.items():
        if path.resolve() in inputs:
            raise ConfigError(f"the prediction of {image} would overwrite the image {path}; choose another --output")


def _predict(arguments: argparse.Namespace, images: list[Path]) -> int:
    """Predict the images one by one. Those that fail are reported and skipped, and make the exit code nonzero."""
    pretrained = open_pretrained(arguments)
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    failures: list[Exception] = []
    for path in tqdm(images, desc="predicting", unit="img", disable=None):
        try:
            _predict_one(pretrained, path, output)
        except (MaskStreamError, OSError) as error:
            failures.append(error)
            tqdm.write(f"error: {path}: {' '.join(str(error).removeprefix(f'{path}: ').split())}", file=sys.stderr)
    if len(failures) == len(images):
        raise failures[0]
    legend = {number: info.name for number, info in enumerate(pretrained.classes)}
    write_atomically(output / "classes.json", to_json(legend, indent=1).encode())
    print(f"{len(images) - len(failures)} predictions written to {output} (class ids, overlays, classes.json)")
    if failures:
        raise RunError(f"{len(failures)} of {len(images)} images could not be predicted; see the errors above")
    return 0


def _predict_one(pretrained: Pretrained, path: Path, output: Path) -> None:
    from PIL import Image

    from shards.files.plain_file import LARGEST_PICTURE, read_plain
    from shards.picture import overlay, save_picture
    from shards.sample import decode_upright

    pixels = decode_upright(read_plain(path, LARGEST_PICTURE), str(path))
    label_map = pretrained.predict(pixels).label_map
    map_name, overlay_name = output_names(path)
    colors = [info.color for info in pretrained.classes]
    save_picture(Image.fromarray(label_map), output / map_name)
    save_picture(Image.fromarray(overlay(pixels, label_map, colors)), output / overlay_name)


if __name__ == "__main__":
    run_entry_point(main)
