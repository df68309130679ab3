"""Turn pairs into shards, block by block, in parallel, resumably.

A block is a run of source images. One worker decodes each of its images once and writes crop k to the
block's k-th shard, so a shard's bytes are a function of (configuration, block) alone: any number of
processes gives the same set. A finished block leaves a record in `<output>/.progress`; a rerun redoes only
blocks without a matching one. The manifest is written when every block is there, and never before.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import threading
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image, features
from tqdm import tqdm

from preprocess.config import PreprocessConfig
from preprocess.crops import crop_rng, cut_image, cut_labels, draw_crop, pad_labels
from preprocess.pairs import Dataset, Pair, read_pair
from shards.config_file import config_to_dict
from shards.errors import ConfigError, DatasetError
from shards.manifest import (
    FORMAT_VERSION,
    INDEX_DTYPE,
    MANIFEST_NAME,
    IndexInfo,
    Manifest,
    ShardInfo,
    SplitInfo,
    hash_of,
    load_manifest,
    manifest_bytes,
)
from shards.rle import encode_rle
from shards.sample import encode_sample
from shards.writer import ShardWriter, write_atomically

_PROGRESS_FOLDER = ".progress"
_POLL_SECONDS = 0.2
NO_LABEL = "no labelled pixel in any try"


@dataclass(frozen=True, kw_only=True)
class Block:
    """A unit of work: some pairs of one split, and the names of the shards they become."""

    split: str
    number: int
    pairs: list[Pair]
    shard_names: list[str]
    is_crops: bool

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number:06d}"


class Interrupted(Exception):
    """The parent asked the workers to stop; raised between two images."""


def config_hash(config: PreprocessConfig, dataset: Dataset) -> str:
    """Hash of all that decides the shards' bytes: settings, class meaning, encoders, but not places or workers."""
    content = config_to_dict(config)
    for place in ("output", "workers", "on_error"):
        del content[place]
    for place in ("root", "class_file", "limit"):
        del content["dataset"][place]
    meaning = [asdict(item) for item in dataset.classes], dataset.ignore_labels, dataset.reduce_zero_label
    return hash_of([FORMAT_VERSION, content, meaning, producer()])


def producer() -> dict[str, str]:
    """The encoders whose bytes end up in shards. JPEG and zlib builds may differ in bytes, not in meaning."""
    return {
        "pillow": PIL.__version__,
        "libjpeg_turbo": str(features.version("libjpeg_turbo")),
        "zlib": zlib.ZLIB_RUNTIME_VERSION,
    }


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
                                is_crops=is_crops))  # fmt: skip
    return blocks


def encode_crop(
    dataset: Dataset, pair: Pair, image: Image.Image, label_map: np.ndarray, config: PreprocessConfig, number: int
) -> tuple[str, bytes, bytes, np.ndarray] | None:
    """Crop `number` of an image as (key, JPEG bytes, msgpack bytes, class ids); None without labelled pixel."""
    crop = draw_crop(crop_rng(config.seed, pair.key, number), label_map, dataset.ignore_index, config.crops)
    if crop is None:
        return None
    key = f"{pair.key}-{number:03d}"
    side = config.crops.window
    labels = pad_labels(cut_labels(label_map, crop), side, dataset.ignore_index)
    buffer = io.BytesIO()
    Image.fromarray(cut_image(image, crop, side)).save(buffer, "JPEG", quality=config.crops.jpeg_quality)
    meta = {"source": pair.image_path, "crop": asdict(crop)}
    return key, buffer.getvalue(), encode_sample(key, encode_rle(labels, dataset.ignore_index), meta), labels


