"""Small files that decode to huge images are refused by their header, before any such memory is allocated."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from preprocess.config import DatasetConfig
from preprocess.pairs import open_dataset, read_pair
from shards.errors import CorruptShardError, DatasetError
from shards.manifest import load_manifest
from shards.picture import save_picture
from shards.picture_file import MAX_PIXELS, PNG_START, quiet
from shards.reader import ShardReader
from shards.rle import encode_rle
from shards.sample import decode_image, decode_upright, encode_sample
from shards.verify import verify
from shards.writer import ShardWriter
from tests.conftest import REPOSITORY
from tests.support.hand_made import jpeg, write_manifest, write_set


def png_bomb(side: int, depth: int = 8, colour: int = 2) -> bytes:
    """A PNG whose header declares side x side pixels; all zero, compressed a thousandfold."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, depth, colour, 0, 0, 0)
    packer, row = zlib.compressobj(9), bytes(1 + side * (3 if colour == 2 else 1))
    pixels = b"".join(packer.compress(row) for _ in range(64)) + packer.flush()
    return PNG_START + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def jpeg_bomb(side: int) -> bytes:
    """A small JPEG with a large size in its header."""
    data = bytearray(jpeg(64, 64))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", side, side)
    return bytes(data)


BOMBS = {"jpg": jpeg_bomb(16_000), "png": png_bomb(16_000)}


@pytest.fixture
def no_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("it began to decode")

    monkeypatch.setattr("shards.sample.simplejpeg.decode_jpeg", refuse)
    monkeypatch.setattr("shards.picture_file.load_picture", refuse)


@pytest.mark.usefixtures("no_decoding")
@pytest.mark.parametrize("kind", BOMBS)
def test_an_image_larger_than_its_record_is_refused_by_its_header(tmp_path: Path, kind: str) -> None:
    with pytest.raises(CorruptShardError, match="image of k is 16000x16000, its masks are 64x64"):
        decode_image(BOMBS[kind], "k", (64, 64))
    with pytest.raises(CorruptShardError, match="16000x16000, its masks are 64x64"):
        decode_image(BOMBS[kind], "k", (64, 64), np.empty((64, 64, 3), np.uint8))


def test_a_record_larger_than_the_manifest_knows_is_refused(tmp_path: Path) -> None:
    """Valid in itself: 16000x16000 pixels of one class, a few hundred bytes as runs."""
    write_set(tmp_path, [[jpeg(64, 64)] * 3])
    record = encode_rle(np.zeros((64, 64), np.uint8))
    huge = encode_rle(np.zeros((16_000, 16_000), np.uint8))
    with ShardWriter(tmp_path / "train-000000.tar") as writer:
        writer.write("0-0", jpeg(64, 64), "jpg", encode_sample("0-0", record, {}))
        writer.write("0-1", BOMBS["jpg"], "jpg", encode_sample("0-1", huge, {}))
        writer.write("0-2", jpeg(64, 64), "jpg", encode_sample("0-2", record, {}))
    write_manifest(tmp_path, [writer.info], writer.index.tobytes(), 3, (64, 64))
    reader = ShardReader(tmp_path, "train")
    assert reader.read(0).image.shape == reader.read(2).image.shape
    with pytest.raises(CorruptShardError, match=r"train-000000\.tar, sample 1 \(offset \d+\): it is 16000x16000, but "
                       r"according to the manifest no sample of its split has more than 12288 pixels"):
        reader.read(1)
    reader.close()
    assert any("sample 1" in problem and "it is 16000x16000" in problem for problem in verify(tmp_path))


def test_crops_are_bounded_by_their_own_size(scene_shards: Path) -> None:
    manifest = load_manifest(scene_shards)
    assert manifest.most_pixels("train") == 64 * 64
    assert manifest.most_pixels("val") == manifest.splits["val"].labelled_pixels + manifest.splits["val"].ignored_pixels


@pytest.mark.usefixtures("no_decoding")
@pytest.mark.parametrize("kind", BOMBS)
def test_a_photo_of_too_many_pixels_is_refused_with_the_true_reason(kind: str) -> None:
    with pytest.raises(CorruptShardError, match=rf"photo of {len(BOMBS[kind])} bytes is 16000x16000 = 256000000 "
                       rf"pixels, legal: at most {MAX_PIXELS}; cut it"):
        decode_upright(BOMBS[kind], "photo")
    with pytest.raises(CorruptShardError, match="photo is 16400x16400 pixels, legal: at most 16384 a side"):
        decode_upright(jpeg_bomb(16_400) if kind == "jpg" else png_bomb(16_400), "photo")


def test_no_memory_is_taken_for_a_refused_photo(tmp_path: Path) -> None:
    for kind, data in BOMBS.items():
        (tmp_path / f"bomb.{kind}").write_bytes(data)
        code = ("import sys, resource\nfrom pathlib import Path\nfrom shards.sample import decode_upright\n"
                "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
                "try: decode_upright(Path(sys.argv[1]).read_bytes(), 'photo')\n"
                "except Exception as error: print(type(error).__name__)\n"
                "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)")
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path / f"bomb.{kind}")], cwd=REPOSITORY, text=True,
                              capture_output=True, timeout=60, check=True)
        name, megabytes = done.stdout.split()
        assert name == "CorruptShardError" and int(megabytes) < 50


def test_a_label_map_larger_than_its_image_is_not_decoded(scenes: Path, tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, name, data in (("images", "a.jpg", jpeg(64, 64)), ("annotations", "a.png", png_bomb(16_000, colour=0))):
        (tmp_path / folder / "train").mkdir(parents=True)
        (tmp_path / folder / "train" / name).write_bytes(data)
    (tmp_path / "classes.txt").write_text("a\nb\n")

    def refuse(*_: object) -> None:
        raise AssertionError("it began to decode")

    monkeypatch.setattr("preprocess.source_picture.load_picture", refuse)
    dataset = open_dataset(DatasetConfig(kind="folder", root=str(tmp_path)), "fail")
    with pytest.raises(DatasetError, match=r"a\.png is 16000x16000, but its image has only 4096 pixels"):
        read_pair(dataset, dataset.splits["train"][0])


@pytest.mark.parametrize("name", ["...png", "..png", ".png", "...jpg", "a..JPG", ".x.jpeg"])
def test_pictures_are_written_under_any_name(tmp_path: Path, name: str) -> None:
    save_picture(Image.new("RGB", (4, 4)), tmp_path / name)
    with Image.open(io.BytesIO((tmp_path / name).read_bytes())) as written:
        assert written.format == ("PNG" if name.endswith("png") else "JPEG")


def test_threads_leave_the_filters_of_warnings_as_they_were() -> None:
    """Two that are quiet at overlapping times: the one that leaves last would put back what the other had set."""
    before, inside, go_on = list(warnings.filters), threading.Event(), threading.Event()

    def first() -> None:
        with quiet():
            inside.set()
            go_on.wait(20)

    def second() -> None:
        inside.wait(20)
        threading.Timer(0.05, go_on.set).start()
        with quiet():
            assert go_on.is_set(), "one at a time"
            with quiet():  # as when the reader of EXIF opens a picture
                pass

    with ThreadPoolExecutor(2) as threads:
        for done in [threads.submit(first), threads.submit(second)]:
            done.result(20)
    assert list(warnings.filters) == before
