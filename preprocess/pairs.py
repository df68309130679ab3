"""Open a source dataset (image and label map pairs per split, class table, label mapping) and read its pairs."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy.typing as npt
from PIL import Image

from preprocess.config import DatasetConfig
from preprocess.label_mapping import LabelMapping
from preprocess.layouts.pairing import Found, Pair, check_split_names, split_off_validation
from preprocess.layouts.registry import LAYOUTS
from preprocess.source_picture import Conversion, decode_source_image, encode_png
from preprocess.source_tree import SourceTree, is_of_the_system
from shards.errors import ConfigError, CorruptShardError, DatasetError
from shards.manifest import ClassInfo
from shards.picture_file import UPRIGHT, exif_orientation, upright

_log = logging.getLogger(__name__)


class SourcePair(NamedTuple):
    """A decoded pair; `image_bytes` is an encoding of `image`: the source file, if shards can hold it as it is."""

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
    conversion: Conversion
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
    check_split_names(config.splits)
    layout = LAYOUTS[config.kind]
    tree = layout.open(config)
    classes, mapping = layout.classes(config, tree)
    splits, skipped = {}, {}
    found_in = dict(layout.pairs(config, tree))
    if config.val_fraction > 0:
        split_off_validation(found_in, config.val_fraction, config.limit)
    for split, found in found_in.items():
        if found.unpaired and on_error == "fail":
            shown = "; ".join(f"{file}: {reason}" for file, reason in found.unpaired[:5])
            more = f" (and {len(found.unpaired) - 5} more)" if len(found.unpaired) > 5 else ""
            raise DatasetError(f"{tree.name}: {shown}{more}. Fix these files, or pass --on-error skip")
        if not found.pairs:
            raise DatasetError(f"{tree.name} has no image with a label map for the split {split!r}: {found.looked_for}")
        _say_what_is_left_out(split, found, None if config.splits else layout.official.get(split))
        splits[split], skipped[split] = found.pairs[: config.limit], found.unpaired
    _say_what_is_hidden(tree)
    return Dataset(kind=config.kind, tree=tree, classes=classes, mapping=mapping,
                   exif_orientation=config.exif_orientation, conversion=Conversion.of(config), splits=splits,
                   skipped=skipped)


def _say_what_is_left_out(split: str, found: Found, official: int | None) -> None:
    if found.others:
        _log.warning("split %r: %d files are neither an image nor labels of this layout and are left out, such as %s",
                     split, len(found.others), found.others[0])
    if official is not None and len(found.pairs) != official:
        _log.warning("split %r has %d images with labels; the complete release has %d", split, len(found.pairs),
                     official)


def _say_what_is_hidden(tree: SourceTree) -> None:
    of_the_system = {path for path in tree.left_out if is_of_the_system(path.rpartition("/")[2])}
    if of_the_system:
        _log.warning("%s: %d files and folders of operating systems are left out, such as %s", tree.name,
                     len(of_the_system), min(of_the_system))
    if hidden := tree.left_out - of_the_system:
        _log.warning("%s: %d hidden files and folders are left out, such as %s", tree.name, len(hidden), min(hidden))


def read_pair(dataset: Dataset, pair: Pair, *, keeps_file: bool = True) -> SourcePair:
    """Read an image and its label map, of one size. `keeps_file`: `image_bytes` will be stored and must match `image`.

    The label map is used as stored; `dataset.exif_orientation` applies to the image only. Raises DatasetError naming
    the file when it cannot be read, has an EXIF rotation (policy "refuse"), the sizes differ, or a label is illegal.
    """
    image_bytes = dataset.tree.read(pair.image_path)
    label_bytes = dataset.tree.read(pair.label_path) if pair.label_path else b""
    try:
        pixels, suffix = decode_source_image(image_bytes, pair.image_path, dataset.conversion)
    except CorruptShardError as error:
        raise DatasetError(str(error)) from error
    orientation = exif_orientation(image_bytes)
    if dataset.exif_orientation == "refuse":
        _refuse_turned(orientation, pair.image_path)
        _refuse_turned(exif_orientation(label_bytes), pair.label_path)
    elif orientation != UPRIGHT:
        pixels = upright(pixels, orientation) if dataset.exif_orientation == "apply" else pixels
        suffix = ""  # encoded again without the tag, so that readers do not rotate it once more
    try:
        stored = LAYOUTS[dataset.kind].read_labels(label_bytes, pair, dataset.mapping, *pixels.shape[:2])
    except CorruptShardError as error:
        raise DatasetError(str(error)) from error
    if keeps_file and not suffix:
        image_bytes, suffix = encode_png(pixels), "png"
    label_map, nearest, rest = dataset.mapping.apply(stored, pair.label_name)
    if pixels.shape[:2] != label_map.shape:
        raise DatasetError(f"{pair.image_path} is {pixels.shape[1]}x{pixels.shape[0]} pixels"
                           f"{_as_turned(orientation, dataset.exif_orientation)} but {pair.label_name} is "
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