def write_shards(config: PreprocessConfig, dataset: Dataset) -> tuple[Manifest, bool]:
    """Write what is missing of the shard set `config.output`, then its manifest.

    Returns (manifest, whether anything was written). Raises ConfigError when the folder holds a complete
    set made with other settings, DatasetError on the first unusable image (on_error "fail").
    """
    if config.output is None:
        raise ConfigError("output is not set: give --output <dir>, the folder for the shards")
    output, blocks, fingerprint = Path(config.output), plan_blocks(config, dataset), config_hash(config, dataset)
    fingerprints = {block.name: _block_fingerprint(fingerprint, block) for block in blocks}
    set_hash = hash_of([fingerprint, sorted(fingerprints.items())])
    if (output / MANIFEST_NAME).exists():
        return _existing_set(output, set_hash), False
    progress_folder = output / _PROGRESS_FOLDER
    progress_folder.mkdir(parents=True, exist_ok=True)
    records = {block.name: _load_record(output, block, fingerprints[block.name]) for block in blocks}
    missing = [block for block in blocks if records[block.name] is None]
    _remove_leftovers(output, blocks)
    images = sum(len(block.pairs) for block in blocks)
    done = images - sum(len(block.pairs) for block in missing)
    with tqdm(total=images, initial=done, unit="img", disable=None, desc="sharding") as bar:
        for block, record in _run_blocks(config, dataset, missing, bar):
            record["fingerprint"] = fingerprints[block.name]
            write_atomically(_record_path(output, block), json.dumps(record).encode())
            records[block.name] = record
    manifest = _publish(config, dataset, blocks, records, set_hash)
    shutil.rmtree(progress_folder)
    return manifest, True


def write_block(
    config: PreprocessConfig, dataset: Dataset, block: Block, stop: Any = None, images_done: Any = None
) -> dict[str, Any]:
    """Write the shards of one block; returns its record (JSON types): shards, index, class counts, skips."""
    assert config.output is not None
    stats = _BlockStats(len(dataset.classes))
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(ShardWriter(Path(config.output) / name)) for name in block.shard_names]
        for pair in block.pairs:
            if stop is not None and stop.is_set():
                raise Interrupted
            try:
                _write_pair(config, dataset, block, pair, writers, stats)
            except DatasetError as error:
                if config.on_error == "fail":
                    raise
                stats.skipped_images.append((pair.image_path, str(error)))
            if images_done is not None:
                with images_done.get_lock():
                    images_done.value += 1
    for writer in writers:
        if not writer.info.samples:
            writer.path.unlink()
    kept = [writer for writer in writers if writer.info.samples]
    return {
        "shards": [asdict(writer.info) for writer in kept],
        "index": [writer.index.tobytes().hex() for writer in kept],
        **stats.to_record(),
    }


def _write_pair(
    config: PreprocessConfig, dataset: Dataset, block: Block, pair: Pair, writers: list[ShardWriter], stats: _BlockStats
) -> None:
    image, image_bytes, suffix, label_map = read_pair(dataset, pair)
    if not block.is_crops:
        record = encode_rle(label_map, dataset.ignore_index)
        writers[0].write(pair.key, image_bytes, suffix, encode_sample(pair.key, record, {"source": pair.image_path}))
        stats.add(label_map, dataset.ignore_index)
    else:
        for number, writer in enumerate(writers):
            encoded = encode_crop(dataset, pair, image, label_map, config, number)
            if encoded is None:
                stats.skipped_crops[NO_LABEL] += 1
                continue
            key, jpeg, payload, labels = encoded
            writer.write(key, jpeg, "jpg", payload)
            stats.add(labels, dataset.ignore_index)
    stats.images += 1


class _BlockStats:
    """What the manifest will say about a block."""

    def __init__(self, num_classes: int) -> None:
        self.images, self.ignored_pixels = 0, 0
        self.class_pixels, self.class_samples = np.zeros(num_classes, np.int64), np.zeros(num_classes, np.int64)
        self.skipped_crops: Counter[str] = Counter()
        self.skipped_images: list[tuple[str, str]] = []

    def add(self, label_map: np.ndarray, ignore_index: int) -> None:
        counts = np.bincount(label_map.reshape(-1), minlength=ignore_index + 1)
        classes = counts[: self.class_pixels.size]
        self.class_pixels += classes
        self.class_samples += classes > 0
        self.ignored_pixels += int(counts[ignore_index])

    def to_record(self) -> dict[str, Any]:
        return {
            "images": self.images,
            "class_pixels": self.class_pixels.tolist(),
            "class_samples": self.class_samples.tolist(),
            "ignored_pixels": self.ignored_pixels,
            "skipped_crops": dict(self.skipped_crops),
            "skipped_images": self.skipped_images,
        }


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
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


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


def _block_fingerprint(fingerprint: str, block: Block) -> str:
    return hash_of([fingerprint, block.shard_names, [asdict(pair) for pair in block.pairs]])


