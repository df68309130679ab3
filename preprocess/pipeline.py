"""Write a shard set block by block, in parallel, on one or many machines, resumably.

Every finished block leaves a record beside the set (see `execution.block_store`); a rerun does only the blocks without
a matching one. The manifest is written last, once every block has a record. A set may be written

    by one command            write_shards
    by many, one per part     write_part, anywhere and in any order, then finish
"""

from __future__ import annotations

import contextlib
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from preprocess.blocks import Block, block_fingerprint, config_hash, plan_blocks
from preprocess.config import PreprocessConfig
from preprocess.encoding import merged
from preprocess.execution.block_store import PROGRESS, BlockStore, Summary
from preprocess.execution.local_executor import Counts, Executor, InlineExecutor, LocalExecutor
from preprocess.execution.ray_executor import RayExecutor
from preprocess.execution.tasks import EncodePiece, HashSources, Job, JoinShard, Task, WriteBlock, complete_record
from preprocess.pairs import Dataset
from preprocess.publish import publish, source_hashes
from shards.errors import ConfigError, ShardError
from shards.files.locks import among_writers, only_writer
from shards.manifest import FORMAT_VERSION, MANIFEST_NAME, Manifest, hash_of, load_manifest
from shards.workers import default_workers

_TASKS_PER_WORKER = 4  # wanted, so that all workers finish at about the same time
_LEAST_PIECE = 8  # images
_log = logging.getLogger(__name__)


class Part(NamedTuple):
    """Part `number` of `total`, counted from 0."""

    number: int
    total: int


@dataclass(frozen=True)
class _Plan:
    """The blocks of a set, what must be true of their records, and where they go."""

    config: PreprocessConfig
    dataset: Dataset
    store: BlockStore
    blocks: list[Block]
    settings: str  # hash of settings, classes and encoders
    fingerprints: dict[str, str]
    set_hash: str


def write_shards(config: PreprocessConfig, dataset: Dataset) -> tuple[Manifest, bool]:
    """Write the missing parts of the shard set `config.output`, then its manifest.

    Returns (manifest, whether anything was written). Raises ConfigError when the output holds a complete set made with
    other settings, DatasetError on the first unusable image (on_error "fail").
    """
    plan = _planned(config, dataset)
    if (existing := _existing_set(plan)) is not None:
        return existing, False
    with _alone(plan) as existing:
        if existing is not None:
            return existing, False
        plan.store.replace_settings(plan.settings)
        _write_missing(plan, plan.blocks)
        return _published(plan), True


def write_part(config: PreprocessConfig, dataset: Dataset, part: Part) -> int:
    """Write the missing blocks of a part of the set; returns the number of the part's images.

    Parts may run at the same time, on machines that share the output, and more than once. Raises as `write_shards`.
    """
    plan = _planned(config, dataset)
    blocks = plan.blocks[part.number :: part.total]
    if _existing_set(plan) is None:
        with _beside_others(plan) as existing:
            if existing is None:
                _refuse_other_settings(plan)
                _write_missing(plan, blocks)
    return sum(len(block.pairs) for block in blocks)


def finish(config: PreprocessConfig, dataset: Dataset, parts: int | None) -> tuple[Manifest, bool]:
    """Write the manifest of a set whose blocks are all there. Returns as `write_shards`.

    Raises ShardError naming what is missing; with `parts`, the parts to be run again.
    """
    plan = _planned(config, dataset)
    if (existing := _existing_set(plan)) is not None:
        return existing, False
    with _alone(plan) as existing:
        if existing is not None:
            return existing, False
        _refuse_other_settings(plan)
        finished = _finished(plan, plan.blocks)
        missing = [number for number, block in enumerate(plan.blocks) if block.name not in finished]
        if missing:
            again = f"; run these parts again: {sorted({number % parts for number in missing})}" if parts else ""
            raise ShardError(f"{plan.store.storage.root} is not finished: {len(missing)} of {len(plan.blocks)} blocks "
                             "are missing or were made with other settings, sources or encoders, such as "
                             f"{plan.blocks[missing[0]].name}{again}")
        return _published(plan), True


def _planned(config: PreprocessConfig, dataset: Dataset, version: int = FORMAT_VERSION) -> _Plan:
    if not config.output:
        raise ConfigError("output is not set: pass --output <dir or URL>, where the shard set is to be written")
    blocks = plan_blocks(config, dataset)
    fingerprint = config_hash(config, dataset, version)
    fingerprints = {block.name: block_fingerprint(fingerprint, block) for block in blocks}
    return _Plan(config, dataset, BlockStore(config.output, config.staging), blocks, fingerprint, fingerprints,
                 hash_of([fingerprint, sorted(fingerprints.items())]))


@contextlib.contextmanager
def _alone(plan: _Plan) -> Iterator[Manifest | None]:
    """While nobody else writes to the set; yields the manifest if another run has completed the set in the meantime.

    A folder is locked; in object storage, the manifest is never overwritten.
    """
    with _locked(plan, only_writer), contextlib.ExitStack() as stack:
        existing = _complete_set(plan)
        if existing is None:
            stack.enter_context(plan.store.own_scratch())
            plan.store.tidy(plan.blocks)
        yield existing


