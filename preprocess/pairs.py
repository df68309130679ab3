"""Open a source dataset (image and label map pairs per split, class table, label mapping) and read its pairs."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from preprocess.class_table import is_class_table, read_class_table
from preprocess.config import DatasetConfig
from preprocess.label_mapping import LabelMapping, plain_mapping
from preprocess.layouts import Pair, pair_files, split_folders, split_off_validation
from preprocess.source_tree import SourceTree, open_tree
from shards.class_list import parse_classes
from shards.errors import ConfigError, CorruptShardError, DatasetError
from shards.manifest import ClassInfo
from shards.picture_file import PNG_START, UPRIGHT, exif_orientation, load_picture, open_label_map, upright
from shards.rle import MAX_CLASSES, ignore_value
from shards.sample import decode_image

CAMVID_CLASSES = (
    "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist",
)
_COLOR_MODES = ("RGB", "RGBA", "P", "L", "1")
_LABEL_MODES = ("1", "L", "P", "I", "I;16")  # single-channel values; palettes hold the index


class SourcePair(NamedTuple):
    """A decoded pair; `image_bytes` is an encoding of `image`: the source file, unless its EXIF tag would rotate it."""

    image: Image.Image  # RGB
    image_bytes: bytes
    suffix: str  # "jpg" or "png"
    label_map: npt.NDArray[Any]  # class ids [H, W], `ignore_index` where unlabelled
    nearest: int = 0  # pixels, as in `Mapped`
    rest: int = 0


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A dataset ready to be sharded. `skipped` lists unpaired files per split as (file, reason)."""

    kind: str
    tree: SourceTree
    classes: list[ClassInfo]
    mapping: LabelMapping
    exif_orientation: str  # as in `DatasetConfig`
    splits: dict[str, list[Pair]]
    skipped: dict[str, list[tuple[str, str]]]

    @property
    def ignore_index(self) -> int:
        """The id of ignored pixels."""
        return self.mapping.ignore_index


def open_dataset(config: DatasetConfig, on_error: str) -> Dataset:
    """List and pair the files of every split.

    Raises ConfigError on a missing root or class file, DatasetError on unpaired files (unless `on_error` is "skip") or
    an empty split.
    """
    if config.root is None:
        raise ConfigError(
            "dataset.root is not set: pass the dataset folder, e.g. "
            "python preprocess/make_shards.py --dataset ade20k --root <ADEChallengeData2016> --output <dir>"
        )
    tree = open_tree(config.root, "train" if config.kind == "camvid" and not config.splits else
                     next(iter(config.splits.values())) if config.kind == "camvid" else "images")
    classes, mapping = _classes_and_mapping(config, tree)
    splits, skipped = {}, {}
    for split, image_folder, label_folder in split_folders(config, tree):
        pairs, unpaired = pair_files(tree, image_folder, label_folder)
        if unpaired and on_error == "fail":
            shown = "; ".join(f"{file}: {reason}" for file, reason in unpaired[:5])
            more = f" (and {len(unpaired) - 5} more)" if len(unpaired) > 5 else ""
            raise DatasetError(f"{tree.name}: {shown}{more}. Fix these files, or pass --on-error skip")
        if not pairs:
            raise DatasetError(f"{tree.name} has no image with a label map in {image_folder} (split {split!r})")
        splits[split], skipped[split] = pairs[: config.limit], unpaired
    if config.kind == "folder" and config.val_fraction > 0:
        split_off_validation(splits, skipped, config.val_fraction)
    return Dataset(kind=config.kind, tree=tree, classes=classes, mapping=mapping,
                   exif_orientation=config.exif_orientation, splits=splits, skipped=skipped)


def read_pair(dataset: Dataset, pair: Pair, *, keeps_file: bool = True) -> SourcePair:
    """Read an image and its label map, of one size. `keeps_file`: `image_bytes` will be stored and must match `image`.

    The label map is used as stored; `dataset.exif_orientation` applies to the image only. Raises DatasetError naming
    the file when it cannot be read, has an EXIF rotation (policy "refuse"), the sizes differ, or a label is illegal.
    """
    image_bytes = dataset.tree.read(pair.image_path)
    label_bytes = dataset.tree.read(pair.label_path)
    try:
        pixels = decode_image(image_bytes, pair.image_path)
        read_labels = _read_colors if dataset.mapping.reads_colors else _read_labels
        stored = read_labels(label_bytes, pair.label_path, pixels.shape[0] * pixels.shape[1])
    except CorruptShardError as error:
        raise DatasetError(str(error)) from error
    suffix = "png" if image_bytes.startswith(PNG_START) else "jpg"
    orientation = exif_orientation(image_bytes)
    if dataset.exif_orientation == "refuse":
        _refuse_turned(orientation, pair.image_path)
        _refuse_turned(exif_orientation(label_bytes), pair.label_path)
    elif orientation != UPRIGHT:
        pixels = upright(pixels, orientation) if dataset.exif_orientation == "apply" else pixels
        if keeps_file:
            image_bytes, suffix = _encode_png(pixels), "png"  # without the tag, so that readers do not rotate it again
    label_map, nearest, rest = dataset.mapping.apply(stored, pair.label_path)
    if pixels.shape[:2] != label_map.shape:
        raise DatasetError(f"{pair.image_path} is {pixels.shape[1]}x{pixels.shape[0]} pixels"
                           f"{_as_turned(orientation, dataset.exif_orientation)} but {pair.label_path} is "
                           f"{label_map.shape[1]}x{label_map.shape[0]}; they must be equal")
    return SourcePair(Image.fromarray(pixels), image_bytes, suffix, label_map, nearest, rest)


