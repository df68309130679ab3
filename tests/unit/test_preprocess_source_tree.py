"""Real-world datasets: links, label PNGs below 8 bits, EXIF orientation, missing labels."""

from __future__ import annotations

import copy
import errno
import io
import json
import logging
import os
import stat
import struct
import subprocess
import sys
import unicodedata
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from preprocess.config import DatasetConfig, PreprocessConfig
from preprocess.pairs import SourcePair, open_dataset, read_pair
from preprocess.pipeline import _planned
from preprocess.source_tree import FolderTree, NoSuchFile, SourceTree, ZipTree, open_tree
from shards.cli.config_file import load_config
from shards.errors import ConfigError, DatasetError
from shards.manifest import canonical_json, hash_of, load_manifest, manifest_bytes
from shards.reader import iter_samples
from shards.sample import decode_image, decode_upright
from shards.verify import verify
from tests.conftest import REPOSITORY, make_shards
from tests.support.hand_made import as_version_1

CLASSES = "".join(f"class {i}\n" for i in range(16))


def picture(height: int, width: int) -> np.ndarray:
    """An image with four different corners."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // (width - 1), y * 255 // (height - 1), (x + y) % 256], -1).astype(np.uint8)


def write_pairs(root: Path, names: list[str], labels: np.ndarray | None = None) -> Path:
    """Write pairs `images/<name>.jpg` and `annotations/<name>.png`, and a table of 16 classes."""
    labels = np.arange(64 * 96).reshape(64, 96).astype(np.uint8) % 16 if labels is None else labels
    for name in names:
        for top, suffix, pixels in (("images", "jpg", picture(*labels.shape)), ("annotations", "png", labels)):
            path = root / top / f"{name}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    (root / "classes.txt").write_text(CLASSES)
    return root


def as_zip(root: Path, path: Path) -> Path:
    """The folder packed like `zip -y`: links stay links."""
    with zipfile.ZipFile(path, "w") as archive:
        for folder, folders, names in os.walk(root):
            for name in (*folders, *names):
                file = Path(folder, name)
                if file.is_symlink():
                    link = zipfile.ZipInfo(file.relative_to(root).as_posix())
                    link.external_attr = 0o120777 << 16
                    archive.writestr(link, os.readlink(file))
                elif file.is_file():
                    archive.write(file, file.relative_to(root))
    return path


def tree_of(root: Path, kind: str, tmp_path: Path) -> SourceTree:
    return FolderTree(root) if kind == "folder" else ZipTree(as_zip(root, tmp_path / "it.zip"))


# -- links --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_two_links_to_one_folder_are_two_folders(tmp_path: Path, kind: str) -> None:
    root = write_pairs(tmp_path / "data", ["pool/b", "pool/a"])
    for top in ("images", "annotations"):
        for split in ("val", "train"):
            (root / top / split).symlink_to("pool")
    tree = tree_of(root, kind, tmp_path)
    assert list(tree.files("images")) == [f"images/{folder}/{name}.jpg" for folder in ("pool", "train", "val")
                                          for name in ("a", "b")]
    assert tree.read("images/val/a.jpg") == (root / "images/pool/a.jpg").read_bytes()
    assert tree.files("images/train") == tree.files("images/train/") != {}
    source = root if kind == "folder" else tmp_path / "it.zip"
    output = make_shards(tmp_path / "set", source, "dataset.splits={train: train, val: val}", "crops.splits=[]")
    for split in ("train", "val"):
        assert [sample.key for sample in iter_samples(output, split)] == ["a", "b"]


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize("target", [".", "..", "../..", "../../images/train"])
def test_only_links_that_lead_back_up_are_cut_and_they_are_named(
        tmp_path: Path, kind: str, target: str, caplog: pytest.LogCaptureFixture) -> None:
    root = write_pairs(tmp_path / "data", ["train/x", "train/deep/y"])
    (root / "images/train/again").symlink_to(target)
    (root / "images/train/more").symlink_to("deep")
    tree = tree_of(root, kind, tmp_path)
    with caplog.at_level(logging.WARNING):
        found = list(tree.files("images/train"))
        assert list(tree.files("images")) == found
    assert found == ["images/train/deep/y.jpg", "images/train/more/y.jpg", "images/train/x.jpg"]
    assert [record.getMessage().split(" to its own")[0] for record in caplog.records] == [
        f"{tree.name}: skipping the link images/train/again"]


def test_links_in_a_circle_end_once_each_path_was_seen(tmp_path: Path) -> None:
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.txt").write_text(name)
        (tmp_path / name / "next").symlink_to(f"../{other}")
    assert list(FolderTree(tmp_path).files("a")) == ["a/a.txt", "a/next/b.txt"]
    (tmp_path / "a" / "self").symlink_to("self")
    (tmp_path / "a" / "none").symlink_to("nowhere")
    tree = FolderTree(tmp_path)
    assert list(tree.files("a")) == ["a/a.txt", "a/next/b.txt", "a/none", "a/self"]
    for name in ("a/none", "a/self"):
        with pytest.raises(DatasetError, match=rf"{name} cannot be read"):
            tree.read(name)


def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "images/closed").mkdir(parents=True)
    real = os.scandir

    def scandir(path: str) -> Any:
        if path.endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DatasetError, match=r"closed cannot be read: .*Permission denied"):
        FolderTree(tmp_path).files("images")


# -- label PNGs ---------------------------------------------------------------------------------------------


def png(samples: np.ndarray, bits: int, colour: int, *, interlaced: bool = False, extra: bytes = b"") -> bytes:
    """A one-channel PNG [H,W], written bit by bit: colour type 0 is grey, 3 a palette."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    def rows(part: np.ndarray) -> bytes:
        split = (part[..., None] >> np.arange(bits - 1, -1, -1)) & 1  # [h, w, bits], highest first
        return b"".join(b"\0" + np.packbits(row.reshape(-1).astype(bool)).tobytes() for row in split if row.size)

    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    parts = [samples[y::dy, x::dx] for y, x, dy, dx in passes] if interlaced else [samples]
    height, width = samples.shape
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlaced)
    palette = chunk(b"PLTE", bytes(3 << bits)) if colour == 3 else b""
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + palette + extra
            + chunk(b"IDAT", zlib.compress(b"".join(map(rows, parts)))) + chunk(b"IEND", b""))


