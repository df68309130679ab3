"""Choose samples of a split: by the classes they contain, by their key, or by how badly a model segments them."""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from shards.errors import ConfigError, CorruptShardError
from shards.looking.image_scores import ImageScore, read_scores
from shards.manifest import ClassInfo, Manifest
from shards.reader import ShardReader
from shards.sample import CropSample

_BYTES_AT_ONCE = 16 << 20  # fetched together, as one request if they are in one shard
_SAMPLES_AT_ONCE = 64


class Chosen(NamedTuple):
    """Samples to show, and how many samples were read to find them."""

    numbers: list[int]
    looked_at: int
    scores: dict[int, ImageScore] = {}  # noqa: RUF012 - of --worst, never changed


@dataclass(frozen=True, kw_only=True)
class Filter:
    """Keeps samples that contain every class of `classes`, and whose key matches one of `keys`, if there are any."""

    classes: Sequence[int] = ()
    keys: Sequence[str] = ()

    @property
    def keeps_all(self) -> bool:
        """Whether no sample needs to be read to know that it is kept."""
        return not self.classes and not self.keys

    def keeps(self, sample: CropSample) -> bool:
        """Whether the sample is kept; decodes neither image nor masks."""
        return set(self.classes) <= set(sample.labels.tolist()) and (
            not self.keys or any(_matches(sample.key, pattern) for pattern in self.keys))

    def most(self, reader: ShardReader) -> int:
        """Upper bound on the number of samples kept, from the manifest."""
        bounds = [reader.info.class_samples[number] for number in self.classes]
        if self.keys and not any(_is_pattern(key) for key in self.keys):
            bounds.append(len(set(self.keys)))  # a key occurs once in a split
        return min(bounds, default=len(reader))


def read_in_order(reader: ShardReader, numbers: Sequence[int]) -> Iterator[tuple[int, CropSample]]:
    """Verified samples with their numbers, several per request where they are neighbours. Raises as
    `ShardReader.read`."""
    group: list[int] = []
    size = 0
    for number in numbers:
        length = reader.place(number).length
        if group and (len(group) == _SAMPLES_AT_ONCE or size + length > _BYTES_AT_ONCE):
            yield from _read_group(reader, group)
            group, size = [], 0
        group.append(number)
        size += length
    if group:
        yield from _read_group(reader, group)


def _read_group(reader: ShardReader, numbers: Sequence[int]) -> Iterator[tuple[int, CropSample]]:
    for number, data in zip(numbers, reader.fetch(numbers), strict=True):
        yield number, reader.read(number, data)


def choose(reader: ShardReader, wanted: Filter, first: int, count: int,
           progress: Callable[[], object] = lambda: None) -> Chosen:
    """The first `count` samples from number `first` on, in storage order, that the filter keeps.

    Reads samples one after another and stops at the last one needed; `progress` is called for each.
    """
    if wanted.keeps_all:
        return Chosen(list(range(first, min(first + count, len(reader)))), 0)
    found: list[int] = []
    looked_at, enough = 0, min(count, wanted.most(reader))
    if enough:
        for number, sample in read_in_order(reader, range(first, len(reader))):
            looked_at += 1
            progress()
            if wanted.keeps(sample):
                found.append(number)
            if len(found) >= enough:
                break
    return Chosen(found, looked_at)


def choose_worst(reader: ShardReader, wanted: Filter, evaluation: Path, count: int,
                 progress: Callable[[], object] = lambda: None) -> Chosen:
    """The `count` samples of lowest mIoU in an evaluation (equal ones by accuracy, then by key) that the filter keeps.

    Images without a labelled pixel have no score and are left out. Raises ConfigError when the evaluation is of another
    shard set.
    """
    rows = [row for row in read_scores(evaluation) if row.split == reader.split and not math.isnan(row.miou)]
    if not rows:
        raise ConfigError(f"{evaluation} has no score of an image of split {reader.split!r}; its splits are: "
                          f"{', '.join(sorted({row.split for row in read_scores(evaluation)}))}")
    rows.sort(key=lambda row: (row.miou, row.accuracy, row.key, row.number))
    scores: dict[int, ImageScore] = {}
    looked_at = 0
    for row in rows:
        if len(scores) == count:
            break
        looked_at += 1
        progress()
        sample = reader.read(row.number) if row.number < len(reader) else None
        if sample is None or sample.key != row.key:
            has = f"{sample.key!r}" if sample else f"only {len(reader)} samples"
            raise ConfigError(f"{evaluation}: sample {row.number} of split {row.split!r} is {row.key!r}, but "
                              f"{reader.storage.root} has {has}: the evaluation is of another shard set")
        if wanted.keeps(sample):
            scores[row.number] = row
    return Chosen(list(scores), looked_at, scores)


def split_of_scores(evaluation: Path) -> str:
    """The split of an evaluation's first image."""
    return next(read_scores(evaluation)).split


def class_of(text: str, manifest: Manifest) -> int:
    """The id of the class that a user means by its id, its name, or the first of its names ("wall" of "wall, brick").

    Raises ConfigError naming the nearest class.
    """
    names = [info.name for info in manifest.classes]
    for spelling, meant in ((str, text), (_folded, _folded(text)), (_first_name, _folded(text))):
        same = [number for number, name in enumerate(names) if spelling(name) == meant]
        if len(same) == 1:
            return same[0]
        if same:
            raise ConfigError(f"--class {text!r} means several classes: {manifest.names_of(same, 10)}; give the id")
    if text.isdecimal() and len(text) < 10 and int(text) < len(names):
        return int(text)
    spellings = {spelling(name): name for spelling in (_first_name, _folded) for name in names}
    near = difflib.get_close_matches(_folded(text), spellings, n=1, cutoff=0.5)
    hint = f"did you mean {spellings[near[0]]!r}? " if near else ""
    raise ConfigError(f"--class {text!r} is no class of the set; {hint}legal: a name, or an id from 0 to "
                      f"{len(names) - 1} (python -m shards info --classes lists them)")


def check_labels(sample: CropSample, classes: Sequence[ClassInfo]) -> None:
    """Raise CorruptShardError for a label that is no class of the set, which readers do not look for."""
    if sample.labels.size and sample.labels[-1] >= len(classes):
        raise CorruptShardError(f"sample {sample.key!r}: label {sample.labels[-1]}, legal: 0..{len(classes) - 1}")


def _folded(name: str) -> str:
    return " ".join(name.casefold().split())


def _first_name(name: str) -> str:
    return _folded(name.split(",")[0])


def _is_pattern(key: str) -> bool:
    return any(sign in key for sign in "*?[")


def _matches(key: str, pattern: str) -> bool:
    return key == pattern or fnmatch.fnmatchcase(key, pattern)