def _refuse_turned(orientation: int, name: str) -> None:
    if orientation != UPRIGHT:
        raise DatasetError(f"{name} has EXIF orientation {orientation}: viewers rotate it, decoders do not. If its "
                           "label map was drawn on the rotated view, set dataset.exif_orientation=apply; if on the "
                           "pixels as stored, dataset.exif_orientation=ignore")


def _as_turned(orientation: int, policy: str) -> str:
    if orientation == UPRIGHT:
        return ""
    return f" (EXIF orientation {orientation} {'applied' if policy == 'apply' else 'not applied'}, as set by " \
           f"dataset.exif_orientation={policy})"


def _encode_png(pixels: npt.NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _read_labels(data: bytes, name: str, pixels: int) -> npt.NDArray[Any]:
    """Stored label values [H,W]. Raises CorruptShardError or DatasetError; oversized maps are refused undecoded."""
    with open_label_map(data, name) as image:
        if image.mode not in _LABEL_MODES:
            raise DatasetError(f"{name} has mode {image.mode}; a label map must have one channel of class ids (for "
                               "colours, write a class table with labels: rgb and set dataset.class_file to it)")
        _check_size(image, name, pixels)
        values = np.asarray(load_picture(image, name))
    if values.min() < 0 or values.max() > MAX_CLASSES:
        raise DatasetError(f"{name} holds labels {values.min()}..{values.max()}, legal: 0..{MAX_CLASSES}")
    return values.astype(np.uint8) if values.dtype == bool else values


def _read_colors(data: bytes, name: str, pixels: int) -> npt.NDArray[Any]:
    """Colours uint8 [H, W, 3] of a label map, of its palette if it has one. Raises as `_read_labels`."""
    with open_label_map(data, name) as image:
        if image.mode not in _COLOR_MODES:
            raise DatasetError(f"{name} has mode {image.mode}, legal with labels: rgb: {', '.join(_COLOR_MODES)}")
        _check_size(image, name, pixels)
        return np.asarray(load_picture(image, name).convert("RGB"))


def _check_size(image: Image.Image, name: str, pixels: int) -> None:
    if image.width * image.height > pixels:
        raise DatasetError(f"{name} is {image.width}x{image.height}, but its image has only {pixels} pixels; their "
                           "sizes must be equal")


def _classes_and_mapping(config: DatasetConfig, tree: SourceTree) -> tuple[list[ClassInfo], LabelMapping]:
    """Raises ConfigError for a class file that cannot be used, and for settings that a class table replaces."""
    if config.class_file is not None and is_class_table(config.class_file):
        if config.ignore_labels or config.reduce_zero_label is not None:
            raise ConfigError(f"dataset.class_file is {config.class_file}, a class table, which says itself what is "
                              "ignored; leave out dataset.ignore_labels and dataset.reduce_zero_label")
        return read_class_table(config.class_file)
    classes = _classes(config, tree)
    reduce = config.reduce_zero_label if config.reduce_zero_label is not None else config.kind == "ade20k"
    default_ignored = 11 if config.kind == "camvid" else ignore_value(len(classes))
    ignore_labels = tuple(config.ignore_labels) or (default_ignored,)
    return classes, plain_mapping(len(classes), ignore_labels, reduce)


def _classes(config: DatasetConfig, tree: SourceTree) -> list[ClassInfo]:
    if config.class_file is not None:
        text, name = _read_text(Path(config.class_file)), config.class_file
    elif config.kind == "camvid":
        text, name = "\n".join(CAMVID_CLASSES), "camvid"
    elif config.kind == "ade20k":
        text, name = (Path(__file__).parent / "ade20k_classes.txt").read_text(encoding="utf-8"), "ade20k"
    else:
        name = f"{tree.name}/classes.txt"
        try:
            text = tree.read("classes.txt").decode("utf-8-sig")
        except (DatasetError, UnicodeDecodeError) as error:
            raise ConfigError(f"no class table: {error}. Write one class name per line, in id order, to {name} or set "
                              "dataset.class_file") from error
    return parse_classes(text, name)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"dataset.class_file {path} cannot be read: {error}") from error
