"""Which byte layout for sparse masks? Size, encoding time and decoding time of candidates on real label maps.

Crops are cut from the label maps in --data by the training transform. Every candidate decodes to a segment map plus
labels and is checked against the crop. Times are medians of interleaved rounds in one process; compare rows, not runs.

example: python -m benchmarks.codec --data ../shared/data/ade20k-sample
"""

from __future__ import annotations

import io
import time
import zlib
from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np
import zstandard
from PIL import Image
from pycocotools import mask as coco

from benchmarks.results import Result, benchmark_parser, spread
from preprocess.config import CropConfig, DatasetConfig
from preprocess.encoding import crop_rng
from preprocess.pairs import open_dataset, read_pair
from shards import rle
from shards.crops.drawing import draw_crop
from shards.crops.label_runs import LabelRuns

Encode = Callable[[np.ndarray], bytes]
Decode = Callable[[bytes], tuple[np.ndarray, np.ndarray]]


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--data", required=True, help="ADE20K folder (official layout)")
    parser.add_argument("--crops", type=int, default=4, help="crops per image (default: 4)")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds (default: 7)")
    arguments = parser.parse_args()
    crops = load_crops(arguments.data, arguments.crops)
    runs = np.mean([sum(rle.encode_rle(crop)["runs"]) for crop in crops])
    classes = np.mean([len(rle.encode_rle(crop)["labels"]) for crop in crops])
    check(crops)
    times = measure(crops, arguments.rounds)
    result = Result("codec", arguments.results)
    table = result.table(f"{len(crops)} crops of 512x512, {classes:.1f} classes and {runs:.0f} runs on average",
                         "layout", "bytes per crop", "encode, ms", "decode, ms")
    for name, (encode, _) in CANDIDATES.items():
        size = round(np.mean([len(encode(crop)) for crop in crops]))
        table.row(name, size, *(spread(times[name, what], 1000 / len(crops)) for what in ("encode", "decode")))
    result.save()


def load_crops(root: str, per_image: int) -> list[np.ndarray]:
    dataset = open_dataset(DatasetConfig(kind="ade20k", root=root), "fail")
    crops = []
    for pair in [pair for pairs in dataset.splits.values() for pair in pairs]:
        label_map = read_pair(dataset, pair)[3]
        runs = LabelRuns(label_map, 255)
        for number in range(per_image):
            crop = draw_crop(crop_rng(0, pair.key, number), runs, CropConfig().rules)
            if crop is not None:
                record = rle.encode_runs(512, 512, *runs.cut(crop, 512))
                crops.append(rle.label_map_from_segments(*rle.decode_segment_map(record)))
    return crops


def check(crops: list[np.ndarray]) -> None:
    for name, (encode, decode) in CANDIDATES.items():
        for crop in crops:
            segments, labels = decode(encode(crop))
            assert np.array_equal(rle.label_map_from_segments(segments, labels), crop), name


def measure(crops: list[np.ndarray], rounds: int) -> dict[tuple[str, str], list[float]]:
    times: dict[tuple[str, str], list[float]] = {}
    encoded = {name: [encode(crop) for crop in crops] for name, (encode, _) in CANDIDATES.items()}
    for _ in range(rounds):
        for name, (encode, decode) in CANDIDATES.items():
            times.setdefault((name, "encode"), []).append(seconds(encode, crops))
            times.setdefault((name, "decode"), []).append(seconds(decode, encoded[name]))
    return times


def seconds(function: Callable[[Any], Any], items: list[Any]) -> float:
    started = time.process_time()
    for item in items:
        function(item)
    return time.process_time() - started


# -- candidates ---------------------------------------------------------------------------------------------


