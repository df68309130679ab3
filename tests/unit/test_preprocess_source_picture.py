"""Images of all formats, bit depths and bands, label TIFFs; damaged files raise our errors only."""

from __future__ import annotations

import importlib
import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from preprocess import extras, source_picture
from preprocess.config import DatasetConfig
from preprocess.pairs import open_dataset, read_pair
from preprocess.source_picture import Conversion, decode_source_image, encode_png, read_stored_labels
from shards.errors import ConfigError, CorruptShardError, DatasetError
from shards.manifest import load_manifest
from shards.reader import iter_samples
from shards.sample import decode_image
from shards.verify import verify
from tests.conftest import make_shards

tifffile = pytest.importorskip("tifffile")
PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
DEEP = np.random.default_rng(1).integers(0, 65536, (20, 30, 3)).astype(np.uint16)
PLAIN = Conversion()


def saved(kind: str, pixels: np.ndarray = PIXELS, mode: str | None = None, **options: Any) -> bytes:
    """A file written by Pillow."""
    buffer, image = io.BytesIO(), Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(buffer, kind, **options)
    return buffer.getvalue()


def tiff(values: np.ndarray, **options: Any) -> bytes:
    """A file written by tifffile."""
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, **options)
    return buffer.getvalue()


def decoded(data: bytes, conversion: Conversion = PLAIN) -> np.ndarray:
    return decode_source_image(data, "x", conversion)[0]


# -- formats that need no setting ---------------------------------------------------------------------------


@pytest.mark.parametrize("data", [
    saved("WEBP", lossless=True), saved("BMP"), saved("TIFF"), saved("TIFF", compression="tiff_lzw"),
    tiff(PIXELS, photometric="rgb", bigtiff=True), tiff(PIXELS, photometric="rgb", byteorder=">"),
    tiff(PIXELS, photometric="rgb", tile=(16, 16), compression="deflate"),
    tiff(PIXELS.transpose(2, 0, 1).copy(), photometric="rgb", planarconfig="separate"),
    tiff(np.concatenate([PIXELS, PIXELS[..., :1]], -1), photometric="rgb", extrasamples=["unassalpha"]),
], ids=["webp", "bmp", "tiff", "lzw", "bigtiff", "big-endian", "tiled", "planar", "alpha"])
def test_lossless_formats_give_their_pixels_and_are_encoded_again(data: bytes) -> None:
    pixels, suffix = decode_source_image(data, "x", PLAIN)
    assert np.array_equal(pixels, PIXELS) and suffix == ""
    assert np.array_equal(decode_image(encode_png(pixels), "x"), PIXELS)


@pytest.mark.parametrize(("kind", "mode"), [
    ("TIFF", "L"), ("TIFF", "LA"), ("TIFF", "RGBA"), ("TIFF", "P"), ("TIFF", "1"), ("TIFF", "CMYK"), ("BMP", "P"),
    ("BMP", "L"), ("WEBP", "RGBA"), ("PNG", "P"), ("PNG", "LA"), ("PNG", "RGBA"), ("PNG", "1"), ("JPEG", "CMYK"),
    ("JPEG", "L")])
def test_other_modes_become_rgb_as_pillow_converts_them(kind: str, mode: str) -> None:
    data = saved(kind, mode=mode, **({"lossless": True} if kind == "WEBP" else {}))
    pixels, suffix = decode_source_image(data, "x", PLAIN)
    with Image.open(io.BytesIO(data)) as image:
        assert np.array_equal(pixels, np.asarray(image.convert("RGB")))
    assert suffix == {"PNG": "png", "JPEG": "jpg"}.get(kind, "")


def test_cmyk_tiff_and_jpeg_mean_the_same_colours() -> None:
    flat = np.full((16, 16, 3), (200, 40, 90), np.uint8)
    difference = decoded(saved("TIFF", flat, "CMYK")).astype(int) - decoded(saved("JPEG", flat, "CMYK", quality=100))
    assert np.abs(difference).max() <= 3


def test_white_is_zero_is_undone_in_images() -> None:
    grey = PIXELS[..., 0]
    assert np.array_equal(decoded(tiff(grey, photometric="miniswhite"))[..., 0], 255 - grey)