TRANSPARENT_GREY = struct.pack(">I", 2) + b"tRNS\0\1" + struct.pack(">I", zlib.crc32(b"tRNS\0\1"))
TRANSPARENT_INDEX = struct.pack(">I", 2) + b"tRNS\0\x80" + struct.pack(">I", zlib.crc32(b"tRNS\0\x80"))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("transparent", [False, True])
@pytest.mark.parametrize("colour", [0, 3])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_label_maps_hold_the_stored_samples(tmp_path: Path, bits: int, colour: int, transparent: bool,
                                            interlaced: bool, packed: bool) -> None:
    labels = np.random.default_rng(bits).integers(0, min(16, 1 << bits), (37, 43), np.uint8)
    root = write_pairs(tmp_path / "data", ["train/x"], labels)
    extra = (TRANSPARENT_INDEX if colour else TRANSPARENT_GREY) if transparent else b""
    data = png(labels, bits, colour, interlaced=interlaced, extra=extra)
    assert Image.open(io.BytesIO(data)).size == (43, 37)
    (root / "annotations/train/x.png").write_bytes(data)
    source = as_zip(root, tmp_path / "it.zip") if packed else root
    dataset = open_dataset(DatasetConfig(kind="folder", root=str(source)), "fail")
    assert np.array_equal(read_pair(dataset, dataset.splits["train"][0]).label_map, labels)


