"""Whole labelled images to evaluate on: the validation split of a shard set, or a folder of images and label maps."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from shards.errors import ConfigError
from shards.files.plain_file import LARGEST_PICTURE, read_plain
from shards.manifest import ClassInfo
from shards.picture_file import load_picture, open_label_map
from shards.reader import ShardReader
from shards.rle import ignore_value
from shards.sample import CropSample, decode_upright
from shards.shown_text import has_control_characters
from trainer.data.crops import check_labels, read_samples, share_of_worker
from trainer.data_config import DataConfig

_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
_LABEL_SUFFIXES = (".png", ".tif", ".tiff", ".bmp")
_OTHER_SUFFIXES = (".webp", ".tif", ".tiff", ".bmp", ".gif", ".jp2", ".heic", ".avif")  # of images that are not read


@dataclass(frozen=True, kw_only=True)
class LabelledImage:
    """A whole validation image."""

    number: int  # in its split
    key: str
    image: Tensor  # uint8 [3, H, W]
    label_map: Tensor  # uint8 (uint16 with more than 255 classes) [H, W], class ids and ignore_index

    def pin_memory(self) -> LabelledImage:
        """Called by the DataLoader's pinning thread."""
        return self.map_tensors(Tensor.pin_memory)

    def map_tensors(self, change: Callable[[Any], Any]) -> LabelledImage:
        """A copy with `change` applied to each tensor."""
        return replace(self, image=change(self.image), label_map=change(self.label_map))


class ValidationImages(IterableDataset[LabelledImage]):
    """The images of `numbers`, in that order. One that cannot be delivered is always an error: leaving it out would
    bias the metric."""

    split: str
    classes: list[ClassInfo]
    identity: str  # equal for equal images and labels
    config: DataConfig
    numbers: Iterable[int]

    @property
    def ignore_index(self) -> int:
        """The value of unlabelled pixels in `label_map`."""
        return ignore_value(len(self.classes))

    @abstractmethod
    def __len__(self) -> int:
        """Images in all, whatever `numbers` says."""

    @abstractmethod
    def __getitem__(self, number: int) -> LabelledImage:
        """One image. Raises CorruptShardError or ConfigError naming it."""


class WholeImages(ValidationImages):
    """The images of a split of a shard set."""

    def __init__(self, reader: ShardReader, config: DataConfig, numbers: Iterable[int] = ()) -> None:
        self.reader, self.config, self.numbers = reader, config, numbers
        self.split, self.classes = reader.split, list(reader.manifest.classes)
        self.identity = reader.manifest.sha256

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, number: int) -> LabelledImage:
        return self._image(number, self.reader.read(number))

    def __iter__(self) -> Iterator[LabelledImage]:
        numbers = list(share_of_worker(self.numbers))
        samples = read_samples(self.reader, numbers, self.config.read_ahead_mb << 20)
        yield from map(self._image, numbers, samples)

    def _image(self, number: int, sample: CropSample) -> LabelledImage:
        check_labels(sample, self.reader.num_classes)
        return LabelledImage(
            number=number,
            key=sample.key,
            image=torch.from_numpy(sample.image.transpose(2, 0, 1).copy()),
            label_map=torch.from_numpy(sample.label_map()),
        )


