"""Change bytes of a real set's files at random: each decoder must answer, or raise a MaskStreamError, and no more.

example: python tests/stress/fuzz.py --inputs 200000
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
import tempfile
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from shards.errors import MaskStreamError
from shards.files.storage import LocalStorage
from shards.manifest import MANIFEST_NAME, hash_of, parse_manifest
from shards.reader import ShardReader, parse_span
from shards.sample import decode_sample

LARGEST = 100_000_000  # bytes that a decoder may take for inputs of some 10 KB


def decoders(root: Path) -> dict[str, tuple[bytes, Callable[[bytes], object]]]:
    """name -> (valid input, function that reads it)"""
    reader, index_name = ShardReader(root, "train"), "train.index"
    span = reader.fetch([0])[0]
    payload = span[span.index(b".mp\x00") // 512 * 512 + 512 :]

    def read_manifest(data: bytes) -> object:
        try:  # with a right hash, so that what is behind it is tried
            content = json.loads(data)
            content.pop("manifest_sha256")
            data = json.dumps({**content, "manifest_sha256": hash_of(content)}).encode()
        except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
            pass
        return parse_manifest(data, "fuzzed")

    def read_sample(data: bytes) -> object:
        sample = parse_span(data, "fuzzed")
        return sample.image, sample.segment_map, sample.masks()

    def read_by_index(data: bytes) -> object:
        info = reader.info.index  # with a right hash and size, as above
        data = data[: info.bytes].ljust(info.bytes, b"\x01")
        index = dataclasses.replace(info, sha256=hashlib.sha256(data).hexdigest())
        split = dataclasses.replace(reader.info, index=index)
        manifest = dataclasses.replace(reader.manifest, splits={**reader.manifest.splits, "train": split})
        found = ShardReader(Overlaid(root, {index_name: data}), "train", manifest)
        try:
            return [found.read(number) for number in range(len(found))]
        finally:
            found.close()

    return {"manifest": ((root / MANIFEST_NAME).read_bytes(), read_manifest), "sample": (span, read_sample),
            "payload": (payload.rstrip(b"\x00"), decode_sample),
            "index": ((root / index_name).read_bytes(), read_by_index)}


class Overlaid(LocalStorage):
    """A folder in which some files have other content."""

    def __init__(self, folder: Path, content: dict[str, bytes]) -> None:
        super().__init__(folder)
        self.content = content

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        return self.content[name] if name in self.content else super().read(name, offset, length)

    def size(self, name: str) -> int:
        return len(self.content[name]) if name in self.content else super().size(name)


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """Change, remove, repeat or move a few bytes."""
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 6))):
        place, length = int(rng.integers(0, len(changed) or 1)), int(rng.integers(1, 40))
        kind = int(rng.integers(0, 5))
        if kind == 0:
            changed[place : place + 1] = rng.bytes(1)
        elif kind == 1:
            del changed[place : place + length]
        elif kind == 2:
            changed[place:place] = rng.bytes(length)
        elif kind == 3:
            changed[place : place + length] = changed[: length]
        else:
            changed[place : place + 4] = bytes(rng.choice([0, 255, 127, 128], 4).tolist())
    return bytes(changed)


def fuzz(root: Path, inputs: int, seed: int = 0) -> Counter[str]:
    """Outcomes by decoder. Re-raises illegal exceptions; raises MemoryError if a decoder used too much."""
    outcomes: Counter[str] = Counter()
    tracemalloc.start()
    try:
        for name, (sound, read) in decoders(root).items():
            rng = np.random.default_rng([seed, len(sound)])
            for _ in tqdm(range(inputs), desc=name, disable=None):
                data = mutated(sound, rng)
                tracemalloc.reset_peak()
                try:
                    read(data)
                    outcomes[f"{name}: read"] += 1
                except MaskStreamError:
                    outcomes[f"{name}: refused"] += 1
                if tracemalloc.get_traced_memory()[1] > LARGEST:
                    raise MemoryError(f"{name} took {tracemalloc.get_traced_memory()[1]} bytes for {data!r}")
    finally:
        tracemalloc.stop()
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=200_000, help="inputs for each decoder (default: 200000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the changes (default: 0)")
    arguments = parser.parse_args()
    from preprocess.make_scenes import write_scenes
    from tests.conftest import make_shards

    with tempfile.TemporaryDirectory() as folder:
        write_scenes(Path(folder) / "scenes", {"train": 2, "val": 1}, seed=0)
        root = make_shards(Path(folder) / "set", Path(folder) / "scenes")
        for outcome, count in sorted(fuzz(root, arguments.inputs, arguments.seed).items()):
            print(f"{outcome} {count}")


if __name__ == "__main__":
    main()