def test_sixteen_bits_stay_and_several_channels_are_refused(tmp_path: Path) -> None:
    labels = np.arange(40 * 40, dtype=np.uint16).reshape(40, 40) % 300
    root = write_pairs(tmp_path / "data", ["train/x"], labels)
    (root / "classes.txt").write_text("".join(f"class {i}\n" for i in range(300)))
    dataset = open_dataset(DatasetConfig(kind="folder", root=str(root)), "fail")
    pair = dataset.splits["train"][0]
    assert np.array_equal(read_pair(dataset, pair).label_map, labels)
    for mode in ("LA", "RGBA", "RGB"):
        Image.fromarray(labels.astype(np.uint8)).convert(mode).save(root / pair.label_path)
        with pytest.raises(DatasetError, match=rf"x\.png has mode {mode}; a label map must have one channel"):
            read_pair(dataset, pair)


# -- EXIF orientation ---------------------------------------------------------------------------------------


def turned(orientation: int, how: str, pixels: np.ndarray) -> bytes:
    """A file whose upright view is `pixels`, stored as by a camera held that way."""
    exif, image = Image.Exif(), Image.fromarray(pixels)
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose that takes the upright view to the stored one
    stored = image.transpose(Image.Transpose(undo[orientation])) if orientation in undo else image
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    if how == "jpeg":
        stored.save(buffer, "JPEG", quality=95, exif=exif)
    elif how == "png":
        stored.save(buffer, "PNG", exif=exif)
    elif how == "png, at its end":  # where Pillow finds it only after decoding
        stored.save(buffer, "PNG", exif=exif)
        data = buffer.getvalue()
        start = data.index(b"eXIf") - 4
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        return data[:start] + data[end:-12] + data[start:end] + data[-12:]
    else:
        xmp = f'<x:xmpmeta><rdf:Description tiff:Orientation="{orientation}"/></x:xmpmeta>'.encode()
        stored.save(buffer, "JPEG", quality=95, xmp=xmp)
    return buffer.getvalue()


def turned_pair(tmp_path: Path, orientation: int, how: str, labels: np.ndarray) -> Path:
    root = write_pairs(tmp_path / "data", ["train/x", "val/x"], labels)
    for split in ("train", "val"):
        (root / f"images/{split}/x.jpg").unlink()
        suffix = "png" if how.startswith("png") else "jpg"
        (root / f"images/{split}/x.{suffix}").write_bytes(turned(orientation, how, picture(*labels.shape)))
    return root