class FolderImages(ValidationImages):
    """All images below a folder, in the order of their paths, with the label maps of the same paths below another.

    A label map holds class ids, and 255 (beyond 255 classes: 65535) where unlabelled; with `reduce_zero_label`, as in
    ADE20K's files, ids from 1 and 0 where unlabelled. Images are rotated as their EXIF orientation says.
    Raises ConfigError when there are no images, or one has no label map or is of a kind that is not read.
    """

    def __init__(self, images: Path, labels: Path, classes: Sequence[ClassInfo], config: DataConfig,
                 reduce_zero_label: bool = False) -> None:
        self.config, self.classes, self.numbers = config, list(classes), ()
        self.split, self.reduce_zero_label = images.name or str(images), reduce_zero_label
        found, maps = _pictures(images, _IMAGE_SUFFIXES), _pictures(labels, _LABEL_SUFFIXES)
        others = _pictures(images, _OTHER_SUFFIXES)
        self.keys = sorted(found)
        if not self.keys:
            raise ConfigError(f"{images} contains no image, legal suffixes: {', '.join(_IMAGE_SUFFIXES)}")
        if unread := [key for key in others if key not in found]:
            raise ConfigError(f"{len(unread)} images in {images} are of another kind, for example "
                              f"{others[unread[0]]}; legal suffixes: {', '.join(_IMAGE_SUFFIXES)}. Convert or remove "
                              "them: a metric over fewer images is another one")
        if strange := [key for key in self.keys if has_control_characters(key)]:  # they go into tables
            raise ConfigError(f"the name of {found[strange[0]]} holds control characters, or bytes that are not UTF-8; "
                              "rename it")
        if missing := [key for key in self.keys if key not in maps]:
            raise ConfigError(f"{len(missing)} of {len(self.keys)} images have no label map in {labels}, for example "
                              f"{found[missing[0]]}; expected {labels / missing[0]}.png")
        self.files = [(found[key], maps[key]) for key in self.keys]
        facts = [f"{path}:{path.stat().st_size}:{path.stat().st_mtime_ns}" for pair in self.files for path in pair]
        self.identity = hashlib.sha256("\n".join([*facts, str(reduce_zero_label)]).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, number: int) -> LabelledImage:
        image_path, label_path = self.files[number]
        image = decode_upright(read_plain(image_path, LARGEST_PICTURE), str(image_path))
        label_map = self._label_map(label_path)
        if label_map.shape != image.shape[:2]:
            raise ConfigError(f"{label_path} is {label_map.shape[1]}x{label_map.shape[0]} pixels, but {image_path} is "
                              f"{image.shape[1]}x{image.shape[0]}; they must have the same size")
        return LabelledImage(number=number, key=self.keys[number],
                             image=torch.from_numpy(image.transpose(2, 0, 1).copy()),
                             label_map=torch.from_numpy(label_map))

    def __iter__(self) -> Iterator[LabelledImage]:
        return map(self.__getitem__, share_of_worker(self.numbers))

    def _label_map(self, path: Path) -> npt.NDArray[Any]:
        name, ignored = str(path), self.ignore_index
        stored = np.asarray(load_picture(open_label_map(read_plain(path, LARGEST_PICTURE), name), name))
        if stored.dtype.kind == "f":
            raise ConfigError(f"{path} holds numbers with fractions ({stored.dtype}), legal: whole ones, class ids")
        if stored.ndim != 2:
            raise ConfigError(f"{path} has {stored.shape[-1]} channels, legal: one, of class ids. For colours or other "
                              "ids, make shards with a class table (preprocess/make_shards.py) and evaluate on them")
        ids = stored.astype(np.int64)
        if self.reduce_zero_label:
            ids = np.where(ids == 0, ignored, ids - 1)
        outside = ids[(ids >= len(self.classes)) & (ids != ignored)]
        if outside.size:
            value = int(outside[0]) + self.reduce_zero_label
            first = int(self.reduce_zero_label)
            raise ConfigError(f"{path} holds the value {value} ({outside.size} such pixels), legal: {first} to "
                              f"{len(self.classes) - 1 + first}, and {0 if first else ignored} for unlabelled pixels"
                              + ("" if first else ". With ids from 1 and 0 for unlabelled, use --reduce-zero-label"))
        return ids.astype(np.uint8 if ignored == 255 else np.uint16)


def _pictures(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """Path below the folder without suffix -> path. Raises ConfigError for two files that differ only in it."""
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder")
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        # A link to nothing is an image that is missing, found out when it is read.
        if path.suffix.lower() in suffixes and not path.name.startswith(".") and not path.is_dir():
            key = path.relative_to(folder).with_suffix("").as_posix()
            if (other := found.setdefault(key, path)) is not path:
                raise ConfigError(f"{other} and {path} differ only in their suffix; remove one")
    return found
