"""Dataset layouts: find the folders of each split, and match label maps to images."""

from __future__ import annotations

import hashlib
import logging
import re
import unicodedata
from collections.abc import Set
from dataclasses import dataclass
from pathlib import PurePosixPath

from preprocess.config import DatasetConfig
from preprocess.source_tree import SourceTree
from shards.errors import ConfigError

_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
_USUAL_NAMES = {"train": ("training", "train"), "val": ("validation", "val", "valid"), "test": ("testing", "test")}
_SPLIT_NAME = re.compile(r"[A-Za-z0-9_-]+")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One image and its label map; `key` is the image's path within its split folder, without suffix."""

    key: str
    image_path: str
    label_path: str
    fingerprint: str  # sizes of both files: the most that is known without reading them


def split_folders(config: DatasetConfig, tree: SourceTree) -> list[tuple[str, str, str]]:
    """(split, image folder, label folder) in a fixed order. Raises ConfigError when the folders are ambiguous."""
    if config.kind == "camvid":
        splits = config.splits or {"train": "train", "val": "val"}
        return [(split, folder, f"{folder}annot") for split, folder in splits.items()]
    if not config.splits:
        return _usual_folders(tree)
    splits = config.splits
    bad_names = [split for split in splits if not _SPLIT_NAME.fullmatch(split)]
    if bad_names:
        raise ConfigError(f"dataset.splits has a split named {bad_names[0]!r}, legal: letters, digits, '_' and '-'")
    labelled = _folders_of(tree, "annotations")
    return [(split, f"images/{folder}", f"annotations/{_label_folder(folder, labelled)}")
            for split, folder in splits.items()]


def _label_folder(folder: str, labelled: set[str]) -> str:
    """The label folder for an image folder: of the same name, or else the only one whose name means the same split."""
    meaning = _split_meant_by(folder)
    same = [other for other in labelled if meaning is not None and _split_meant_by(other) == meaning]
    return same[0] if folder not in labelled and len(same) == 1 else folder


def _split_meant_by(folder: str) -> str | None:
    return next((split for split, names in _USUAL_NAMES.items() if folder.lower() in names), None)


def _usual_folders(tree: SourceTree) -> list[tuple[str, str, str]]:
    """(split, image folder, label folder) by common folder names, ignoring case; without split folders all is 'train'.

    Raises ConfigError when two folders mean the same split, or when a folder with an uncommon name sits beside split
    folders, as its files would be skipped silently. 'test' images without labels, as in ADE20K, are skipped with a
    warning.
    """
    images, labels = (_usual_names(tree, top) for top in ("images", "annotations"))
    if not images and not labels:
        return [("train", "images", "annotations")]
    if "test" in images and "test" not in labels and len(images) > 1:
        _log.warning("%s: skipping images/%s, which has no labels in annotations", tree.name, images.pop("test"))
    alone = sorted(images.keys() ^ labels.keys())
    if alone:
        top, other = ("images", "annotations") if alone[0] in images else ("annotations", "images")
        folder = (images | labels)[alone[0]]
        raise ConfigError(f"{tree.name} has {top}/{folder}, but {other} has no folder for the split {alone[0]!r}, only "
                          f"{sorted(_folders_of(tree, other))}. Rename one of them to {folder!r}, or select the splits "
                          "to use, e.g. dataset.splits={train: training}")
    return [(split, f"images/{images[split]}", f"annotations/{labels[split]}")
            for split in _USUAL_NAMES if split in images]


def _usual_names(tree: SourceTree, top: str) -> dict[str, str]:
    """Split -> its folder in `top`. Raises ConfigError as `_usual_folders`."""
    found: dict[str, str] = {}
    for folder in sorted(_folders_of(tree, top)):
        split = _split_meant_by(folder)
        if split in found:
            raise ConfigError(f"{tree.name}/{top} has both {found[split]!r} and {folder!r} for the split {split!r}; "
                              "select the one to use, e.g. dataset.splits={train: training, val: validation}")
        if split is not None:
            found[split] = folder
    left_out = sorted({PurePosixPath(path).parts[1] for path in tree.files(top)} - set(found.values()))
    if found and left_out:
        raise ConfigError(f"{tree.name}/{top} has {left_out[0]!r} beside the split folders {sorted(found.values())}; "
                          "it would be ignored. Move it, or select the folders: dataset.splits={train: training}")
    return found