LABELS = (np.add.outer(np.arange(72) // 8, np.arange(104) // 8) % 16).astype(np.uint8)


def read_first(root: Path, policy: str) -> SourcePair:
    dataset = open_dataset(DatasetConfig(kind="folder", root=str(root), exif_orientation=policy), "fail")
    return read_pair(dataset, dataset.splits["val"][0])


def seen_by_anybody(data: bytes, pixels: np.ndarray) -> None:
    """Decoders that honour EXIF, and those that do not, find the same pixels."""
    assert np.array_equal(decode_image(data, "x"), pixels) and np.array_equal(decode_upright(data, "x"), pixels)
    with Image.open(io.BytesIO(data)) as stored:
        assert np.array_equal(np.asarray(stored.convert("RGB")), pixels)
        assert np.array_equal(np.asarray(ImageOps.exif_transpose(stored).convert("RGB")), pixels)


@pytest.mark.parametrize("orientation", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("how", ["jpeg", "png", "png, at its end", "xmp"])
def test_orientation_is_refused_or_applied_as_the_setting_says(tmp_path: Path, orientation: int, how: str) -> None:
    root = turned_pair(tmp_path, orientation, how, LABELS)
    with pytest.raises(DatasetError, match=rf"images/val/x\.\w+ has EXIF orientation {orientation}.*"
                                           r"dataset\.exif_orientation=apply.*dataset\.exif_orientation=ignore"):
        read_first(root, "refuse")
    pair = read_first(root, "apply")
    assert np.abs(np.asarray(pair.image).astype(int) - picture(72, 104)).mean() < 4  # of a JPEG
    assert np.array_equal(pair.label_map, LABELS) and pair.suffix == "png"
    seen_by_anybody(pair.image_bytes, np.asarray(pair.image))


@pytest.mark.parametrize("orientation", [3, 6])
@pytest.mark.parametrize("how", ["jpeg", "png", "xmp"])
def test_ignored_orientation_is_ignored_by_everybody_downstream(tmp_path: Path, orientation: int, how: str) -> None:
    stored = decode_image(turned(orientation, how, picture(72, 104)), "x")
    root = turned_pair(tmp_path, orientation, how, LABELS)
    labels = (np.arange(stored.shape[0] * stored.shape[1]).reshape(stored.shape[:2]) % 16).astype(np.uint8)
    Image.fromarray(labels).save(root / "annotations/val/x.png")
    pair = read_first(root, "ignore")
    assert np.array_equal(pair.image, stored) and np.array_equal(pair.label_map, labels)
    seen_by_anybody(pair.image_bytes, stored)


@pytest.mark.parametrize("orientation", [0, 1, 9, 65535])
@pytest.mark.parametrize("how", ["jpeg", "png"])
def test_upright_files_and_illegal_values_keep_their_bytes(tmp_path: Path, orientation: int, how: str) -> None:
    root = turned_pair(tmp_path, orientation, how, LABELS)
    for policy in ("refuse", "apply", "ignore"):
        assert read_first(root, policy).image_bytes == turned(orientation, how, picture(72, 104))


def test_a_turned_label_map_is_refused_too(tmp_path: Path) -> None:
    root = write_pairs(tmp_path / "data", ["val/x"], LABELS)
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(LABELS).save(root / "annotations/val/x.png", exif=exif)
    with pytest.raises(DatasetError, match=r"annotations/val/x\.png has EXIF orientation 3"):
        read_first(root, "refuse")
    assert np.array_equal(read_first(root, "apply").label_map, LABELS)  # as it is stored


def test_crops_and_whole_images_of_turned_files_fit_their_labels(tmp_path: Path) -> None:
    root = turned_pair(tmp_path, 6, "jpeg", LABELS)
    for split in ("train", "val"):  # an image that shows its labels
        pixels = np.stack([LABELS * 16] * 3, -1)
        (root / f"images/{split}/x.jpg").write_bytes(turned(6, "jpeg", pixels))
    output = make_shards(tmp_path / "set", root, "dataset.exif_orientation=apply", "crops.min_scale=1",
                         "crops.max_scale=1")
    for split in ("train", "val"):
        for sample in iter_samples(output, split):
            inside = sample.label_map() < 255
            assert np.abs(sample.image[..., 0][inside].astype(int) - sample.label_map()[inside] * 16).mean() < 12
    assert verify(output) == []


def test_a_label_map_that_fits_the_stored_view_only_is_refused_with_both_sizes(tmp_path: Path) -> None:
    root = turned_pair(tmp_path, 6, "jpeg", LABELS)
    for split in ("train", "val"):
        Image.fromarray(np.ascontiguousarray(LABELS.T)).save(root / f"annotations/{split}/x.png")
    with pytest.raises(DatasetError, match=r"x\.jpg is 104x72 pixels \(EXIF orientation 6 applied, as set by "
                                           r"dataset\.exif_orientation=apply\) but .* is 72x104"):
        read_first(root, "apply")


# -- labels that are not there ------------------------------------------------------------------------------


def shard_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(REPOSITORY / "preprocess/make_shards.py"), "--dataset", "folder",
                           "--workers", "0", "crops.size=64", "crops.per_image=1", *arguments],
                          capture_output=True, text=True, check=False)


def test_classes_without_pixels_and_much_that_is_ignored_are_named_for_each_split(tmp_path: Path) -> None:
    labels = np.zeros((96, 96), np.uint8)
    labels[:, 32:] = 255
    root = write_pairs(tmp_path / "data", ["train/x", "val/x"], labels)
    (root / "classes.txt").write_text("ground\nobject\n")
    result = shard_command("--root", str(root), "--output", str(tmp_path / "set"), "crops.splits=[]")
    assert result.returncode == 0
    for split in ("train", "val"):
        assert f"warning: split '{split}' has no pixel of 1 of 2 classes: 1 object" in result.stderr
        assert f"warning: split '{split}' has 66.7% ignored pixels (warn_ignored is 50%)" in result.stderr
    quiet = shard_command("--root", str(root), "--output", str(tmp_path / "set"), "crops.splits=[]", "warn_ignored=0.7")
    assert "already complete" in quiet.stdout and "ignored pixels" not in quiet.stderr  # it changes no byte
    info = subprocess.run([sys.executable, "-m", "shards", "info", str(tmp_path / "set")], capture_output=True,
                          text=True, check=True).stdout
    assert info.count("classes without a pixel: 1 of 2: 1 object") == info.count("ignored pixels: 66.7%") == 2


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_without_a_labelled_pixel_is_not_published(tmp_path: Path, split: str) -> None:
    root = write_pairs(tmp_path / "data", ["train/x", "val/x"])
    Image.fromarray(np.full((64, 96), 255, np.uint8)).save(root / f"annotations/{split}/x.png")
    with pytest.raises(DatasetError, match=rf"split '{split}' has no labelled pixel"):
        make_shards(tmp_path / "set", root, "crops.splits=[]")
    assert not (tmp_path / "set/manifest.json").exists()
    write_pairs(root, [f"{split}/x"])
    output = make_shards(tmp_path / "set", root, "crops.splits=[]")
    assert load_manifest(output).splits[split].labelled_pixels == 64 * 96


# -- layouts ------------------------------------------------------------------------------------------------


def splits_of(root: Path, **options: object) -> dict[str, list[tuple[str, str]]]:
    dataset = open_dataset(DatasetConfig(kind="folder", root=str(root), **options), "fail")  # type: ignore[arg-type]
    return {split: [(pair.image_path, pair.label_path) for pair in pairs] for split, pairs in dataset.splits.items()}


@pytest.mark.parametrize("options", [{}, {"splits": {"train": "train", "val": "val"}}])
def test_folders_of_images_and_labels_may_have_different_names_for_a_split(tmp_path: Path,
                                                                           options: dict[str, object]) -> None:
    root = write_pairs(tmp_path, ["train/x", "val/y"])
    (root / "annotations/train").rename(root / "annotations/Training")
    (root / "annotations/val").rename(root / "annotations/validation")
    assert splits_of(root, **options) == {"train": [("images/train/x.jpg", "annotations/Training/x.png")],
                                          "val": [("images/val/y.jpg", "annotations/validation/y.png")]}


def test_test_images_without_labels_are_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_pairs(tmp_path, ["train/x", "val/y", "testing/z"])
    (root / "annotations/testing/z.png").unlink()
    assert set(splits_of(root)) == {"train", "val"}
    assert "skipping images/testing, which has no labels in annotations" in caplog.text
    with pytest.raises(DatasetError, match="no label map in annotations/testing"):
        splits_of(root, splits={"train": "train", "test": "testing"})  # asked for by name


def test_a_split_without_its_other_half_says_what_to_type(tmp_path: Path) -> None:
    root = write_pairs(tmp_path, ["train/x", "val/y"])
    (root / "annotations/val/y.png").unlink()
    with pytest.raises(ConfigError, match=r"has images/val, but annotations has no folder for the split 'val', only "
                                          r"\['train'\]\. Rename one of them to 'val', or .*dataset\.splits="):
        splits_of(root)


def test_names_composed_differently_are_one_name_where_that_is_clear(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "straße é") for form in ("NFC", "NFD"))
    root = write_pairs(tmp_path / "a", [f"train/{decomposed}/{decomposed}"])
    (root / f"annotations/train/{decomposed}").rename(root / f"annotations/train/{composed}")
    (root / f"annotations/train/{composed}/{decomposed}.png").rename(
        root / f"annotations/train/{composed}/{composed}.png")
    assert splits_of(root) == {"train": [(f"images/train/{decomposed}/{decomposed}.jpg",
                                          f"annotations/train/{composed}/{composed}.png")]}
    both = write_pairs(tmp_path / "b", [f"train/{composed}", f"train/{decomposed}"])
    assert len(splits_of(both)["train"]) == 2  # each its own
    (both / f"annotations/train/{composed}.png").unlink()
    with pytest.raises(DatasetError, match="no label map in annotations/train"):
        splits_of(both)


