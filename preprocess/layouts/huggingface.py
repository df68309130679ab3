"""Hugging Face `datasets` (the extra `hf`): a folder that `save_to_disk` wrote, a folder of parquet files, or a hub id.

An image column and a column of label images, as in `scene_parse_150`; `dataset.images` and `dataset.labels` name them.
Files are read as they are stored in the table, never decoded by that library; rows that only hold a path are read if
the file lies below `dataset.root`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from preprocess.config import DatasetConfig
from preprocess.layouts.layout import Classes, Layout
from preprocess.layouts.pairing import Found, Pair
from preprocess.source_tree import SourceTree
from shards.errors import ConfigError, DatasetError, StorageError
from shards.files.plain_file import LARGEST_PICTURE, read_plain

_USUAL_SPLITS = {"train": ("train", "training"), "val": ("validation", "val", "valid")}


class HubTree:
    """The rows of a dataset as files: `<split>/<row>/<column>`. Other processes open it again."""

    def __init__(self, root: str, images: str | None, labels: str | None) -> None:
        self.name, self.left_out = root, set[str]()
        self._arguments = (root, images, labels)
        self.splits = _opened(root)
        self.columns = _columns(root, next(iter(self.splits.values())), images, labels)

    def __reduce__(self) -> tuple[type[HubTree], tuple[str, str | None, str | None]]:
        return HubTree, self._arguments

    def files(self, folder: str) -> dict[str, int]:
        """Path -> bytes of the files of a split."""
        found: dict[str, int] = {}
        for column in self.columns:
            found |= {f"{folder}/{row}/{column}": size for row, size in enumerate(self.sizes(folder, column))}
        return found

    def has_files(self, folder: str) -> bool:
        """Whether a split has rows."""
        return folder in self.splits and len(self.splits[folder]) > 0

    def sizes(self, split: str, column: str) -> list[int]:
        """Bytes of each row's file; 0 for one that is stored as a path."""
        compute = importlib.import_module("pyarrow.compute")
        stored = compute.struct_field(self.splits[split].data.column(column).combine_chunks(), "bytes")
        return [size or 0 for size in compute.binary_length(stored).to_pylist()]

    def read(self, path: str, most: int = LARGEST_PICTURE) -> bytes:
        """Content of a row's file, of at most `most` bytes if the row only holds its path. Raises DatasetError naming
        it."""
        split, row, column = path.split("/", 2)
        cell = self.splits[split][int(row)][column]
        if isinstance(cell, dict) and isinstance(cell.get("bytes"), bytes):
            return bytes(cell["bytes"])
        place = Path(str(cell.get("path"))) if isinstance(cell, dict) and cell.get("path") else None
        root = Path(self.name).resolve()
        if place is None or not place.resolve().is_relative_to(root):
            raise DatasetError(f"{self.name}/{path} holds no file, and no path below {root}")
        try:
            return read_plain(place, most)
        except (OSError, StorageError) as error:
            raise DatasetError(f"{self.name}/{path}: {place} cannot be read: {error}") from error


class HuggingFace(Layout):
    """Rows of a table; an image's key is its row number."""

    name = "huggingface"
    official: ClassVar[Mapping[str, int]] = {}

    def open(self, config: DatasetConfig) -> SourceTree:
        assert config.root is not None
        return HubTree(config.root, config.images, config.labels)

    def own_classes(self, config: DatasetConfig, tree: SourceTree) -> Classes:
        raise ConfigError(f"{tree.name}: tables hold no class names for label images; set dataset.class_file to a list "
                          "of names, or to a class table")

    def pairs(self, config: DatasetConfig, tree: SourceTree) -> Iterator[tuple[str, Found]]:
        assert isinstance(tree, HubTree)
        splits = config.splits or _usual(tree)
        unknown = [source for source in splits.values() if source not in tree.splits]
        if unknown:
            raise ConfigError(f"{tree.name} has no split {unknown[0]!r}, it has: {', '.join(tree.splits)}; set "
                              "dataset.splits, e.g. {train: train, val: validation}")
        images, labels = tree.columns
        for split, source in splits.items():
            sizes = zip(tree.sizes(source, images), tree.sizes(source, labels), strict=True)
            pairs = [Pair(key=f"{row:08d}", image_path=f"{source}/{row}/{images}",
                          label_path=f"{source}/{row}/{labels}", fingerprint=f"{image}+{label}")
                     for row, (image, label) in enumerate(sizes)]
            yield split, Found(pairs, [], [], f"rows of {source}")


def _usual(tree: HubTree) -> dict[str, str]:
    """Split -> the table's split, by usual names; a table without splits is 'train'."""
    found = {split: name for split, names in _USUAL_SPLITS.items() for name in names if name in tree.splits}
    return found or {"train": next(iter(tree.splits))}


def _opened(root: str) -> dict[str, Any]:
    """Split -> its rows, with files as they are stored."""
    try:
        library = importlib.import_module("datasets")
    except ImportError as error:
        raise ConfigError(f"dataset.kind=huggingface needs the extra 'hf' ({error}): pip install 'maskstream[hf]'"
                          ) from None
    if not sys.stderr.isatty():
        library.disable_progress_bars()
    folder = Path(root)
    is_saved = (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()
    try:
        found = library.load_from_disk(root) if is_saved else library.load_dataset(root)
    except (OSError, ValueError, KeyError, TypeError, library.exceptions.DatasetsError) as error:
        raise DatasetError(f"{root} cannot be opened by the library datasets {library.__version__}: {error}") from error
    splits = dict(found) if isinstance(found, dict) else {"train": found}
    kept = library.Image(decode=False)
    return {str(name): rows.cast(library.Features({
        column: kept if isinstance(feature, library.Image) else feature for column, feature in rows.features.items()}))
        for name, rows in splits.items()}


def _columns(root: str, rows: Any, images: str | None, labels: str | None) -> tuple[str, str]:
    """The columns of images and of labels. Raises ConfigError when they are not clear."""
    there = [name for name, feature in rows.features.items() if type(feature).__name__ == "Image"]
    chosen = (images, labels) if images is not None and labels is not None else (
        tuple(sorted(there, key=lambda name: name != "image")) if len(there) == 2 and "image" in there else ())
    if len(chosen) != 2 or not set(chosen) <= set(there):
        raise ConfigError(f"{root} has the image columns {', '.join(there) or 'none'}; set dataset.images and "
                          "dataset.labels to the names of two of them")
    return str(chosen[0]), str(chosen[1])