@contextlib.contextmanager
def _beside_others(plan: _Plan) -> Iterator[Manifest | None]:
    """While other parts may be written; yields as `_alone`."""
    with _locked(plan, lambda path, _: among_writers(path, lambda: None)), contextlib.ExitStack() as stack:
        existing = _complete_set(plan)
        if existing is None:
            stack.enter_context(plan.store.own_scratch())
        yield existing


@contextlib.contextmanager
def _locked(plan: _Plan, lock: Callable[[Path, Path], AbstractContextManager[None]]) -> Iterator[None]:
    """With the output folder made and locked; there is nothing to lock in object storage."""
    if plan.store.folder is None:
        _check_prefix(plan)
        yield
        return
    _check_folder(plan)
    try:
        with lock(plan.store.base / "lock", plan.store.folder):
            yield
    finally:
        with contextlib.suppress(OSError):  # it has records, or another run is there
            plan.store.base.rmdir()


def _refuse_other_settings(plan: _Plan) -> None:
    """Parts of one set with different settings would overwrite each other's shards."""
    found = plan.store.agree_on_settings(plan.settings)
    if found != plan.settings:
        raise ConfigError(f"{plan.store.storage.root} holds parts made with other settings, classes or encoders (their "
                          f"hash is {found[:12]}, this command's is {plan.settings[:12]}): use the same for all parts, "
                          "choose another --output, or make the whole set with one command")


def _check_folder(plan: _Plan) -> None:
    """Make the output folder. Raises ConfigError when it holds something else than an unfinished or a complete set."""
    folder, scratch = plan.store.folder, plan.store.base
    assert folder is not None
    is_set = scratch.exists() or (folder / MANIFEST_NAME).exists()
    if folder.exists() and not is_set and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty and is not an unfinished shard set; choose another --output")
    scratch.mkdir(parents=True, exist_ok=True)


def _check_prefix(plan: _Plan) -> None:
    """Raise as `_check_folder`: shards of others would be overwritten, and some taken for leftovers and removed."""
    there = plan.store.listed()
    if there and MANIFEST_NAME not in there and not plan.store.has_settings():
        raise ConfigError(f"{plan.store.storage.root} is not empty and is not an unfinished shard set, it has "
                          f"{there[0]!r}; choose another --output")


def _published(plan: _Plan) -> Manifest:
    plan.store.tidy(plan.blocks)  # after workers that were killed in this run
    manifest = publish(plan.config, plan.dataset, plan.store, plan.blocks, plan.set_hash)
    plan.store.remove_records()
    return manifest


def _write_missing(plan: _Plan, blocks: list[Block]) -> None:
    """Write those of the blocks that have no matching record, or whose sources changed."""
    finished = _finished(plan, blocks)
    for block in _changed(plan, [block for block in blocks if block.name in finished],
                          {name: summary.sources for name, summary in finished.items()}):
        del finished[block.name]
    missing = [block for block in blocks if block.name not in finished]
    if not missing:
        return
    images, left = (sum(len(block.pairs) for block in some) for some in (blocks, missing))
    for block in missing:
        plan.store.forget(block)
    with tqdm(total=images, initial=images - left, unit="img", disable=None, desc="sharding") as bar, \
            _executor(plan) as executor:
        for block, record in _written(executor, missing, plan.store, bar):
            plan.store.write_record(block, {**record, "fingerprint": plan.fingerprints[block.name]})


def _finished(plan: _Plan, blocks: list[Block]) -> dict[str, Summary]:
    """The blocks finished by earlier runs with the same settings and sources.

    With on_error "fail", a block in which an earlier run skipped images is done again, and so fails.
    """
    return {name: found for name, found in plan.store.summaries(blocks).items()
            if found.fingerprint == plan.fingerprints[name]
            and not (plan.config.on_error == "fail" and found.has_skipped)}


def _executor(plan: _Plan) -> InlineExecutor | LocalExecutor | RayExecutor:
    """The executor that the settings name. Each task carries its own pairs."""
    config = plan.config
    job = Job(config, replace(plan.dataset, splits={}, skipped={}), plan.store)
    if config.executor == "ray":
        return RayExecutor(job, config.ray_address, config.workers)
    workers = default_workers() if config.workers is None else config.workers
    return LocalExecutor(job, workers) if workers else InlineExecutor(job)