# -- reasons ------------------------------------------------------------------------------------------------


def test_sound_files_are_read_whatever_pillow_takes_for_a_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_pairs(tmp_path, ["train/x"])
    text = PngImagePlugin.PngInfo()
    text.add_text("note", "x" * (2 << 20), zip=True)
    (root / "images/train/x.jpg").unlink()
    Image.fromarray(picture(64, 96)).save(root / "images/train/x.png", pnginfo=text)
    labels = np.arange(64 * 96, dtype=np.uint8).reshape(64, 96) % 16
    Image.fromarray(labels).save(root / "annotations/train/x.png", pnginfo=text)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    dataset = open_dataset(DatasetConfig(kind="folder", root=str(root)), "fail")
    pair = read_pair(dataset, dataset.splits["train"][0])
    assert np.array_equal(pair.image, picture(64, 96)) and np.array_equal(pair.label_map, labels)


@pytest.mark.parametrize(("data", "reason"), [
    (b"\x89PNG\r\n\x1a\n" + b"\0\0\0\x0dIHDR" + struct.pack(">IIBBBBB", 16385, 1, 8, 0, 0, 0, 0) + b"\0" * 40,
     r"bad header checksum|broken PNG file"),
    (png(np.zeros((1, 16385), np.uint8), 8, 0), r"16385x1 pixels, legal: at most 16384 a side"),
    (png(np.zeros((4, 4), np.uint8), 8, 0)[:-30], r"broken PNG file"),
    (png(np.arange(4096).reshape(64, 64).astype(np.uint8), 8, 0)[:-40], r"damaged or truncated: .+"),
    (b"GIF89a" + bytes(20), r"not a readable PNG, TIFF or BMP file of 26 bytes, it begins with b'GIF89a"),
    (b"\xff\xd8\xff\xe0" + bytes(20), r"is a JPEG file, legal: PNG, TIFF or BMP"),
])
def test_a_refusal_says_its_reason(tmp_path: Path, data: bytes, reason: str) -> None:
    root = write_pairs(tmp_path, ["train/x"])
    (root / "annotations/train/x.png").write_bytes(data)
    dataset = open_dataset(DatasetConfig(kind="folder", root=str(root)), "fail")
    with pytest.raises(DatasetError, match=rf"annotations/train/x\.png .*({reason})"):
        read_pair(dataset, dataset.splits["train"][0])


