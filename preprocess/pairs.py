"""What a dataset is to us: pairs of image and label map per split, a class table, a meaning for each value."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from preprocess.config import DatasetConfig
from preprocess.source_tree import SourceTree, open_tree
from shards.class_list import parse_classes
from shards.errors import ConfigError, CorruptShardError, DatasetError
from shards.manifest import ClassInfo
from shards.rle import MAX_CLASSES, ignore_value
from shards.sample import decode_image, load_picture, open_picture

CAMVID_CLASSES = (
    "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist",
)  # fmt: skip
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
_USUAL_NAMES = {"train": ("training", "train"), "val": ("validation", "val", "valid"), "test": ("testing", "test")}
_SPLIT_NAME = re.compile(r"[A-Za-z0-9_-]+")
_LABEL_MODES = ("1", "L", "P", "I", "I;16")  # single-channel values; palettes hold the index


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One image and its label map; `key` is the image's path below its split, without suffix."""

    key: str
    image_path: str
    label_path: str
    fingerprint: str  # sizes of both files: a changed source is noticed on a rerun


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A dataset ready to be sharded. `skipped` lists unpaired files per split as (file, reason)."""

    kind: str
    tree: SourceTree
    classes: list[ClassInfo]
    ignore_index: int
    ignore_labels: tuple[int, ...]
    reduce_zero_label: bool
    splits: dict[str, list[Pair]]
    skipped: dict[str, list[tuple[str, str]]]


def open_dataset(config: DatasetConfig, on_error: str) -> Dataset:
    """List and pair the files of every split.

    Raises ConfigError on a missing root or class file, DatasetError on unpaired files (unless
    `on_error` is "skip") or when a split is empty.
    """
    if config.root is None:
        raise ConfigError(
            "the dataset's place is not set. Type for example: "
            "python preprocess/make_shards.py --dataset ade20k --root <ADEChallengeData2016> --output <dir>"
        )
    tree = open_tree(config.root, "train" if config.kind == "camvid" and not config.splits else
                     next(iter(config.splits.values())) if config.kind == "camvid" else "images")
    classes = _classes(config, tree)
    splits, skipped = {}, {}
    for split, image_folder, label_folder in _split_folders(config, tree):
        pairs, unpaired = _pair_files(tree, image_folder, label_folder)
        if unpaired and on_error == "fail":
            shown = "; ".join(f"{file}: {reason}" for file, reason in unpaired[:5])
            more = f" (and {len(unpaired) - 5} more)" if len(unpaired) > 5 else ""
            raise DatasetError(f"{tree.name}: {shown}{more}. Mend them, or pass --on-error skip")
        if not pairs:
            raise DatasetError(f"{tree.name} has no image with a label map in {image_folder} (split {split!r})")
        splits[split], skipped[split] = pairs[: config.limit], unpaired
    if config.kind == "folder" and config.val_fraction > 0:
        _split_off_validation(splits, skipped, config.val_fraction)
    reduce = config.reduce_zero_label if config.reduce_zero_label is not None else config.kind == "ade20k"
    default_ignored = 11 if config.kind == "camvid" else ignore_value(len(classes))
    ignore_labels = tuple(config.ignore_labels) or (default_ignored,)
    return Dataset(
        kind=config.kind, tree=tree, classes=classes, ignore_index=ignore_value(len(classes)),
        ignore_labels=ignore_labels, reduce_zero_label=reduce, splits=splits, skipped=skipped,
    )  # fmt: skip


def read_pair(dataset: Dataset, pair: Pair) -> tuple[Image.Image, bytes, str, npt.NDArray[Any]]:
    """`(RGB image, its file bytes, "jpg" or "png", class ids [H,W])` with `ignore_index` where unlabelled.

    Raises DatasetError naming the file when it cannot be read, the sizes differ, or a label is illegal.
    """
    image_bytes = dataset.tree.read(pair.image_path)
    try:
        pixels = decode_image(image_bytes, pair.image_path)
        stored = _read_labels(dataset.tree.read(pair.label_path), pair.label_path)
    except CorruptShardError as error:
        raise DatasetError(str(error)) from error
    label_map = map_labels(stored, dataset, pair.label_path)
    if pixels.shape[:2] != label_map.shape:
        raise DatasetError(f"{pair.image_path} is {pixels.shape[1]}x{pixels.shape[0]} pixels but {pair.label_path} is "
                           f"{label_map.shape[1]}x{label_map.shape[0]}; they must be equal")
    suffix = "png" if image_bytes[:4] == b"\x89PNG" else "jpg"
    return Image.fromarray(pixels), image_bytes, suffix, label_map


def map_labels(stored: npt.NDArray[Any], dataset: Dataset, name: str) -> npt.NDArray[Any]:
    """Stored label values to class ids 0..C-1 and `ignore_index`. Raises DatasetError on any other value."""
    lowest = 1 if dataset.reduce_zero_label else 0
    ignored = {*dataset.ignore_labels, *([0] if dataset.reduce_zero_label else [])}
    present = np.flatnonzero(np.bincount(stored.reshape(-1)))
    illegal = [v for v in present.tolist() if v not in ignored and not lowest <= v < len(dataset.classes) + lowest]
    if illegal:
        raise DatasetError(
            f"{name} holds the label {illegal[0]}, legal: {lowest}..{len(dataset.classes) + lowest - 1} "
            f"({len(dataset.classes)} classes) and {sorted(ignored)} for ignored pixels"
        )
    table = np.full(int(present[-1]) + 1, dataset.ignore_index, np.uint8 if dataset.ignore_index == 255 else np.uint16)
    for value in present.tolist():
        if value not in ignored:
            table[value] = value - lowest
    mapped: npt.NDArray[Any] = table[stored]
    return mapped


def _read_labels(data: bytes, name: str) -> npt.NDArray[Any]:
    """Stored label values [H,W]. Raises CorruptShardError or DatasetError."""
    with open_picture(data, name, ("PNG",)) as image:
        if image.mode not in _LABEL_MODES:
            raise DatasetError(f"{name} has mode {image.mode}; a label map must have one channel of class ids")
        values = np.asarray(load_picture(image, name))
    if values.min() < 0 or values.max() > MAX_CLASSES:
        raise DatasetError(f"{name} holds labels {values.min()}..{values.max()}, legal: 0..{MAX_CLASSES}")
    return values.astype(np.uint8) if values.dtype == bool else values


def _split_folders(config: DatasetConfig, tree: SourceTree) -> list[tuple[str, str, str]]:
    """(our split, image folder, label folder) in a fixed order."""
    if config.kind == "camvid":
        splits = config.splits or {"train": "train", "val": "val"}
        return [(split, folder, f"{folder}annot") for split, folder in splits.items()]
    splits = config.splits or _usual_folders(tree)
    bad_names = [split for split in splits if not _SPLIT_NAME.fullmatch(split)]
    if bad_names:
        raise ConfigError(f"dataset.splits names a split {bad_names[0]!r}, legal: letters, digits, '_' and '-'")
    if not splits:  # one flat tree
        return [("train", "images", "annotations")]
    return [(split, f"images/{folder}", f"annotations/{folder}") for split, folder in splits.items()]


def _usual_folders(tree: SourceTree) -> dict[str, str]:
    """Our split -> the folder below images/ and annotations/ that has one of its usual names, in any case.

    Raises ConfigError when two folders have the same meaning, or when a folder has no usual name beside ones
    that do: its files would be left out silently.
    """
    paths = [PurePosixPath(path).parts for top in ("images", "annotations") for path in tree.files(top)]
    present = {parts[1] for parts in paths if len(parts) > 2}
    found: dict[str, str] = {}
    for folder in sorted(present):
        split = next((split for split, names in _USUAL_NAMES.items() if folder.lower() in names), None)
        if split in found:
            raise ConfigError(f"{tree.name} has both {found[split]!r} and {folder!r} for the split {split!r}; "
                              "name the one to use, e.g. dataset.splits={train: training, val: validation}")
        if split is not None:
            found[split] = folder
    left_out = sorted({parts[1] for parts in paths} - set(found.values())) if found else []
    if left_out:
        raise ConfigError(f"{tree.name} has {left_out[0]!r} beside the split folders {sorted(found.values())}; it "
                          "would be left out. Move it, or name the folders to use: dataset.splits={train: training}")
    return {split: found[split] for split in _USUAL_NAMES if split in found}


def _pair_files(tree: SourceTree, image_folder: str, label_folder: str) -> tuple[list[Pair], list[tuple[str, str]]]:
    """Pairs by equal path without suffix, sorted by key; and (file, reason) for the files left over."""
    unpaired: list[tuple[str, str]] = []
    images = _by_stem(tree.files(image_folder), image_folder, _IMAGE_SUFFIXES, unpaired)
    labels = _by_stem(tree.files(label_folder), label_folder, (".png",), unpaired)
    unpaired += [(images[key][0], f"no label map in {label_folder}") for key in sorted(images.keys() - labels.keys())]
    unpaired += [(labels[key][0], f"no image in {image_folder}") for key in sorted(labels.keys() - images.keys())]
    pairs = [
        Pair(key=key, image_path=images[key][0], label_path=labels[key][0],
             fingerprint=f"{images[key][1]}+{labels[key][1]}")
        for key in sorted(images.keys() & labels.keys())
    ]  # fmt: skip
    return pairs, unpaired


def _by_stem(
    files: dict[str, int], folder: str, suffixes: tuple[str, ...], rejected: list[tuple[str, str]]
) -> dict[str, tuple[str, int]]:
    found: dict[str, tuple[str, int]] = {}
    for path, size in sorted(files.items()):
        relative = PurePosixPath(path).relative_to(folder)
        if not relative.stem.strip("."):
            rejected.append((path, "its name is nothing but dots and a suffix"))
            continue
        key = str(relative.with_suffix(""))
        if relative.suffix.lower() not in suffixes:
            rejected.append((path, f"not one of {', '.join(suffixes)}"))
        elif key in found:
            rejected.append((path, f"same name as {found[key][0]}"))
        else:
            found[key] = (path, size)
    return found


def _split_off_validation(
    splits: dict[str, list[Pair]], skipped: dict[str, list[tuple[str, str]]], fraction: float
) -> None:
    """Move a share of 'train' to 'val', chosen by a hash of the name, so that added images move no others."""
    if set(splits) != {"train"}:
        raise ConfigError(f"dataset.val_fraction is {fraction}, but the source has split folders: {sorted(splits)}")
    chosen = [int(hashlib.sha256(pair.key.encode()).hexdigest()[:8], 16) < fraction * 2**32 for pair in splits["train"]]
    everything = splits["train"]
    splits["train"] = [pair for pair, is_val in zip(everything, chosen, strict=True) if not is_val]
    splits["val"] = [pair for pair, is_val in zip(everything, chosen, strict=True) if is_val]
    skipped["val"] = []
    if not splits["train"] or not splits["val"]:
        raise ConfigError(f"dataset.val_fraction is {fraction}: of {len(everything)} images one split would be empty")


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
