"""Generate a small dataset of drawn landscapes with labels, in the `folder` layout, for demos and tests.

example: python preprocess/make_scenes.py --output scenes --train 160 --val 24
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw
from tqdm import tqdm

try:
    from shards.cli.command_line import run_entry_point
    from shards.errors import ConfigError
    from shards.files.atomic import write_atomically
    from shards.files.outside_json import LARGEST_INTEGER
    from shards.files.plain_file import LARGEST_TEXT, read_plain
    from shards.files.storage import local_path
    from shards.picture import save_picture
except ImportError as error:
    raise SystemExit(f"error: {error}; is MaskStream installed (pip install -e .), or does another package named "
                     "shards or preprocess shadow it?") from None

# name, base RGB colour in the image, colour in overlays
CLASSES = (
    ("sky", (135, 185, 235), "#3a86ff"),
    ("hill", (120, 130, 150), "#8338ec"),
    ("grass", (110, 160, 70), "#ffbe0b"),
    ("road", (95, 95, 100), "#ff006e"),
    ("house", (215, 190, 150), "#06d6a0"),
    ("roof", (170, 70, 55), "#9b2226"),
    ("tree", (45, 95, 45), "#00e5ff"),
    ("car", (40, 70, 190), "#ffffff"),
)
_MOST_SCENES = 1_000_000  # of a split: 12 GB
SKY, HILL, GRASS, ROAD, HOUSE, ROOF, TREE, CAR = range(len(CLASSES))


def draw_scene(rng: np.random.Generator) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """`(image [H,W,3], label map [H,W])` of a random landscape; every pixel has a class."""
    width, height = int(rng.integers(144, 208)), int(rng.integers(128, 176))
    labels = Image.new("L", (width, height), SKY)
    draw = ImageDraw.Draw(labels)
    horizon = int(height * rng.uniform(0.4, 0.6))
    _draw_hills(draw, rng, width, horizon)
    draw.rectangle((0, horizon, width, height), fill=GRASS)
    if rng.random() < 0.8:
        _draw_road(draw, rng, width, height, horizon)
    for _ in range(int(rng.integers(0, 3))):
        _draw_house(draw, rng, width, height, horizon)
    for _ in range(int(rng.integers(1, 5))):
        _draw_tree(draw, rng, width, height, horizon)
    for _ in range(int(rng.integers(0, 3))):
        _draw_car(draw, rng, width, height, horizon)
    label_map = np.asarray(labels)
    return _paint(label_map, rng), label_map


def write_scenes(output: Path, counts: dict[str, int], seed: int) -> None:
    """Write `images/<split>/`, `annotations/<split>/` and `classes.txt`. A scene depends on seed, split and index."""
    table = "".join(f"{name}\t{color}\n" for name, _, color in CLASSES)
    _refuse_other_files(output, table)
    for number, (split, count) in enumerate(counts.items()):
        images, annotations = output / "images" / split, output / "annotations" / split
        for folder in (images, annotations):
            folder.mkdir(parents=True, exist_ok=True)
        for index in tqdm(range(count), desc=f"drawing {split}", unit="img", disable=None):
            image, label_map = draw_scene(np.random.default_rng([seed, number, index]))
            name = f"scene_{split}_{index:05d}"
            save_picture(Image.fromarray(image), images / f"{name}.jpg", quality=92)
            save_picture(Image.fromarray(label_map), annotations / f"{name}.png")
    write_atomically(output / "classes.txt", table.encode())


def _refuse_other_files(output: Path, table: str) -> None:
    """Raise ConfigError when the folder holds files of somebody's own dataset, with which scenes would be mixed."""
    for path in sorted(output.rglob("*")) if output.is_dir() else ():
        is_table = path == output / "classes.txt" and read_plain(path, LARGEST_TEXT) == table.encode()
        if path.is_file() and not is_table and not path.name.startswith("scene_"):
            raise ConfigError(f"--output {output} holds files other than drawn scenes, such as {path}; legal: a new "
                              "or empty folder, or one of drawn scenes")


def _draw_hills(draw: ImageDraw.ImageDraw, rng: np.random.Generator, width: int, horizon: int) -> None:
    xs = np.arange(width)
    waves = sum(rng.uniform(2, 9) * np.sin(xs / rng.uniform(9, 35) + rng.uniform(0, 6.28)) for _ in range(3))
    tops = np.minimum(horizon - rng.uniform(8, 25) + waves, horizon)
    outline = [(int(x), int(top)) for x, top in zip(xs, tops, strict=True)]
    draw.polygon([*outline, (width, horizon), (0, horizon)], fill=HILL)


