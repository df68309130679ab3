"""docs/format.md: its example, decoded by hand from the page itself, must be what our code reads and writes."""

from __future__ import annotations

import dataclasses
import io
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from PIL import Image

from shards.manifest import FORMAT_VERSION, Manifest, ShardInfo, SplitInfo
from shards.reader import parse_span
from shards.rle import encode_rle
from shards.sample import SAMPLE_FORMAT, encode_sample
from shards.writer import ShardWriter
from tests.conftest import REPOSITORY

PAGE = (REPOSITORY / "docs" / "format.md").read_text(encoding="utf-8")
HEX = re.compile(r"([0-9a-f]{4})  ((?:[0-9a-f]{2} ?)+)(?: +(.*))?")


def block(name: str) -> list[str]:
    """The lines of the page's only block in a given language."""
    (text,) = re.findall(rf"^```{name}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    return text.splitlines()


def dump(name: str) -> tuple[bytes, list[tuple[bytes, str]]]:
    """(bytes, [(bytes of a line and of those below it without a note, its note)]) of a hex dump; `*` are zeros."""
    data, parts = b"", list[tuple[bytes, str]]()
    for line in block(name):
        if line == "*":
            continue
        offset = int(line[:4], 16)
        data += bytes(offset - len(data))
        if found := HEX.fullmatch(line):
            part, note = bytes.fromhex(found[2]), (found[3] or "").strip()
            data += part
            parts = [*parts, (part, note)] if note else [*parts[:-1], (parts[-1][0] + part, parts[-1][1])]
    return data, parts


def labels() -> np.ndarray[Any, Any]:
    return np.array([[255 if label == "." else int(label) for label in line.split()] for line in block("labels")],
                    np.uint8)


def decoded_by_hand(record: dict[str, Any]) -> np.ndarray[Any, Any]:
    """Decoded as the page explains, run by run."""
    planes, total = zlib.decompress(record["data"]), sum(record["runs"])

    def numbers(first: int, width: int) -> list[int]:
        return [sum(planes[first + plane * total + run] << 8 * plane for plane in range(width)) for run in range(total)]

    gaps = numbers(0, record["gap_bytes"])
    lengths = numbers(total * record["gap_bytes"], record["length_bytes"])
    assert len(planes) == total * (record["gap_bytes"] + record["length_bytes"])
    found, run = np.full(record["height"] * record["width"], 255, np.uint8), 0
    for label, count in zip(record["labels"], record["runs"], strict=True):
        position = 0
        for _ in range(count):
            start = position + gaps[run]
            position = start + lengths[run]
            found[start:position] = label
            run += 1
    return found.reshape(record["height"], record["width"])


def test_the_record_of_the_page_is_decoded_by_hand_and_by_our_code() -> None:
    payload, _ = dump("record")
    record = msgpack.unpackb(payload)
    assert (decoded_by_hand(record) == labels()).all()
    image, _ = dump("image")
    span = b"".join(header(name, len(data)) + data + bytes(-len(data) % 512)
                    for name, data in (("lake.png", image), ("lake.mp", payload)))
    sample = parse_span(span, "docs/format.md")
    assert sample.key == "lake" and sample.meta == {"source": "images/val/lake.png"}
    assert (sample.label_map() == labels()).all() and sample.image.shape == (4, 6, 3)
    assert np.asarray(Image.open(io.BytesIO(image))).shape == (4, 6, 3)


def header(name: str, size: int) -> bytes:
    """Field names from the page's table."""
    text = bytearray(512)
    for offset, value in ((0, name), (100, "0000644"), (108, "0000000"), (116, "0000000"), (124, f"{size:011o}"),
                          (136, "0" * 11), (148, " " * 8), (156, "0"), (257, "ustar\x0000")):
        text[offset : offset + len(value)] = value.encode()
    text[148:156] = f"{sum(text):06o}\0 ".encode()
    return bytes(text)


def test_our_writer_makes_the_bytes_of_the_page(tmp_path: Path) -> None:
    (payload, _), (image, _) = dump("record"), dump("image")
    written = msgpack.unpackb(encode_sample("lake", encode_rle(labels()), {"source": "images/val/lake.png"}))
    shown = msgpack.unpackb(payload)
    assert list(written) == list(shown)
    for record in (written, shown):  # another zlib may deflate otherwise
        record["data"] = zlib.decompress(record["data"])
    assert written == shown
    with ShardWriter(tmp_path / "val-000000.tar") as writer:
        writer.write("lake", image, "png", payload)
    data = (tmp_path / "val-000000.tar").read_bytes()
    assert data[1024:1536] == dump("header")[0] == header("lake.mp", len(payload))
    assert data[:512] == header("lake.png", len(image)) and data[-1024:] == bytes(1024)
    record = struct.pack("<QII", 0, len(data) - 1024, zlib.crc32(data[:-1024]))
    assert writer.index.tobytes() == dump("index")[0] == record


def test_each_note_of_the_record_says_what_the_bytes_are() -> None:
    kinds = {0x80: "map", 0x90: "array", 0xA0: "str"}
    for part, note in dump("record")[1]:
        if note.startswith('"'):
            assert part.decode() == note.strip('"')
        elif note.isdigit():
            assert part == bytes([int(note)])
        elif found := re.fullmatch(r"(map|array|str) of (\d+).*", note):
            kind = 0xA0 if part[0] >= 0xA0 else part[0] & 0xF0
            assert (kinds[kind], part[0] - kind) == (found[1], int(found[2]))


def test_the_tables_name_all_fields() -> None:
    for kind in (Manifest, SplitInfo, ShardInfo):
        for field in dataclasses.fields(kind):
            assert f"`{field.name}`" in PAGE or f'"{field.name}"' in PAGE, field.name
    for name in msgpack.unpackb(dump("record")[0]):
        assert f"`{name}`" in PAGE
    assert f"format version {FORMAT_VERSION}" in PAGE and SAMPLE_FORMAT == 1
