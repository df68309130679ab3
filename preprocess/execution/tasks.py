"""The tasks that workers run, on any executor. Each is small when pickled, and returns counts and the shards' indexes.

A block is one task. When there are fewer blocks than work for all workers, it is encoded in pieces, and each of its
shards is then joined from theirs: the same bytes.
"""

from __future__ import annotations

import contextlib
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np

from preprocess.blocks import Block, Progress, hash_sources
from preprocess.config import PreprocessConfig
from preprocess.encoding import SAMPLE_CLASSES, encode_pairs
from preprocess.execution.block_store import BlockStore
from preprocess.pairs import Dataset
from preprocess.source_tree import HashedTree
from shards.files.atomic import naming
from shards.manifest import INDEX_DTYPE, hash_of
from shards.sampling import ClassLists
from shards.writer import ShardWriter, encode_span


class Job(NamedTuple):
    """What all tasks share. The dataset comes without its pairs: each block carries its own."""

    config: PreprocessConfig
    dataset: Dataset
    store: BlockStore


class Task(Protocol):
    """Work for one worker."""

    @property
    def block(self) -> Block:
        """The block it belongs to."""

    def run(self, job: Job, progress: Progress) -> Any:
        """Do it, again if need be. Raises Interrupted when stopped."""


@dataclass(frozen=True)
class HashSources:
    """Hash a block's source files."""

    block: Block

    def run(self, job: Job, progress: Progress) -> str:
        """The hash."""
        return hash_of(hash_sources(HashedTree(job.dataset.tree), self.block.pairs, progress))


@dataclass(frozen=True)
class WriteBlock:
    """Write a whole block."""

    block: Block

    def run(self, job: Job, progress: Progress) -> dict[str, Any]:
        """The block's record: shards, sources, class counts, skips, and as bytes the shards' `index` and `classes`."""
        with job.store.workspace() as folder:
            writers = [ShardWriter(folder / name) for name in self.block.shard_names]
            with contextlib.ExitStack() as stack:
                for writer in writers:
                    stack.enter_context(writer)
                record = encode_pairs(job.config, job.dataset, self.block.pairs, self.block.is_crops, writers, progress)
            shards = [_kept(job.store, writer) for writer in writers]
        return complete_record(record, shards)


@dataclass(frozen=True)
class EncodePiece:
    """Encode the pairs [first, last) of a block."""

    block: Block
    first: int
    last: int

    def run(self, job: Job, progress: Progress) -> dict[str, Any]:
        """The statistics, and the entries of the samples of each shard."""
        spans = [_Spans(self.spans(job.store, number)) for number in range(len(self.block.shard_names))]
        with contextlib.ExitStack() as stack:
            for part in spans:
                stack.enter_context(part)
            record = encode_pairs(job.config, job.dataset, self.block.pairs[self.first : self.last],
                                  self.block.is_crops, spans, progress)
        return {"record": record, "entries": [part.entries for part in spans]}

    def spans(self, store: BlockStore, number: int) -> Path:
        """The file with this piece's samples of the block's shard `number`."""
        return store.scratch / f"{self.block.name}.{self.first}-{self.last}.{number}.spans"


@dataclass(frozen=True)
class JoinShard:
    """Join a shard of a block from the pieces, given with their entries for it."""

    block: Block
    number: int
    pieces: list[EncodePiece]
    entries: list[list[tuple[int, int, int]]]

    def run(self, job: Job, progress: Progress) -> dict[str, Any] | None:
        """The shard as in the block's record; None if it has no sample."""
        with job.store.workspace() as folder:
            writer = ShardWriter(folder / self.block.shard_names[self.number])
            with writer:
                for piece, entries in zip(self.pieces, self.entries, strict=True):
                    writer.extend(piece.spans(job.store, self.number), np.array(entries, INDEX_DTYPE))
            shard = _kept(job.store, writer)
        for piece in self.pieces:
            piece.spans(job.store, self.number).unlink()
        return shard


def complete_record(record: dict[str, Any], shards: list[dict[str, Any] | None]) -> dict[str, Any]:
    """A block's record from its statistics and its shards."""
    kept = [shard for shard in shards if shard is not None]
    classes = ClassLists.of([ids for shard in record.pop(SAMPLE_CLASSES) for ids in shard])
    return {**record, "shards": [shard["info"] for shard in kept], "index": b"".join(shard["index"] for shard in kept),
            "classes": classes.tobytes(), "sources": hash_of(record["sources"])}


def _kept(store: BlockStore, writer: ShardWriter) -> dict[str, Any] | None:
    """Hand a finished shard to the store; one without samples is removed."""
    if not writer.info.samples:
        writer.path.unlink()
        return None
    store.keep(writer.path, writer.info)
    return {"info": asdict(writer.info), "index": writer.index.tobytes()}


class _Spans:
    """A file of samples as a shard will hold them, and their entries. Worth nothing to another run, so never synced."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: list[tuple[int, int, int]] = []
        self._offset = 0
        self._file: BinaryIO

    def __enter__(self) -> None:
        self._file = self.path.open("wb")

    def write(self, key: str, image_bytes: bytes, image_suffix: str, payload: bytes) -> None:
        """Append a sample."""
        span = encode_span(key, image_bytes, image_suffix, payload)
        with naming(self.path):
            self._file.write(span)
        self.entries.append((self._offset, len(span), zlib.crc32(span)))
        self._offset += len(span)

    def __exit__(self, *_: object) -> None:
        with naming(self.path):
            self._file.close()