# -- edited sources -----------------------------------------------------------------------------------------


def edit_at_equal_size(path: Path) -> None:
    """Swap two classes of an uncompressed label map, and restore its timestamps."""
    times = path.stat()
    data = path.read_bytes()
    labels = np.asarray(Image.open(path))
    Image.fromarray((labels ^ 1).astype(np.uint8)).save(path, compress_level=0)
    assert path.stat().st_size == len(data) and path.read_bytes() != data
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.fixture
def uncompressed(tmp_path: Path) -> Path:
    root = write_pairs(tmp_path / "data", [f"train/{number}" for number in range(4)])
    for path in root.glob("annotations/train/*.png"):
        Image.open(path).save(path, compress_level=0)
    return root


def test_a_complete_set_notices_a_label_edited_at_equal_size(uncompressed: Path, tmp_path: Path) -> None:
    options = ("images_per_shard=2", "crops.splits=[]")
    output = make_shards(tmp_path / "set", uncompressed, *options)
    make_shards(output, uncompressed, *options)  # already complete
    edit_at_equal_size(uncompressed / "annotations/train/3.png")
    with pytest.raises(ConfigError, match=r"source files have been edited since: in block train-000001 "
                                          r"\(images/train/2\.jpg to images/train/3\.jpg\); choose another --output"):
        make_shards(output, uncompressed, *options)