def test_a_file_must_hold_one_picture() -> None:
    with pytest.raises(DatasetError, match="x is a TIFF of 3 pages, legal: one, besides overviews and masks; save"):
        decoded(tiff(np.stack([PIXELS] * 3), photometric="rgb"))
    with pytest.raises(DatasetError, match="x is an animation of 2 frames, legal: one picture"):
        decoded(saved("WEBP", save_all=True, append_images=[Image.fromarray(255 - PIXELS)]))
    with pytest.raises(DatasetError, match="x is a TIFF of 2 pages"):
        read_stored_labels(tiff(np.zeros((2, 20, 30), np.uint8), photometric="minisblack"), "x", False, 600)
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:  # as in a cloud-optimised GeoTIFF
        writer.write(PIXELS, photometric="rgb")
        writer.write(PIXELS[::2, ::2], photometric="rgb", subfiletype=1)
        writer.write(np.ones((20, 30), bool), photometric="minisblack", subfiletype=4)
    assert np.array_equal(decoded(buffer.getvalue()), PIXELS)


# -- many bits, many bands ----------------------------------------------------------------------------------


def png16(values: np.ndarray) -> bytes:
    """A 16-bit PNG of 1 to 4 bands, which Pillow cannot write."""
    return bytes(importlib.import_module("imagecodecs").png_encode(values))


@pytest.mark.parametrize(("data", "bits", "bands"), [
    (saved("PNG", DEEP[..., 0]), 16, "1 channel"), (png16(DEEP), 16, "3 channels"),
    (tiff(DEEP[..., 0]), 16, "1 channel"), (tiff(DEEP, photometric="rgb"), 16, "3 channels"),
    (tiff(PIXELS[..., 0].astype(np.float32)), 32, "1 channel")])
def test_more_than_eight_bits_are_refused_with_advice(data: bytes, bits: int, bands: str) -> None:
    with pytest.raises(DatasetError, match=rf"x has {bits} bits per channel and {bands}, legal: 8 bits, grey or RGB\. "
                                           r"Set dataset\.image_range=\[low, high\].*; or convert the images"):
        decoded(data)


@pytest.mark.parametrize("data", [
    png16(DEEP), png16(np.concatenate([DEEP, DEEP[..., :1]], -1)), tiff(DEEP, photometric="rgb"),
    tiff(DEEP, photometric="rgb", compression="deflate", predictor=True), tiff(DEEP, photometric="rgb", byteorder=">"),
    tiff(DEEP.transpose(2, 0, 1).copy(), photometric="rgb", planarconfig="separate")],
    ids=["png", "png with alpha", "tiff", "deflate", "big-endian", "planar"])
@pytest.mark.parametrize("low_high", [(0.0, 65535.0), (1000.0, 9000.0)])
def test_image_range_scales_linearly_and_cuts_off(data: bytes, low_high: tuple[float, float]) -> None:
    low, high = low_high
    expected = [[min(255, max(0, round((value - low) * 255 / (high - low)))) for value in row]
                for row in DEEP.reshape(20, -1).tolist()]
    pixels, suffix = decode_source_image(data, "x", Conversion(low_high))
    assert suffix == "" and np.abs(pixels.reshape(20, -1).astype(int) - expected).max() == 0


def test_grey_of_many_bits_floats_and_signed_values_are_mapped() -> None:
    grey = DEEP[..., 0]
    for data in (saved("PNG", grey), tiff(grey)):
        pixels = decoded(data, Conversion((0, 65535)))
        assert np.array_equal(pixels, np.rint(grey[..., None] / 257).repeat(3, -1))
    values = np.array([[0.0, 0.5, 1.0, np.nan, -3.0, np.inf]], np.float32)
    assert decoded(tiff(values), Conversion((0, 1)))[0, :, 0].tolist() == [0, 128, 255, 0, 0, 255]
    signed = np.array([[-100, 0, 100]], np.int16)
    assert decoded(tiff(signed), Conversion((-100, 100)))[0, :, 1].tolist() == [0, 128, 255]
    assert np.array_equal(decoded(saved("PNG"), Conversion((0, 65535))), PIXELS)  # 8 bits stay as they are


