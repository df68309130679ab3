"""Cut a dataset into blocks, the units of work, and hash all that determines a block's bytes.

A block's images are decoded once each, and crop k of all of them becomes the block's k-th shard. So a shard's bytes
depend only on (configuration, block), and it does not matter who makes it, or how often.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import PIL
from PIL import features

from preprocess.config import PreprocessConfig
from preprocess.layouts.pairing import Pair
from preprocess.pairs import Dataset
from preprocess.source_tree import HashedTree
from shards.cli.config_file import config_to_dict
from shards.errors import ConfigError, DatasetError
from shards.manifest import FORMAT_VERSION, hash_of

# Settings added later are left out of the hash at the values that give the old behaviour, so older sets keep theirs;
# those of the second line also of the manifest.
_HASHED_LATER = {"crops": {"scaled_side": "short"}, "dataset": {"exif_orientation": "refuse"}}
STORED_LATER: dict[str, dict[str, Any]] = {
    "dataset": {"images": None, "labels": None, "image_range": [], "image_bands": []},
}


@dataclass(frozen=True, kw_only=True)
class Block:
    """A unit of work: pairs of one split, and the names of the shards they become."""

    split: str
    number: int
    pairs: list[Pair]
    shard_names: list[str]
    is_crops: bool

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number:06d}"


class Progress(Protocol):
    """Counts what workers have done, and stops them."""

    def image_done(self, failed: bool = False) -> None:
        """Count an image. Raises Interrupted when the work is to be stopped."""


class Interrupted(Exception):
    """The parent asked its workers to stop; raised between images."""


def plan_blocks(config: PreprocessConfig, dataset: Dataset) -> list[Block]:
    """Cut every split into blocks of nearly equal size and name their shards."""
    unknown = set(config.crops.splits) - set(dataset.splits)
    if unknown:
        raise ConfigError(f"crops.splits names {sorted(unknown)}, legal: {sorted(dataset.splits)}")
    blocks = []
    for split, pairs in dataset.splits.items():
        is_crops = split in config.crops.splits
        per_block = config.crops.per_image if is_crops else 1
        count = -(-len(pairs) // config.images_per_shard)
        for number in range(count):
            first, last = number * len(pairs) // count, (number + 1) * len(pairs) // count
            names = [f"{split}-{number * per_block + k:06d}.tar" for k in range(per_block)]
            blocks.append(Block(split=split, number=number, pairs=pairs[first:last], shard_names=names,
                                is_crops=is_crops))
    return blocks


def config_hash(config: PreprocessConfig, dataset: Dataset, version: int = FORMAT_VERSION) -> str:
    """Hash of everything that determines a set's bytes: format, settings, classes, encoders; not paths or workers."""
    content = config_to_dict(config)
    for place in ("output", "staging", "workers", "executor", "ray_address", "on_error", "warn_ignored"):
        del content[place]
    for place in ("root", "class_file", "limit"):
        del content["dataset"][place]
    for later in (_HASHED_LATER, STORED_LATER):
        leave_out(content, later)
    meaning = [asdict(item) for item in dataset.classes], *dataset.mapping.identity
    return hash_of([version, content, meaning, producer()])


def leave_out(content: dict[str, Any], later: dict[str, dict[str, Any]]) -> None:
    """Remove the settings in `later` that have the value given there."""
    for section, settings in later.items():
        for name, neutral in settings.items():
            if content[section].get(name) == neutral:
                del content[section][name]


def block_fingerprint(fingerprint: str, block: Block) -> str:
    """Hash of everything that determines a block's bytes: settings and the names and sizes of its source files."""
    pairs = [{name: value for name, value in asdict(pair).items() if name != "annotation" or value}
             for pair in block.pairs]
    return hash_of([fingerprint, block.shard_names, pairs])


def hash_sources(tree: HashedTree, pairs: Sequence[Pair], progress: Progress) -> list[str]:
    """Hashes of the content of source files: as the tree has already read them, or else as they are now.

    Unlike `block_fingerprint`, it reads the files, and so detects a label map that was edited without changing size.
    """
    hashes = []
    for pair in pairs:
        for path in pair.paths:
            if path not in tree.sha256:
                with contextlib.suppress(DatasetError):  # unreadable: reported when it is used
                    tree.read(path)
            hashes.append(tree.sha256.get(path, "unreadable"))
        hashes += [pair.annotation] if pair.annotation else []
        progress.image_done()
    return hashes


def producer() -> dict[str, str]:
    """Versions of the encoders behind the shards' bytes. Other JPEG or zlib builds may give other, equivalent bytes."""
    return {
        "pillow": PIL.__version__,
        "libjpeg_turbo": str(features.version("libjpeg_turbo")),
        "zlib": zlib.ZLIB_RUNTIME_VERSION,
    }