def test_an_unfinished_set_does_only_edited_blocks_again(uncompressed: Path, tmp_path: Path) -> None:
    options = ("images_per_shard=1", "crops.splits=[]")
    last = uncompressed / "annotations/train/3.png"
    whole = last.read_bytes()
    last.write_bytes(b"damaged")
    with pytest.raises(DatasetError):
        make_shards(tmp_path / "set", uncompressed, *options)
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "set").glob("train-*.tar")}
    assert len(done) == 3
    edit_at_equal_size(uncompressed / "annotations/train/1.png")
    last.write_bytes(whole)
    output = make_shards(tmp_path / "set", uncompressed, *options)
    again = {path.name for path, time in done.items() if path.stat().st_mtime_ns != time}
    assert again == {"train-000001.tar"}
    fresh = make_shards(tmp_path / "fresh", uncompressed, *options)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == {path.name: path.read_bytes()
                                                                          for path in fresh.iterdir()}


def test_a_set_of_an_older_version_is_still_complete_and_keeps_its_identity(scenes: Path, tmp_path: Path,
                                                                            caplog: pytest.LogCaptureFixture) -> None:
    output = as_version_1(make_shards(tmp_path / "set", scenes))
    content = json.loads((output / "manifest.json").read_bytes())
    for name in ("sources", "manifest_sha256"):
        del content[name]
    del content["config"]["dataset"]["exif_orientation"]
    config = load_config(PreprocessConfig, None, [
        "dataset.kind=folder", f"dataset.root={scenes}", f"output={output}", "crops.size=64", "crops.per_image=2",
        "images_per_shard=6"])
    content["config_hash"] = _planned(config, open_dataset(config.dataset, "fail"), 1).set_hash
    old = (canonical_json({**content, "manifest_sha256": hash_of(content)}) + "\n").encode()
    (output / "manifest.json").write_bytes(old)
    manifest = load_manifest(output)
    assert manifest.sha256 == hash_of(content) and manifest_bytes(manifest) == old
    make_shards(output, scenes)
    assert "only be compared by name and size" in caplog.text and (output / "manifest.json").read_bytes() == old


