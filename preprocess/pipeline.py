"""Turn pairs into shards, block by block, in parallel, resumably.

A finished block leaves a record in `<output>/.progress`; a rerun redoes only blocks without a matching one.
The manifest is written when every block is there, and never before.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import multiprocessing
import os
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from preprocess.blocks import Block, block_fingerprint, config_hash, plan_blocks, write_block
from preprocess.config import PreprocessConfig
from preprocess.pairs import Dataset
from preprocess.publish import publish
from shards.atomic import write_atomically
from shards.errors import ConfigError, DatasetError
from shards.manifest import MANIFEST_NAME, Manifest, hash_of, load_manifest
from shards.mirror import copy_set, files_of
from shards.shown_text import masked_value
from shards.storage import LocalStorage, Storage, is_remote, open_storage
from shards.workers import exit_with_parent

_PROGRESS_FOLDER = ".progress"
_POLL_SECONDS = 0.2
_TEMPORARY = re.compile(r"\..+\.(tar|index|json)\.\d+\.tmp")  # as ShardWriter and write_atomically name them


def write_shards(config: PreprocessConfig, dataset: Dataset) -> tuple[Manifest, bool]:
    """Write what is missing of the shard set `config.output`, then its manifest.

    A set for object storage is written to `config.staging`, mirrored from there, verified, and removed there.
    Returns (manifest, whether anything was written). Raises ConfigError when the place holds a complete
    set made with other settings, DatasetError on the first unusable image (on_error "fail").
    """
    if not config.output:
        raise ConfigError("output is not set: give --output <dir or URL>, the place for the shards")
    if not is_remote(config.output):
        return _write_to_folder(config, dataset, Path(config.output))
    destination, folder = open_storage(config.output), staging_folder(config)
    _, set_hash = _fingerprints(config, dataset, plan_blocks(config, dataset))
    with contextlib.suppress(FileNotFoundError):
        destination.read(MANIFEST_NAME)
        return _existing_set(destination, set_hash), False
    manifest, _ = _write_to_folder(replace(config, output=str(folder)), dataset, folder)
    with tqdm(total=sum(file.bytes for file in files_of(manifest)), unit="B", unit_scale=True, disable=None,
              desc="uploading") as bar:
        copy_set(folder, destination, lambda file: bar.update(file.bytes))
    shutil.rmtree(folder)
    return manifest, True


def staging_folder(config: PreprocessConfig) -> Path:
    """Where a set for `config.output` waits for its upload: one folder per URL."""
    return Path(config.staging) / hash_of(masked_value(config.output))[:16]


def _write_to_folder(config: PreprocessConfig, dataset: Dataset, output: Path) -> tuple[Manifest, bool]:
    blocks = plan_blocks(config, dataset)
    fingerprints, set_hash = _fingerprints(config, dataset, blocks)
    if (output / MANIFEST_NAME).exists():
        return _existing_set(LocalStorage(output), set_hash), False
    progress_folder = output / _PROGRESS_FOLDER
    if output.exists() and not progress_folder.exists() and any(output.iterdir()):
        raise ConfigError(f"{output} is not empty and holds no unfinished shard set; give another --output")
    progress_folder.mkdir(parents=True, exist_ok=True)
    with _only_writer(progress_folder):
        manifest = _write_missing(config, dataset, blocks, fingerprints, set_hash)
        shutil.rmtree(progress_folder)
    return manifest, True


def _fingerprints(config: PreprocessConfig, dataset: Dataset, blocks: list[Block]) -> tuple[dict[str, str], str]:
    """(fingerprint of each block by its name, hash of the whole set)"""
    fingerprint = config_hash(config, dataset)
    fingerprints = {block.name: block_fingerprint(fingerprint, block) for block in blocks}
    return fingerprints, hash_of([fingerprint, sorted(fingerprints.items())])


def _write_missing(
    config: PreprocessConfig, dataset: Dataset, blocks: list[Block], fingerprints: dict[str, str], set_hash: str
) -> Manifest:
    assert config.output is not None
    output = Path(config.output)
    records = {block.name: _load_record(output, block, fingerprints[block.name], config) for block in blocks}
    missing = [block for block in blocks if records[block.name] is None]
    _remove_leftovers(output, blocks)
    images = sum(len(block.pairs) for block in blocks)
    done = images - sum(len(block.pairs) for block in missing)
    with tqdm(total=images, initial=done, unit="img", disable=None, desc="sharding") as bar:
        for block, record in _run_blocks(config, dataset, missing, bar):
            record["fingerprint"] = fingerprints[block.name]
            write_atomically(_record_path(output, block), json.dumps(record).encode())
            records[block.name] = record
    return publish(config, dataset, blocks, records, set_hash)


@contextlib.contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    """Hold a lock that the system drops with the process. Raises ConfigError when another run holds it."""
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another run is writing {folder.parent}; wait for it, or use another --output") from None
        yield


def _run_blocks(
    config: PreprocessConfig, dataset: Dataset, blocks: list[Block], bar: tqdm[Any]
) -> Iterator[tuple[Block, dict[str, Any]]]:
    """Yield (block, record) as blocks finish, in any order. Stops all workers on an error or Ctrl-C."""
    if not blocks:
        return
    context = multiprocessing.get_context("spawn")  # image libraries may hold threads that do not survive a fork
    stop, images_done = context.Event(), context.Value("q", 0)
    workers = min(config.workers or os.cpu_count() or 1, len(blocks))
    with ProcessPoolExecutor(
        workers, context, _start_worker, (config, dataset, stop, images_done)
    ) as pool, _interrupt_on_sigterm():
        try:
            waiting: dict[Future[dict[str, Any]], Block] = {pool.submit(_worker_task, block): block for block in blocks}
            seen = 0
            while waiting:
                finished, _ = wait(waiting, _POLL_SECONDS, FIRST_COMPLETED)
                bar.update(images_done.value - seen)
                seen = images_done.value
                for future in finished:
                    yield waiting.pop(future), future.result()
        except BrokenProcessPool as error:
            raise DatasetError(
                "a worker process died (killed, or out of memory). Finished blocks are kept: run the same command "
                "again, with fewer --workers if memory was short"
            ) from error
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


_worker_state: tuple[PreprocessConfig, Dataset, Any, Any]


def _start_worker(config: PreprocessConfig, dataset: Dataset, stop: Any, images_done: Any) -> None:
    """Runs once in each worker: remember the job, leave Ctrl-C to the parent, die with the parent."""
    global _worker_state
    _worker_state = (config, dataset, stop, images_done)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    exit_with_parent()


def _worker_task(block: Block) -> dict[str, Any]:
    config, dataset, stop, images_done = _worker_state
    return write_block(config, dataset, block, stop, images_done)


@contextlib.contextmanager
def _interrupt_on_sigterm() -> Iterator[None]:
    """Treat SIGTERM (a scheduler's stop) like Ctrl-C, so that unfinished shards are cleaned up."""
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
    """The record of a block finished earlier under the same settings and sources; None: do it again.

    A block in which an earlier run skipped images is done again when this one is to fail on them.
    """
    try:
        record: dict[str, Any] = json.loads(_record_path(output, block).read_bytes())
        sizes = [(output / shard["name"]).stat().st_size == shard["bytes"] for shard in record["shards"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    if config.on_error == "fail" and record.get("skipped_images"):
        return None
    return record if record.get("fingerprint") == fingerprint and all(sizes) else None


def _existing_set(place: Storage, set_hash: str) -> Manifest:
    manifest, output = load_manifest(place), place.root
    if manifest.config_hash != set_hash:
        raise ConfigError(
            f"{output} already holds a complete shard set made with other settings, sources or encoders "
            f"(its config_hash is {manifest.config_hash[:12]}, this command's is {set_hash[:12]}); "
            "give another --output, or remove that set first"
        )
    return manifest


def _remove_leftovers(output: Path, blocks: list[Block]) -> None:
    """Remove temporary files of killed runs, and shards of an unfinished run under other settings."""
    wanted = {name for block in blocks for name in block.shard_names}
    splits = {block.split for block in blocks}
    for path in output.iterdir():
        is_ours = path.suffix == ".tar" and path.name[:-11] in splits and path.name[-10:-4].isdigit()
        if _TEMPORARY.fullmatch(path.name) or (is_ours and path.name not in wanted):
            path.unlink()