def _written(executor: Executor, blocks: list[Block], store: BlockStore, bar: tqdm[Any]
             ) -> Iterator[tuple[Block, dict[str, Any]]]:
    """Write blocks, whole or in pieces; yields (block, record) in any order."""
    pieces = _pieces_per_block(executor, len(blocks))
    encoded: dict[str, dict[int, Any]] = defaultdict(dict)  # by the number of a piece's first image
    joined: dict[str, dict[int, Any]] = defaultdict(dict)
    wanted: dict[str, list[EncodePiece]] = {}
    for block in blocks:
        parts = wanted[block.name] = _split(block, pieces)
        tasks: list[Task] = [*parts] if len(parts) > 1 else [WriteBlock(block)]
        for task in tasks:
            executor.submit(task)
    for task, result in executor.finished(_shown_on(bar)):
        name = task.block.name
        if isinstance(task, WriteBlock):
            yield task.block, result
        elif isinstance(task, EncodePiece):
            encoded[name][task.first] = result
            if len(encoded[name]) == len(wanted[name]):
                for join in _joins(task.block, wanted[name], encoded[name]):
                    executor.submit(join)
        elif isinstance(task, JoinShard):
            joined[name][task.number] = result
            if len(joined[name]) == len(task.block.shard_names):
                record = merged(encoded[name][piece.first]["record"] for piece in wanted[name])
                yield task.block, complete_record(record, [shard for _, shard in sorted(joined[name].items())])


def _pieces_per_block(executor: Executor, blocks: int) -> int:
    """1 where blocks are many or workers do not share a folder."""
    if executor.workers == 1 or not executor.shares_scratch:
        return 1
    return max(1, -(-_TASKS_PER_WORKER * executor.workers // max(blocks, 1)) if blocks < 2 * executor.workers else 1)


def _split(block: Block, pieces: int) -> list[EncodePiece]:
    """A block in pieces of nearly equal size, of at least `_LEAST_PIECE` images."""
    images = len(block.pairs)
    count = max(1, min(pieces, images // _LEAST_PIECE))
    ends = [number * images // count for number in range(count + 1)]
    return [EncodePiece(block, first, last) for first, last in pairwise(ends)]


def _joins(block: Block, pieces: list[EncodePiece], encoded: dict[int, Any]) -> list[JoinShard]:
    return [JoinShard(block, number, pieces, [encoded[piece.first]["entries"][number] for piece in pieces])
            for number in range(len(block.shard_names))]


def _shown_on(bar: tqdm[Any]) -> Any:
    """A function that shows counts on the bar."""
    start = int(bar.n)

    def show(counts: Counts) -> None:
        done = min(start + counts.images, bar.total or 0)  # images of a killed worker are counted again
        bar.update(max(0, done - bar.n))
        if counts.failed:
            bar.set_postfix(failed=counts.failed, refresh=False)

    return show


def _changed(plan: _Plan, blocks: list[Block], known: dict[str, str]) -> list[Block]:
    """The blocks whose source files no longer match the hashes in `known`."""
    if not blocks:
        return []
    changed = []
    with tqdm(total=sum(len(block.pairs) for block in blocks), unit="img", disable=None, desc="checking sources",
              leave=False) as bar, _executor(plan) as executor:
        for block in blocks:
            executor.submit(HashSources(block))
        for task, sources in executor.finished(_shown_on(bar)):
            if sources != known.get(task.block.name):
                changed.append(task.block.name)
    return [block for block in blocks if block.name in changed]


def _existing_set(plan: _Plan) -> Manifest | None:
    """As `_complete_set`; if a run was killed after publishing it, what that run left is removed."""
    manifest = _complete_set(plan)
    if manifest is not None and plan.store.folder is not None and (plan.store.folder / PROGRESS).exists():
        with only_writer(plan.store.base / "lock", plan.store.folder):
            plan.store.tidy(plan.blocks)
            plan.store.remove_records()
    return manifest


def _complete_set(plan: _Plan) -> Manifest | None:
    """The manifest of a complete set that this command would produce; None if there is no complete set.

    Raises ConfigError when the set is another one, or its sources have been edited since.
    """
    storage = plan.store.storage
    try:
        storage.size(MANIFEST_NAME)
    except (FileNotFoundError, NotADirectoryError):
        return None
    manifest, output = load_manifest(storage), storage.root
    if manifest.format_version != FORMAT_VERSION:  # the same command made it, with an older release
        plan = _planned(plan.config, plan.dataset, manifest.format_version)
    if manifest.config_hash != plan.set_hash:
        raise ConfigError(
            f"{output} already holds a complete shard set made with other settings, sources or encoders "
            f"(its config_hash is {manifest.config_hash[:12]}, this command's is {plan.set_hash[:12]}); "
            "sets are never extended or overwritten: choose another --output, or remove that set first"
        )
    sources = source_hashes(storage, manifest, plan.blocks)
    if sources is None:
        _log.warning("%s was written by an older version: its sources can only be compared by name and size", output)
        return manifest
    changed = _changed(plan, plan.blocks, sources)
    if changed:
        first, more = changed[0], f" and {len(changed) - 1} more blocks" if len(changed) > 1 else ""
        raise ConfigError(
            f"{output} already holds a complete shard set, but source files have been edited since: in block "
            f"{first.name} ({first.pairs[0].image_path} to {first.pairs[-1].image_path}){more}; choose another "
            "--output, or remove that set first"
        )
    return manifest