def test_a_zip_with_an_entry_for_its_root_is_listed(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.writestr("/", "")
        archive.writestr("images/a.jpg", "x")
    assert ZipTree(tmp_path / "z.zip").files("") == {"images/a.jpg": 1}


def packed(path: Path, *names: str, system: int = 3) -> Path:
    """A zip whose entries have these names, as they are; each holds its number."""
    with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings(action="ignore"):  # of names that occur twice
        for number, name in enumerate(names):
            item = zipfile.ZipInfo(name)
            item.create_system = system
            archive.writestr(item, "" if name.endswith("/") else str(number))
    return path


@pytest.mark.parametrize("name", ["images/a.jpg", "images//a.jpg", "./images/a.jpg", "images/./a.jpg", "/images/a.jpg",
                                  "//images///a.jpg", "images\\a.jpg", ".\\images/a.jpg"])
def test_a_name_in_a_zip_may_be_written_in_many_ways(tmp_path: Path, name: str) -> None:
    tree = ZipTree(packed(tmp_path / "z.zip", name, system=0))
    assert tree.files("") == tree.files("images") == {"images/a.jpg": 1} and tree.read("images/a.jpg") == b"0"
    assert copy.copy(tree).read("images/a.jpg") == b"0"  # by what pickle uses too
    with pytest.raises(NoSuchFile, match=r"images/b\.jpg cannot be read: there is no such file"):
        tree.read("images/b.jpg")


def test_a_backslash_from_elsewhere_than_windows_is_part_of_a_name(tmp_path: Path) -> None:
    tree = ZipTree(packed(tmp_path / "z.zip", "images\\a.jpg", "images/a.jpg"))
    assert tree.files("") == {"images/a.jpg": 1, "images\\a.jpg": 1} and tree.read("images\\a.jpg") == b"0"


@pytest.mark.parametrize(("names", "message"), [
    (["images/../a.jpg"], r"the entry 'images/\.\./a\.jpg' has a part '\.\.', legal: paths below the archive's root"),
    (["../a.jpg"], r"the entry '\.\./a\.jpg' has a part"), (["/.."], r"the entry '/\.\.' has a part"),
    (["images/../"], r"the entry 'images/\.\./' has a part"), (["a\\..\\..\\b.jpg"], r"b\.jpg' has a part '\.\.'"),
    (["images/a.jpg", "images/a.jpg"], r"the entry 'images/a\.jpg' names 'images/a\.jpg' twice, legal: once; pack the"),
    (["images/a.jpg", "/images//a.jpg"], r"'/images//a\.jpg' names 'images/a\.jpg', as 'images/a\.jpg' does, legal: "),
    (["a", "a/b.jpg"], "the entry 'a' is a file, but other entries are below 'a/'"),
    (["a/b.jpg", "./a"], r"the entry '\./a' is a file, but other entries are below 'a/'"),
    (["a", "a/"], "the entry 'a' is a file, but other entries are below 'a/'"),
    (["."], r"the entry '\.' is a file without a name")])
def test_an_entry_without_a_place_in_its_zip_is_named(tmp_path: Path, names: list[str], message: str) -> None:
    path = packed(tmp_path / "z.zip", "images/fine.jpg", *names, system=0)
    with pytest.raises(DatasetError, match=rf"z\.zip: .*{message}"):
        ZipTree(path)
    with pytest.raises(DatasetError, match=rf"z\.zip: .*{message}"):
        open_dataset(DatasetConfig(kind="folder", root=str(path)), "fail")


def test_folders_may_occur_twice_in_a_zip_and_need_no_files(tmp_path: Path) -> None:
    tree = ZipTree(packed(tmp_path / "z.zip", "./", "images/", "images//", "empty/", "images/x/", "images/a.jpg"))
    assert tree.files("") == {"images/a.jpg": 1} and not tree.has_files("empty") and not tree.has_files("images/x")


def test_the_target_of_a_link_in_a_zip_has_a_limit(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "z.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        link = zipfile.ZipInfo("images/link")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        link.compress_type = zipfile.ZIP_DEFLATED
        archive.writestr(link, "x" * 5000)
    with pytest.raises(DatasetError, match=r"z\.zip:images/link has 5000 bytes unpacked, legal: at most 4096"):
        ZipTree(tmp_path / "z.zip")


@pytest.mark.parametrize("said", [10, 1 << 20])
def test_an_entry_that_unpacks_to_another_size_than_it_says_is_named(tmp_path: Path, said: int) -> None:
    path = tmp_path / "z.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images/a.jpg", bytes(5000))
    data = bytearray(path.read_bytes())
    place = data.index(b"PK\1\2") + 24  # the size in the central directory
    data[place : place + 4] = struct.pack("<I", said)
    path.write_bytes(data)
    with pytest.raises(DatasetError, match=r"images/a\.jpg cannot be read: "):
        ZipTree(path).read("images/a.jpg")


def test_a_zip_of_many_files_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was opened again for each name at its top, as the dataset might be in a folder there."""
    path = packed(tmp_path / "z.zip", *(f"{number}.txt" for number in range(300)), "data/images/a.jpg", "other/b")
    opened: list[object] = []
    real = zipfile.ZipFile

    def zip_file(*arguments: object) -> zipfile.ZipFile:
        opened.append(arguments)
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("preprocess.source_tree.zipfile.ZipFile", zip_file)
    assert open_tree(path, ["images"]).files("images") == {"images/a.jpg": 3}
    assert len(opened) == 2


def test_a_member_that_unpacks_to_more_than_is_legal_is_not_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "z.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images/a.jpg", bytes(5000))
    with pytest.raises(DatasetError, match=r"images/a\.jpg has 5000 bytes unpacked, legal: at most 4999"):
        ZipTree(tmp_path / "z.zip").read("images/a.jpg", 4999)
