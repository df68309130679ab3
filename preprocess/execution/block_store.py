"""Where finished blocks are kept: the set's folder or URL, with a record per block in `.progress/` below it.

Whoever finishes a block, on any machine, leaves its shards and then its record there. When every block has a record,
the manifest can be written, and the records removed.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from preprocess.blocks import Block
from shards.errors import StorageError
from shards.files.atomic import remove_leftovers
from shards.files.locks import own_folder
from shards.files.storage import LocalStorage, below, local_path, open_storage
from shards.files.strict_json import to_json
from shards.manifest import CLASS_DTYPE, INDEX_DTYPE, ShardInfo, hash_of
from shards.mirror import copy_file
from shards.shown_text import masked_value

PROGRESS, _SETTINGS = ".progress", "settings"


class Summary(NamedTuple):
    """What a rerun needs to know of a finished block; with very many blocks, whole records would fill the memory."""

    fingerprint: str
    sources: str
    has_skipped: bool

    @classmethod
    def of(cls, record: dict[str, Any]) -> Summary:
        """The summary of a record. Raises KeyError when it is not one."""
        return cls(str(record["fingerprint"]), str(record["sources"]), bool(record["skipped_images"]))


class BlockStore:
    """The shards and records of an unfinished set. May be pickled."""

    def __init__(self, output: str, staging: str) -> None:
        self.storage = open_storage(output)
        self.records = open_storage(below(output, PROGRESS))
        self.folder = self.storage.folder if isinstance(self.storage, LocalStorage) else None
        # Below the set's own progress folder, or in a local one; each run gets a folder of its own there.
        self.base = (self.folder / PROGRESS if self.folder is not None else
                     local_path(staging, "staging") / hash_of(masked_value(output))[:16])
        self.scratch = self.base

    @contextlib.contextmanager
    def own_scratch(self) -> Iterator[None]:
        """While a run lasts: `scratch` is a folder of its own, so that runs at the same time never share a file. It is
        removed at the end, as are those of killed runs."""
        with own_folder(self.base) as folder:
            self.scratch = folder
            yield
        if self.folder is None:
            with contextlib.suppress(OSError):  # another run's is there
                self.base.rmdir()

    def replace_settings(self, mine: str) -> None:
        """From now on, the blocks here are of settings with the hash `mine`. Records of others are removed: under other
        settings, block numbers mean other shards, which are about to be overwritten."""
        with contextlib.suppress(FileNotFoundError):
            if self.records.read(_SETTINGS) != mine.encode():
                for name in self.records.sizes() or ():
                    if name.endswith(".json"):
                        self.records.delete(name)
        self.records.write(_SETTINGS, mine.encode())

    def has_settings(self) -> bool:
        """Whether a run has written a block here, as its settings come first."""
        try:
            self.records.size(_SETTINGS)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def agree_on_settings(self, mine: str) -> str:
        """The hash of the settings of the blocks here: `mine`, if this run is the first."""
        with contextlib.suppress(StorageError):  # there is one
            self.records.write(_SETTINGS, mine.encode(), create=True)
        return self.records.read(_SETTINGS).decode(errors="replace")

    def forget(self, block: Block) -> None:
        """Remove the record of a block that is about to be written again: after a kill, it would outlive its shards."""
        self.records.delete(_name(block))

    @contextlib.contextmanager
    def workspace(self) -> Iterator[Path]:
        """A folder to write shards in, before `keep`: the set's own, or a temporary one."""
        if self.folder is not None:
            yield self.folder
            return
        with tempfile.TemporaryDirectory(dir=self.scratch if self.scratch.is_dir() else None) as folder:
            yield Path(folder)

    def keep(self, path: Path, info: ShardInfo) -> None:
        """Publish a finished shard, and read it back. Raises as `copy_file`."""
        if self.folder is None:
            copy_file(LocalStorage(path.parent), self.storage, info)

    def write_record(self, block: Block, record: dict[str, Any]) -> None:
        """Mark a block as finished: first its index and classes are written, then the rest of the record."""
        record = dict(record)
        self.records.write(_index(block), record.pop("index"))
        self.records.write(_classes(block), record.pop("classes"))
        self.records.write(_name(block), to_json(record).encode())

    def read_record(self, block: Block) -> dict[str, Any]:
        """The record of a finished block, with its index."""
        record = json.loads(self.records.read(_name(block)))
        return {**record, "index": self.records.read(_index(block))}

    def read_classes(self, block: Block) -> bytes:
        """The classes of a finished block's samples: counts, then ids (`shards.sampling`)."""
        return self.records.read(_classes(block))

    def summaries(self, blocks: list[Block]) -> dict[str, Summary]:
        """What is to be known of those blocks whose shards are there with the recorded sizes, by block name."""
        try:
            present = self.records.sizes() or {}
            sizes = self.storage.sizes() or {}
        except FileNotFoundError:
            return {}
        found = {}
        for block in blocks:
            if _name(block) in present:
                with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
                    record = json.loads(self.records.read(_name(block)))
                    samples = sum(shard["samples"] for shard in record["shards"])
                    if all(sizes.get(shard["name"]) == shard["bytes"] for shard in record["shards"]) \
                            and present.get(_index(block)) == samples * INDEX_DTYPE.itemsize \
                            and present.get(_classes(block)) == CLASS_DTYPE.itemsize * (
                                samples + sum(record["class_samples"])):
                        found[block.name] = Summary.of(record)
        return found

    def tidy(self, blocks: list[Block]) -> None:
        """Remove temporary files of killed runs, and shards of an unfinished run with other settings.

        Only with nobody else writing to the set.
        """
        if self.folder is not None:
            remove_leftovers(self.folder)
        wanted = {name for block in blocks for name in block.shard_names}
        splits = {block.split for block in blocks}
        for name in self.listed():
            if name.endswith(".tar") and name[:-11] in splits and name[-10:-4].isdigit() and name not in wanted:
                self.storage.delete(name)

    def remove_records(self) -> None:
        """After the manifest: nothing but the set stays."""
        if self.folder is not None:
            shutil.rmtree(self.folder / PROGRESS, ignore_errors=True)
            return
        for name in self.records.sizes() or ():
            self.records.delete(name)

    def listed(self) -> list[str]:
        """The names of the files beside the records."""
        try:
            return sorted(self.storage.sizes() or ())
        except FileNotFoundError:
            return []


def _name(block: Block) -> str:
    return f"{block.name}.json"


def _index(block: Block) -> str:
    return f"{block.name}.index"


def _classes(block: Block) -> str:
    return f"{block.name}.classes"