def _draw_road(draw: ImageDraw.ImageDraw, rng: np.random.Generator, width: int, height: int, horizon: int) -> None:
    far, near = rng.uniform(0.2, 0.8) * width, rng.uniform(0.1, 0.9) * width
    half_far, half_near = rng.uniform(3, 8), rng.uniform(18, 45)
    corners = [(far - half_far, horizon), (far + half_far, horizon), (near + half_near, height),
               (near - half_near, height)]
    draw.polygon(corners, fill=ROAD)


def _draw_house(draw: ImageDraw.ImageDraw, rng: np.random.Generator, width: int, height: int, horizon: int) -> None:
    x, base = rng.uniform(0, 0.85) * width, rng.uniform(horizon + 4, height * 0.8)
    wide, tall = rng.uniform(26, 52), rng.uniform(18, 36)
    draw.rectangle((x, base - tall, x + wide, base), fill=HOUSE)
    draw.polygon([(x - 4, base - tall), (x + wide + 4, base - tall), (x + wide / 2, base - tall * 1.7)], fill=ROOF)


def _draw_tree(draw: ImageDraw.ImageDraw, rng: np.random.Generator, width: int, height: int, horizon: int) -> None:
    x, base = rng.uniform(0, 1) * width, rng.uniform(horizon + 2, height * 0.9)
    radius, tall = rng.uniform(7, 17), rng.uniform(14, 34)
    draw.rectangle((x - 2, base - tall, x + 2, base), fill=TREE)
    if rng.random() < 0.5:
        draw.ellipse((x - radius, base - tall - radius, x + radius, base - tall + radius), fill=TREE)
    else:
        draw.polygon([(x - radius, base - tall * 0.4), (x + radius, base - tall * 0.4), (x, base - tall * 1.8)],
                     fill=TREE)


def _draw_car(draw: ImageDraw.ImageDraw, rng: np.random.Generator, width: int, height: int, horizon: int) -> None:
    x, base = rng.uniform(0, 0.85) * width, rng.uniform(horizon + 12, height - 2)
    size = rng.uniform(18, 32)
    draw.rectangle((x, base - size * 0.35, x + size, base), fill=CAR)
    draw.rectangle((x + size * 0.2, base - size * 0.6, x + size * 0.75, base - size * 0.3), fill=CAR)


def _paint(label_map: npt.NDArray[np.uint8], rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Colour a label map, varying colours per scene and class, with a light gradient, texture and sensor noise."""
    height, width = label_map.shape
    base = np.array([color for _, color, _ in CLASSES], np.float64) + rng.normal(0, 12, (len(CLASSES), 3))
    image = base[label_map]
    image *= np.linspace(rng.uniform(0.8, 1.0), rng.uniform(1.0, 1.15), width)[None, :, None]
    image *= np.linspace(1.05, rng.uniform(0.85, 1.0), height)[:, None, None]
    coarse = rng.normal(0, 1, (height // 4 + 1, width // 4 + 1)).repeat(4, 0).repeat(4, 1)[:height, :width]
    roughness = np.array([1, 5, 9, 3, 4, 8, 11, 2], np.float64)[label_map]
    image += (coarse * roughness)[..., None] + rng.normal(0, 4, image.shape)
    return image.clip(0, 255).astype(np.uint8)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="folder to write to")
    parser.add_argument("--train", type=int, default=160, help="number of training scenes (default: 160)")
    parser.add_argument("--val", type=int, default=24, help="number of validation scenes (default: 24)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: 0)")
    arguments = parser.parse_args()
    for name, least, most in (("train", 1, _MOST_SCENES), ("val", 1, _MOST_SCENES), ("seed", 0, LARGEST_INTEGER)):
        if not least <= (given := getattr(arguments, name)) <= most:
            raise ConfigError(f"--{name} is {given}, legal: from {least} to {most}")
    output = local_path(arguments.output, "--output")
    write_scenes(output, {"train": arguments.train, "val": arguments.val}, arguments.seed)
    print(f"wrote {arguments.train} + {arguments.val} scenes to {arguments.output}")
    return 0


if __name__ == "__main__":
    run_entry_point(main)