def _folders_of(tree: SourceTree, top: str) -> set[str]:
    return {parts[1] for parts in (PurePosixPath(path).parts for path in tree.files(top)) if len(parts) > 2}


def pair_files(tree: SourceTree, image_folder: str, label_folder: str) -> tuple[list[Pair], list[tuple[str, str]]]:
    """Match files by path without suffix: (pairs sorted by key, (file, reason) of each unpaired file)."""
    unpaired: list[tuple[str, str]] = []
    images = _by_stem(tree.files(image_folder), image_folder, _IMAGE_SUFFIXES, unpaired)
    labels = _by_stem(tree.files(label_folder), label_folder, (".png",), unpaired)
    partner = _partners(images.keys(), labels.keys())
    unpaired += [(images[key][0], f"no label map in {label_folder}") for key in sorted(images.keys() - partner.keys())]
    unpaired += [(labels[key][0], f"no image in {image_folder}")
                 for key in sorted(labels.keys() - set(partner.values()))]
    pairs = [
        Pair(key=key, image_path=images[key][0], label_path=labels[partner[key]][0],
             fingerprint=f"{images[key][1]}+{labels[partner[key]][1]}")
        for key in sorted(partner)
    ]
    return pairs, unpaired


def _partners(images: Set[str], labels: Set[str]) -> dict[str, str]:
    """Image key -> label key: identical keys first, then keys that differ only in Unicode normalisation.

    macOS used to store names decomposed (NFD), unlike other systems: the same name, but different bytes.
    """
    partner = {key: key for key in images & labels}
    by_form: dict[str, tuple[list[str], list[str]]] = {}
    for side, keys in enumerate((images - labels, labels - images)):
        for key in keys:
            by_form.setdefault(unicodedata.normalize("NFC", key), ([], []))[side].append(key)
    return partner | {ours[0]: theirs[0] for ours, theirs in by_form.values() if len(ours) == len(theirs) == 1}


def _by_stem(
    files: dict[str, int], folder: str, suffixes: tuple[str, ...], rejected: list[tuple[str, str]]
) -> dict[str, tuple[str, int]]:
    found: dict[str, tuple[str, int]] = {}
    for path, size in sorted(files.items()):
        relative = PurePosixPath(path).relative_to(folder)
        if not relative.stem.strip("."):
            rejected.append((path, "its name consists only of dots and a suffix"))
            continue
        key = str(relative.with_suffix(""))
        if relative.suffix.lower() not in suffixes:
            rejected.append((path, f"not one of {', '.join(suffixes)}"))
        elif key in found:
            rejected.append((path, f"same name as {found[key][0]}"))
        else:
            found[key] = (path, size)
    return found


def split_off_validation(
    splits: dict[str, list[Pair]], skipped: dict[str, list[tuple[str, str]]], fraction: float
) -> None:
    """Move a fraction of 'train' to 'val', chosen by a hash of the key, so that adding images moves no others."""
    if set(splits) != {"train"}:
        raise ConfigError(f"dataset.val_fraction is {fraction}, but the source has split folders: {sorted(splits)}")
    chosen = [int(hashlib.sha256(pair.key.encode()).hexdigest()[:8], 16) < fraction * 2**32 for pair in splits["train"]]
    everything = splits["train"]
    splits["train"] = [pair for pair, is_val in zip(everything, chosen, strict=True) if not is_val]
    splits["val"] = [pair for pair, is_val in zip(everything, chosen, strict=True) if is_val]
    skipped["val"] = []
    if not splits["train"] or not splits["val"]:
        raise ConfigError(f"dataset.val_fraction is {fraction}: with {len(everything)} images one split would be empty")