def test_bands_without_an_rgb_meaning_are_refused_or_chosen() -> None:
    bands = np.random.default_rng(2).integers(0, 256, (20, 30, 5), np.uint8)
    for data in (tiff(bands, photometric="minisblack", planarconfig="contig"),
                 tiff(bands.transpose(2, 0, 1).copy(), photometric="minisblack", planarconfig="separate"),
                 tiff(bands, photometric="rgb", extrasamples=["unspecified"] * 2)):
        with pytest.raises(DatasetError, match=r"x has 8 bits per channel and 5 channels.*Set dataset\.image_bands="):
            decoded(data)
        assert np.array_equal(decoded(data, Conversion(bands=(5, 1, 3))), bands[..., [4, 0, 2]])
        assert np.array_equal(decoded(data, Conversion(bands=(2,))), bands[..., [1, 1, 1]])
        with pytest.raises(DatasetError, match=r"x has 5 bands, but dataset\.image_bands is \[1, 2, 6\]"):
            decoded(data, Conversion(bands=(1, 2, 6)))
    four = tiff(bands[..., :4], photometric="rgb", extrasamples=["unspecified"])  # red, green, blue, infrared
    with pytest.raises(DatasetError, match="8 bits per channel and 4 channels"):
        decoded(four)
    deep = tiff(np.tile(DEEP, 2), photometric="minisblack", planarconfig="contig")
    with pytest.raises(DatasetError, match=r"image_range=\[low, high\].* and dataset\.image_bands="):
        decoded(deep)
    assert np.array_equal(decoded(deep, Conversion((0, 65535), (3, 2, 1))), np.rint(DEEP[..., ::-1] / 257))


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def missing(name: str) -> Any:
        if name == "imagecodecs":
            raise ImportError("No module named 'imagecodecs'")
        return real(name)

    monkeypatch.setattr(extras.importlib, "import_module", missing)
    with pytest.raises(ConfigError, match=r"x needs the extra 'tiff' \(.*imagecodecs.*\): pip install 'masks"):
        decoded(saved("PNG", DEEP[..., 0]), Conversion((0, 65535)))
    with pytest.raises(DatasetError, match=r"Set dataset[.]image_range"):  # the advice needs no extra
        decoded(saved("PNG", DEEP[..., 0]))
    assert np.array_equal(decoded(saved("TIFF")), PIXELS)


@pytest.mark.parametrize("options", [{"image_range": [5, 5]}, {"image_range": [1]}, {"image_bands": [1, 2]},
                                     {"image_bands": [0, 1, 2]}])
def test_illegal_conversions_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"dataset\.image_(range|bands) is \[.*\], legal: "):
        DatasetConfig(**options)


# -- in a shard set -----------------------------------------------------------------------------------------


def folder_of(root: Path, files: dict[str, bytes]) -> Path:
    """`images/val/<name>` with label maps of class 0 and 1."""
    for name, data in files.items():
        for top in ("images", "annotations"):
            (root / top / "val").mkdir(parents=True, exist_ok=True)
        (root / "images/val" / name).write_bytes(data)
        Image.fromarray(np.eye(20, 30, dtype=np.uint8)).save(root / f"annotations/val/{Path(name).stem}.png")
    (root / "classes.txt").write_text("a\nb\n")
    return root


def test_val_keeps_jpeg_and_png_bytes_and_stores_the_rest_without_loss(tmp_path: Path) -> None:
    files = {"a.jpg": saved("JPEG"), "b.png": saved("PNG"), "c.tif": saved("TIFF"), "d.webp": saved("WEBP"),
             "e.bmp": saved("BMP"), "f.png": saved("PNG", DEEP[..., 0]), "g.TIFF": tiff(DEEP, photometric="rgb"),
             "h.jpeg": saved("JPEG", mode="CMYK")}
    output = make_shards(tmp_path / "set", folder_of(tmp_path, files), "dataset.image_range=[0, 65535]",
                         "crops.splits=[]")
    assert verify(output) == []
    samples = {sample.key: sample for sample in iter_samples(output, "val")}
    for name, data in files.items():
        sample = samples[Path(name).stem]
        expected = decoded(data, Conversion((0, 65535)))
        assert np.array_equal(sample.image, expected) and np.array_equal(sample.label_map(), np.eye(20, 30))
        if name in ("a.jpg", "b.png", "h.jpeg"):
            assert sample.image_bytes == data and sample.image_suffix == ("png" if name == "b.png" else "jpg")
        else:
            assert sample.image_suffix == "png"
            with Image.open(io.BytesIO(sample.image_bytes)) as stored:
                assert stored.mode == "RGB" and np.array_equal(np.asarray(stored), expected)
    assert load_manifest(output).config["dataset"]["image_range"] == [0, 65535]


