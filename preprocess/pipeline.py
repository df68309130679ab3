"""Write a shard set block by block, in parallel and resumably.

Each finished block leaves a record in `<output>/.progress`; a rerun redoes only the blocks without a matching record.
The manifest is written last, once every block is finished.
"""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from preprocess.blocks import Block, Job, block_fingerprint, config_hash, hash_sources, plan_blocks, write_block
from preprocess.config import PreprocessConfig
from preprocess.pairs import Dataset
from preprocess.publish import publish
from preprocess.source_tree import HashedTree
from shards.errors import ConfigError, DatasetError
from shards.files.atomic import remove_leftovers, write_atomically
from shards.files.locks import only_writer
from shards.files.storage import LocalStorage, Storage, is_remote, open_storage
from shards.files.strict_json import to_json
from shards.manifest import MANIFEST_NAME, Manifest, hash_of, load_manifest
from shards.mirror import copy_set, files_of
from shards.shown_text import masked_value
from shards.workers import exit_with_parent, use_own_temporary_folder

_PROGRESS_FOLDER = ".progress"
_POLL_SECONDS = 0.2
_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")


def write_shards(config: PreprocessConfig, dataset: Dataset) -> tuple[Manifest, bool]:
    """Write the missing parts of the shard set `config.output`, then its manifest.

    A set for object storage is built in `config.staging`, uploaded, verified, then deleted locally. Returns (manifest,
    whether anything was written). Raises ConfigError when the output holds a complete set made with other settings,
    DatasetError on the first unusable image (on_error "fail").
    """
    if not config.output:
        raise ConfigError("output is not set: pass --output <dir or URL>, where the shard set is to be written")
    if not is_remote(config.output):
        return _write_to_folder(Job(config, dataset, Path(config.output)))
    destination, folder = open_storage(config.output), staging_folder(config)
    blocks = plan_blocks(config, dataset)
    _, set_hash = _fingerprints(config, dataset, blocks)
    if _has_manifest(destination):
        return _existing_set(Job(config, dataset, folder), blocks, destination, set_hash), False
    manifest, _ = _write_to_folder(Job(config, dataset, folder))
    with tqdm(total=sum(file.bytes for file in files_of(manifest)), unit="B", unit_scale=True, disable=None,
              desc="uploading") as bar:
        copy_set(folder, destination, lambda file: bar.update(file.bytes))
    shutil.rmtree(folder)
    return manifest, True


def staging_folder(config: PreprocessConfig) -> Path:
    """Where a set for the URL `config.output` is built before its upload: one folder per URL."""
    return Path(config.staging) / hash_of(masked_value(config.output))[:16]


def _write_to_folder(job: Job) -> tuple[Manifest, bool]:
    config, dataset, output = job
    blocks = plan_blocks(config, dataset)
    fingerprints, set_hash = _fingerprints(config, dataset, blocks)
    progress_folder = output / _PROGRESS_FOLDER
    if (output / MANIFEST_NAME).exists():
        _remove_progress(progress_folder)
        return _existing_set(job, blocks, LocalStorage(output), set_hash), False
    if output.exists() and not progress_folder.exists() and any(output.iterdir()):
        raise ConfigError(f"{output} is not empty and is not an unfinished shard set; choose another --output")
    progress_folder.mkdir(parents=True, exist_ok=True)
    with only_writer(progress_folder / "lock", output):
        manifest = _write_missing(job, blocks, fingerprints, set_hash)
        shutil.rmtree(progress_folder)
    return manifest, True


def _has_manifest(storage: Storage) -> bool:
    try:
        storage.read(MANIFEST_NAME)
    except FileNotFoundError:
        return False
    return True


def _remove_progress(folder: Path) -> None:
    """Clean up after a run that was killed between publishing the manifest and removing its progress folder."""
    if folder.exists():
        with only_writer(folder / "lock", folder.parent):
            remove_leftovers(folder.parent)
            shutil.rmtree(folder)


def _fingerprints(config: PreprocessConfig, dataset: Dataset, blocks: list[Block]) -> tuple[dict[str, str], str]:
    """(block name -> fingerprint, hash of the whole set)"""
    fingerprint = config_hash(config, dataset)
    fingerprints = {block.name: block_fingerprint(fingerprint, block) for block in blocks}
    return fingerprints, hash_of([fingerprint, sorted(fingerprints.items())])


def _write_missing(job: Job, blocks: list[Block], fingerprints: dict[str, str], set_hash: str) -> Manifest:
    output = job.output
    records = {block.name: _load_record(output, block, fingerprints[block.name], job.config) for block in blocks}
    finished = [block for block in blocks if records[block.name] is not None]
    for block in _changed(job, finished, {name: record["sources"] for name, record in records.items()
                                        if record is not None}):
        records[block.name] = None
    missing = [block for block in blocks if records[block.name] is None]
    _remove_leftovers(output, blocks)
    images = sum(len(block.pairs) for block in blocks)
    done = images - sum(len(block.pairs) for block in missing)
    with tqdm(total=images, initial=done, unit="img", disable=None, desc="sharding") as bar:
        for block, record in _run_blocks(job, missing, bar, _write):
            record["fingerprint"] = fingerprints[block.name]
            write_atomically(_record_path(output, block), to_json(record).encode())
            records[block.name] = record
    return publish(job, blocks, records, set_hash)