def from_label_map(label_map: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What any dense format must do after decoding: find the classes present and renumber the map."""
    counts = np.bincount(label_map.reshape(-1), minlength=256)
    labels = np.flatnonzero(counts[:255])
    table = np.full(256, 255, np.uint8)
    table[labels] = np.arange(labels.size)
    return table[label_map], labels


def encode_png(crop: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(crop).save(buffer, "PNG", compress_level=9)
    return buffer.getvalue()


def decode_png(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    return from_label_map(np.asarray(Image.open(io.BytesIO(data))))


def encode_coco(crop: np.ndarray) -> bytes:
    labels = [label for label in np.unique(crop).tolist() if label != 255]
    stack = np.asfortranarray((crop[..., None] == np.array(labels, np.uint8)).astype(np.uint8))
    return bytes(msgpack.packb([labels, [rle_["counts"] for rle_ in coco.encode(stack)]]))


def decode_coco(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    labels, counts = msgpack.unpackb(data)
    segments = np.full((512, 512), 255, np.uint8)
    if labels:
        stack = coco.decode([{"size": [512, 512], "counts": text} for text in counts])
        for index in range(len(labels)):
            segments[stack[..., index].astype(bool)] = index
    return segments, np.array(labels, np.int64)


def encode_raw(crop: np.ndarray) -> bytes:
    return crop.tobytes()


def decode_raw(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    return from_label_map(np.frombuffer(data, np.uint8).reshape(512, 512))


def encode_raw_zlib(crop: np.ndarray) -> bytes:
    return zlib.compress(crop.tobytes(), 6)


def decode_raw_zlib(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    return decode_raw(zlib.decompress(data))


def repacked(pack: Callable[[bytes], bytes], unpack: Callable[[bytes], bytes]) -> tuple[Encode, Decode]:
    """Our record with another entropy coder around the same byte planes."""

    def encode(crop: np.ndarray) -> bytes:
        record = rle.encode_rle(crop)
        planes = zlib.decompress(record["data"]) if record["data"] else b""
        return bytes(msgpack.packb(record | {"data": pack(planes)}))

    def decode(data: bytes) -> tuple[np.ndarray, np.ndarray]:
        record = msgpack.unpackb(data)
        # zlib level 0 costs the decoder a copy, but lets all candidates run the same checked code
        return rle.decode_segment_map(record | {"data": zlib.compress(unpack(record["data"]), 0)})

    return encode, decode


def encode_varint(crop: np.ndarray) -> bytes:
    """LEB128 of (gap, length) pairs, deflated: the layout most formats use."""
    record = rle.encode_rle(crop)
    planes = zlib.decompress(record["data"]) if record["data"] else b""
    total = sum(record["runs"])
    gap = rle._from_planes(planes[: total * record["gap_bytes"]], record["gap_bytes"])
    length = rle._from_planes(planes[total * record["gap_bytes"] :], record["length_bytes"])
    text = bytearray()
    for number in np.stack((gap, length), 1).reshape(-1).tolist():
        while number > 127:
            text.append(number & 127 | 128)
            number >>= 7
        text.append(number)
    return bytes(msgpack.packb(record | {"data": zlib.compress(bytes(text), 6)}))


def decode_varint(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    record = msgpack.unpackb(data)
    text = np.frombuffer(zlib.decompress(record["data"]), np.uint8)
    last = text < 128
    first = np.concatenate(([0], np.flatnonzero(last)[:-1] + 1))
    place = np.arange(text.size) - np.repeat(first, np.diff(np.append(first, text.size)))
    numbers = np.add.reduceat((text.astype(np.int64) & 127) << (7 * place), first).reshape(-1, 2)
    planes = rle._to_planes(numbers[:, 0], 4) + rle._to_planes(numbers[:, 1], 4)
    return rle.decode_segment_map(record | {"gap_bytes": 4, "length_bytes": 4, "data": zlib.compress(planes, 0)})


def encode_ours(crop: np.ndarray) -> bytes:
    return bytes(msgpack.packb(rle.encode_rle(crop)))


def decode_ours(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    return rle.decode_segment_map(msgpack.unpackb(data))


_zstd, _unzstd = zstandard.ZstdCompressor(level=9), zstandard.ZstdDecompressor()
CANDIDATES: dict[str, tuple[Encode, Decode]] = {
    "raw label map": (encode_raw, decode_raw),
    "raw label map + zlib 6": (encode_raw_zlib, decode_raw_zlib),
    "PNG, level 9": (encode_png, decode_png),
    "COCO RLE (pycocotools)": (encode_coco, decode_coco),
    "RLE varints + zlib 6": (encode_varint, decode_varint),
    "RLE byte planes, not compressed": repacked(lambda data: data, lambda data: data),
    "RLE byte planes + zstd 9": repacked(_zstd.compress, _unzstd.decompress),
    "RLE byte planes + zlib 6 (ours)": (encode_ours, decode_ours),
}

if __name__ == "__main__":
    main()