@pytest.mark.parametrize("kind", ["TIFF", "WEBP", "tifffile"])
def test_exif_orientation_of_tiff_and_webp(tmp_path: Path, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = tiff(PIXELS, photometric="rgb", extratags=[(0x0112, 3, 1, 6, True)]) if kind == "tifffile" else saved(
        kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    name = "x.webp" if kind == "WEBP" else "x.tif"
    root = folder_of(tmp_path, {name: data})
    config = {"kind": "folder", "root": str(root)}
    dataset = open_dataset(DatasetConfig(**config), "fail")  # type: ignore[arg-type]
    with pytest.raises(DatasetError, match=rf"{name} has EXIF orientation 6"):
        read_pair(dataset, dataset.splits["val"][0])
    ignoring = open_dataset(DatasetConfig(**config, exif_orientation="ignore"), "fail")  # type: ignore[arg-type]
    assert np.array_equal(read_pair(ignoring, ignoring.splits["val"][0]).image, PIXELS)
    Image.fromarray(np.eye(30, 20, dtype=np.uint8)).save(root / "annotations/val/x.png")
    applying = open_dataset(DatasetConfig(**config, exif_orientation="apply"), "fail")  # type: ignore[arg-type]
    pair = read_pair(applying, applying.splits["val"][0])
    assert np.array_equal(pair.image, np.rot90(PIXELS, -1)) and pair.suffix == "png"
    assert np.array_equal(decode_image(pair.image_bytes, "x"), np.rot90(PIXELS, -1))


# -- label maps ---------------------------------------------------------------------------------------------


def tiny_tiff(values: np.ndarray, bits: int, *, photometric: int = 1) -> bytes:
    """An uncompressed one-channel TIFF of 1, 2, 4 or 8 bits."""
    height, width = values.shape
    rows = b"".join(np.packbits(((row[:, None] >> np.arange(bits - 1, -1, -1)) & 1).astype(bool).ravel()).tobytes()
                    for row in values)
    tags = [(256, 3, width), (257, 3, height), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 8),
            (277, 3, 1), (278, 3, height), (279, 4, len(rows))]
    directory = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(rows)) + rows + struct.pack("<H", len(tags)) + directory + bytes(4)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("photometric", [0, 1])
def test_label_tiffs_hold_the_stored_values_or_are_refused(bits: int, photometric: int) -> None:
    labels = np.random.default_rng(bits).integers(0, 1 << bits, (20, 30), np.uint8)
    data = tiny_tiff(labels, bits, photometric=photometric)
    with Image.open(io.BytesIO(data)) as image:
        assert image.size == (30, 20)
    if bits in (1, 8) and photometric == 1:
        assert np.array_equal(read_stored_labels(data, "x", False, 600), labels)
    else:
        with pytest.raises(DatasetError, match=rf"x is a TIFF of {bits} bits.*legal for label maps: 8 or 16 bits, "
                                               "black is zero; convert it to PNG"):
            read_stored_labels(data, "x", False, 600)


@pytest.mark.parametrize(("data", "kind"), [
    (tiff(DEEP[..., 0]), "uint16"), (tiff(DEEP[..., 0], bigtiff=True, compression="zlib"), "zlib"),
    (tiff(DEEP[..., 0].astype(np.int32)), "int32"), (tiff(DEEP[..., 0], byteorder=">"), "big-endian"),
])
def test_label_tiffs_of_more_than_eight_bits(data: bytes, kind: str) -> None:
    assert np.array_equal(read_stored_labels(data, kind, False, 600), DEEP[..., 0])


def test_label_files_that_fit_no_image_are_not_decoded() -> None:
    with pytest.raises(DatasetError, match="x is 30x20, but its image has only 599 pixels; their sizes must be equal"):
        read_stored_labels(saved("BMP", PIXELS[..., 0]), "x", False, 599)
    with pytest.raises(DatasetError, match=r"x holds labels 0\.\.70000, legal: 0\.\.65535"):
        read_stored_labels(tiff(np.array([[0, 70000]], np.int32)), "x", False, 2)
    with pytest.raises(DatasetError, match="x has mode F; a label map must have one channel"):
        read_stored_labels(tiff(np.zeros((2, 2), np.float32)), "x", False, 4)
    for wrong in (saved("JPEG"), saved("WEBP")):
        with pytest.raises(CorruptShardError, match=r"x is a (JPEG|WebP) file, legal: PNG, TIFF or BMP"):
            read_stored_labels(wrong, "x", False, 600)


# -- damage -------------------------------------------------------------------------------------------------