def _record_path(output: Path, block: Block) -> Path:
    return output / _PROGRESS_FOLDER / f"{block.name}.json"


def _load_record(output: Path, block: Block, fingerprint: str) -> dict[str, Any] | None:
    """The record of a block finished earlier under the same settings and sources; None: do it again."""
    try:
        record: dict[str, Any] = json.loads(_record_path(output, block).read_bytes())
        sizes = [(output / shard["name"]).stat().st_size == shard["bytes"] for shard in record["shards"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record if record.get("fingerprint") == fingerprint and all(sizes) else None


def _existing_set(output: Path, set_hash: str) -> Manifest:
    manifest = load_manifest(output)
    if manifest.config_hash != set_hash:
        raise ConfigError(
            f"{output} already holds a complete shard set made with other settings, sources or encoders "
            f"(its config_hash is {manifest.config_hash[:12]}, this command's is {set_hash[:12]}); "
            "give another --output, or remove that folder first"
        )
    return manifest


def _remove_leftovers(output: Path, blocks: list[Block]) -> None:
    """Remove temporary files of killed runs, and shards of an unfinished run under other settings."""
    wanted = {name for block in blocks for name in block.shard_names}
    splits = {block.split for block in blocks}
    for path in output.iterdir():
        is_ours = path.suffix == ".tar" and path.name[:-11] in splits and path.name[-10:-4].isdigit()
        if (path.suffix == ".tmp" and path.name.startswith(".")) or (is_ours and path.name not in wanted):
            path.unlink()


def _publish(
    config: PreprocessConfig, dataset: Dataset, blocks: list[Block], records: dict[str, Any], set_hash: str
) -> Manifest:
    """Write the indexes, then the manifest."""
    assert config.output is not None
    output = Path(config.output)
    splits = {}
    for split in dataset.splits:
        mine = [records[block.name] for block in blocks if block.split == split]
        splits[split] = _publish_split(output, split, mine, dataset.skipped[split], split in config.crops.splits)
    settings = config_to_dict(config)
    manifest = Manifest(
        dataset=dataset.kind, classes=dataset.classes, ignore_index=dataset.ignore_index, seed=config.seed,
        crops=settings["crops"], config=_portable(settings), config_hash=set_hash, producer=producer(), splits=splits,
    )  # fmt: skip
    write_atomically(output / MANIFEST_NAME, manifest_bytes(manifest))
    return manifest


def _portable(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without places, workers and policies: equal inputs give equal manifests anywhere."""
    dataset = {key: value for key, value in settings["dataset"].items() if key not in ("root", "class_file")}
    return {"dataset": dataset, "crops": settings["crops"], "images_per_shard": settings["images_per_shard"]}


def _publish_split(
    output: Path, split: str, records: list[dict[str, Any]], unpaired: list[tuple[str, str]], is_crops: bool
) -> SplitInfo:
    shards = [ShardInfo(**shard) for record in records for shard in record["shards"]]
    index = b"".join(bytes.fromhex(entries) for record in records for entries in record["index"])
    if not shards:
        raise DatasetError(f"split {split!r} has no usable sample: every image or crop was skipped")
    index_info = IndexInfo(name=f"{split}.index", bytes=len(index), sha256=_sha256(index))
    assert len(index) == INDEX_DTYPE.itemsize * sum(shard.samples for shard in shards)
    write_atomically(output / index_info.name, index)
    skipped_crops: Counter[str] = Counter()
    for record in records:
        skipped_crops.update(record["skipped_crops"])
    skipped = [*unpaired, *(tuple(item) for record in records for item in record["skipped_images"])]
    return SplitInfo(
        kind="crops" if is_crops else "images",
        images=sum(record["images"] for record in records),
        samples=sum(shard.samples for shard in shards),
        shards=shards,
        index=index_info,
        class_pixels=np.sum([record["class_pixels"] for record in records], axis=0).tolist(),
        class_samples=np.sum([record["class_samples"] for record in records], axis=0).tolist(),
        ignored_pixels=sum(record["ignored_pixels"] for record in records),
        skipped_crops=dict(sorted(skipped_crops.items())),
        skipped_images=[{"image": image, "reason": reason} for image, reason in skipped],
    )


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