def _changed(job: Job, blocks: list[Block], known: dict[str, str]) -> list[Block]:
    """The blocks whose source files no longer match the hashes in `known`."""
    with tqdm(total=sum(len(block.pairs) for block in blocks), unit="img", disable=None, desc="checking sources",
              leave=False) as bar:
        found = {block.name: sources for block, sources in _run_blocks(job, blocks, bar, _hash)}
    return [block for block in blocks if found[block.name] != known.get(block.name)]


def _run_blocks(
    job: Job, blocks: list[Block], bar: tqdm[Any], task: Callable[[Block], _Result]
) -> Iterator[tuple[Block, _Result]]:
    """Run `task` on each block in worker processes; yield (block, result) in any order. Stops all workers on an error
    or Ctrl-C."""
    if not blocks:
        return
    use_own_temporary_folder()
    context = multiprocessing.get_context("spawn")  # image libraries may have threads, which do not survive a fork
    stop, images_done = context.Event(), context.Value("q", 0)
    workers = min(job.config.workers or os.cpu_count() or 1, len(blocks))
    without_pairs = job._replace(dataset=replace(job.dataset, splits={}, skipped={}))  # each block carries its pairs
    with ProcessPoolExecutor(
        workers, context, _start_worker, (without_pairs, stop, images_done)
    ) as pool, _interrupt_on_sigterm():
        try:
            waiting: dict[Future[_Result], Block] = {pool.submit(task, block): block for block in blocks}
            seen = 0
            while waiting:
                finished, _ = wait(waiting, _POLL_SECONDS, FIRST_COMPLETED)
                bar.update(images_done.value - seen)
                seen = images_done.value
                for future in sorted(finished, key=lambda future: future.exception() is not None):  # successes first
                    yield waiting.pop(future), future.result()
        except BrokenProcessPool as error:
            raise DatasetError(
                "a worker process died (killed, or out of memory). Finished blocks are kept: rerun the same command, "
                "with fewer --workers if memory ran out"
            ) from error
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


_worker_state: tuple[Job, Any, Any]


def _start_worker(job: Job, stop: Any, images_done: Any) -> None:
    """Initialise a worker: store the job, leave Ctrl-C to the parent, exit when the parent does."""
    global _worker_state
    _worker_state = (job, stop, images_done)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    exit_with_parent()


def _write(block: Block) -> dict[str, Any]:
    return write_block(_worker_state[0], block, *_worker_state[1:])


def _hash(block: Block) -> str:
    job, stop, images_done = _worker_state
    return hash_sources(HashedTree(job.dataset.tree), block, stop, images_done)


@contextlib.contextmanager
def _interrupt_on_sigterm() -> Iterator[None]:
    """Handle SIGTERM (sent by schedulers) like Ctrl-C, so that unfinished shards are cleaned up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _record_path(output: Path, block: Block) -> Path:
    return output / _PROGRESS_FOLDER / f"{block.name}.json"


def _load_record(output: Path, block: Block, fingerprint: str, config: PreprocessConfig) -> dict[str, Any] | None:
    """The record of a block finished by an earlier run with the same settings and sources, or None to redo it.

    With on_error "fail", a block in which an earlier run skipped images is redone, and so fails.
    """
    try:
        record: dict[str, Any] = json.loads(_record_path(output, block).read_bytes())
        sizes = [(output / shard["name"]).stat().st_size == shard["bytes"] for shard in record["shards"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    if config.on_error == "fail" and record.get("skipped_images"):
        return None
    is_right = record.get("fingerprint") == fingerprint and all(sizes) and "sources" in record
    return record if is_right else None


def _existing_set(job: Job, blocks: list[Block], place: Storage, set_hash: str) -> Manifest:
    """The manifest of a complete set, if this command would produce the same one. Raises ConfigError if not."""
    manifest, output = load_manifest(place), place.root
    if manifest.config_hash != set_hash:
        raise ConfigError(
            f"{output} already holds a complete shard set made with other settings, sources or encoders "
            f"(its config_hash is {manifest.config_hash[:12]}, this command's is {set_hash[:12]}); "
            "sets are never extended or overwritten: choose another --output, or remove that set first"
        )
    if not manifest.sources:
        _log.warning("%s was written by an older version: its sources can only be compared by name and size", output)
        return manifest
    changed = _changed(job, blocks, manifest.sources)
    if changed:
        first, more = changed[0], f" and {len(changed) - 1} more blocks" if len(changed) > 1 else ""
        raise ConfigError(
            f"{output} already holds a complete shard set, but source files have been edited since: in block "
            f"{first.name} ({first.pairs[0].image_path} to {first.pairs[-1].image_path}){more}; choose another "
            "--output, or remove that set first"
        )
    return manifest


def _remove_leftovers(output: Path, blocks: list[Block]) -> None:
    """Remove temporary files of killed runs, and shards of an unfinished run with other settings."""
    remove_leftovers(output)
    wanted = {name for block in blocks for name in block.shard_names}
    splits = {block.split for block in blocks}
    for path in output.iterdir():
        is_ours = path.suffix == ".tar" and path.name[:-11] in splits and path.name[-10:-4].isdigit()
        if is_ours and path.name not in wanted:
            path.unlink()