def with_tag(data: bytes, tag: int, value: int) -> bytes:
    """A little-endian TIFF whose first page says otherwise."""
    start = struct.unpack("<I", data[4:8])[0]
    for number in range(struct.unpack("<H", data[start : start + 2])[0]):
        entry = start + 2 + 12 * number
        if struct.unpack("<H", data[entry : entry + 2])[0] == tag:
            return data[: entry + 2] + struct.pack("<HII", 4, 1, value) + data[entry + 12 :]
    raise AssertionError(f"no tag {tag}")


@pytest.mark.parametrize("data", [
    with_tag(tiff(DEEP, photometric="rgb"), 256, 1 << 30), with_tag(tiff(DEEP, photometric="rgb"), 257, 1 << 20),
    with_tag(with_tag(with_tag(tiff(DEEP, photometric="rgb"), 256, 16384), 257, 16384), 277, 60000),
    with_tag(saved("TIFF"), 257, 1 << 30), saved("BMP")[:18] + struct.pack("<ii", 1 << 30, 1 << 30) + saved("BMP")[26:],
    png16(DEEP)[:16] + struct.pack(">II", 1 << 30, 1 << 30) + png16(DEEP)[24:]])
def test_sizes_in_a_header_are_checked_before_memory_is_taken(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_picture, "_raw", None)
    monkeypatch.setattr(source_picture, "load_picture", None)
    with pytest.raises((DatasetError, CorruptShardError), match=r"legal: at most 16384 a side|not a readable"):
        decoded(data, Conversion((0, 255)))


def test_a_chain_of_pages_without_end_is_cut() -> None:
    data = tiff(PIXELS, photometric="rgb")
    start = struct.unpack("<I", data[4:8])[0]
    end = start + 2 + 12 * struct.unpack("<H", data[start : start + 2])[0]
    assert np.array_equal(decoded(data[:end] + struct.pack("<I", start) + data[end + 4 :]), PIXELS)
    with pytest.raises(CorruptShardError, match="x is not a readable TIFF file of 8 bytes"):
        decoded(b"II*\0" + bytes(4))
    with pytest.raises(DatasetError, match="x is a big-endian BigTIFF, legal: a little-endian one, or a plain TIFF"):
        decoded(tiff(PIXELS, photometric="rgb", bigtiff=True, byteorder=">"))


def test_numbers_beyond_any_file_are_damage() -> None:
    data = tiff(PIXELS, photometric="rgb", bigtiff=True)
    with pytest.raises(CorruptShardError, match=r"x is not a readable TIFF file of \d+ bytes: .*too large"):
        decoded(data[:8] + b"\xff" * 8 + data[16:])


SOUND = [saved("TIFF"), saved("TIFF", compression="tiff_lzw"), tiff(DEEP, photometric="rgb"), saved("BMP"),
         tiff(DEEP, photometric="rgb", compression="deflate"), saved("WEBP", lossless=True), saved("WEBP"), png16(DEEP),
         tiff(DEEP[..., 0], bigtiff=True), tiff(np.tile(PIXELS, 2), photometric="minisblack", planarconfig="contig")]
CONVERSION = Conversion((0, 65535), (1,))


@pytest.mark.filterwarnings("ignore::Warning")  # what libraries say about damage
@settings(max_examples=150, deadline=None)
@given(st.integers(0, len(SOUND) - 1), st.floats(0, 1), st.booleans())
def test_truncated_files_raise_our_errors(which: int, share: float, converts: bool) -> None:
    data = SOUND[which][: int(len(SOUND[which]) * share)]
    try:
        pixels = decoded(data, CONVERSION if converts else PLAIN)
    except (DatasetError, CorruptShardError) as error:
        assert str(error).startswith("x ")
    else:
        assert pixels.shape == (20, 30, 3)


@pytest.mark.filterwarnings("ignore::Warning")
@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(SOUND) - 1), st.booleans(), st.booleans(),
       st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_damaged_files_raise_our_errors(which: int, at_ends: bool, converts: bool,
                                        changes: list[tuple[float, int]]) -> None:
    data = bytearray(SOUND[which])
    for share, value in changes:
        place = int((len(data) - 1) * share)
        data[min(place, place % 200) if at_ends else place] = value
    for read in (lambda: decoded(bytes(data), CONVERSION if converts else PLAIN),
                 lambda: read_stored_labels(bytes(data), "x", converts, 600)):
        try:
            values = read()
        except (DatasetError, CorruptShardError) as error:
            assert str(error).startswith("x ")
        else:
            assert values.dtype in (np.uint8, np.uint16, np.int32)
