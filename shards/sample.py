"""One sample, an image file and its masks: encode and decode its two tar members.

`<name>.jpg` (or `.png`) holds the encoded image; `<name>.mp` holds one msgpack map (stock webdataset decodes the suffix
`.mp`, but not `.msgpack`, to a dict):

    format  int   1
    key     str   unique in its split; contains the source file's stem
    meta    map   informative: source file, crop box, scale. For crops, crop.height and crop.width give the part of
                  the image, from its top left corner, that is not padding
    height … data   the mask record of `shards.rle`
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import msgpack
import numpy as np
import numpy.typing as npt
import simplejpeg

from shards.errors import CorruptShardError, FormatVersionError
from shards.picture_file import JPEG_START, check_pixels, decode_by_pillow, exif_orientation, upright
from shards.rle import MAX_SIDE, MaskHeader, decode_header, decode_masks, decode_segment_map, label_map_from_segments

SAMPLE_FORMAT = 1
IMAGE_SUFFIXES = ("jpg", "png")
MAX_MEMBER_STEM = 90  # bytes; leaves room for the suffix in a plain ustar name of 100


@dataclass(frozen=True, kw_only=True)
class CropSample:
    """A verified sample; image and segment map are decoded on first use and kept."""

    key: str
    image_bytes: bytes
    image_suffix: str
    record: dict[str, Any]
    header: MaskHeader
    payload: bytes  # the msgpack bytes of record and header
    ignore_index: int = 255

    def decode_into(self, out: npt.NDArray[np.uint8]) -> None:
        """Decode the image directly into a contiguous uint8 `[H,W,3]` array of its size. Raises as `image`."""
        decode_image(self.image_bytes, self.key, (self.header.height, self.header.width), out)

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """Class ids present `[N]`, ascending."""
        return self.header.labels

    @property
    def meta(self) -> dict[str, Any]:
        """Provenance: source file, and for crops the scale and box."""
        meta = self.record.get("meta", {})
        assert isinstance(meta, dict)
        return meta

    @property
    def valid_size(self) -> tuple[int, int]:
        """(height, width) without the padding on the right and below; the full size if meta does not give one."""
        crop, whole = self.meta.get("crop"), (self.header.height, self.header.width)
        said = (crop.get("height"), crop.get("width")) if isinstance(crop, dict) else (None, None)
        height, width = (part if type(part) is int and 1 <= part <= side else None
                         for part, side in zip(said, whole, strict=True))
        return whole if height is None or width is None else (height, width)

    @functools.cached_property
    def image(self) -> npt.NDArray[np.uint8]:
        """RGB pixels `[H,W,3]` uint8. Raises CorruptShardError when undecodable or not the size of the masks."""
        return decode_image(self.image_bytes, self.key, (self.header.height, self.header.width))

    @functools.cached_property
    def segment_map(self) -> npt.NDArray[Any]:
        """Index into `labels` per pixel `[H,W]`, 255 = ignored (see `rle.decode_segment_map`)."""
        return decode_segment_map(self.record, self.header)[0]

    def masks(self) -> npt.NDArray[np.bool_]:
        """One binary mask per label `[N,H,W]`."""
        return decode_masks(self.record)[0]

    def label_map(self) -> npt.NDArray[Any]:
        """Class ids `[H,W]`, `ignore_index` where unlabelled."""
        return label_map_from_segments(self.segment_map, self.labels, self.ignore_index)


def decode_image(data: bytes, name: str, size: tuple[int, int] | None = None,
                 out: npt.NDArray[np.uint8] | None = None) -> npt.NDArray[np.uint8]:
    """Decode JPEG or PNG bytes to RGB `[H,W,3]`; the size `(H,W)`, when given, is checked before decoding.

    With `out`, a contiguous uint8 `[H,W,3]` array of that size, the pixels are written to it and it is returned.
    """
    pixels = _decode_plain_jpeg(data, size, out) if data.startswith(JPEG_START) else None
    if pixels is None:
        pixels = decode_by_pillow(data, name, size)
        if out is not None:
            out[:] = pixels
    return pixels if out is None else out


def decode_reduced(data: bytes, name: str, size: tuple[int, int], least: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """RGB `[H,W,3]` of an image of `size` (H,W), at a size of at least `least`: a JPEG is decoded at a half, quarter or
    eighth of its size where that is enough, which saves most of the time. Raises as `decode_image`."""
    if min(whole // part for whole, part in zip(size, least, strict=True)) >= 2 and data.startswith(JPEG_START):
        pixels = _decode_plain_jpeg(data, size, None, least)
        if pixels is not None:
            return pixels
    return decode_image(data, name, size)


def decode_upright(data: bytes, name: str) -> npt.NDArray[np.uint8]:
    """`decode_image` with the EXIF orientation applied, as viewers show a file. At most MAX_PIXELS pixels."""
    check_pixels(data, name)
    return upright(decode_image(data, name), exif_orientation(data))


def _decode_plain_jpeg(data: bytes, size: tuple[int, int] | None, out: npt.NDArray[np.uint8] | None,
                       least: tuple[int, int] = (0, 0)) -> npt.NDArray[np.uint8] | None:
    """Same result as Pillow, by the same library (libjpeg-turbo), but straight into an array: 1.3 times as fast.

    None if the file is damaged, or has another size or colour space: then Pillow converts it or reports the error.
    """
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours not in ("YCbCr", "Gray") or max(height, width) > MAX_SIDE or size not in (None, (height, width)):
            return None
        return np.asarray(simplejpeg.decode_jpeg(data, buffer=out, min_height=least[0], min_width=least[1]))
    except ValueError:
        return None


def encode_sample(key: str, mask_record: dict[str, Any], meta: dict[str, Any]) -> bytes:
    """Encode the bytes of `<name>.mp`."""
    packed = msgpack.packb({"format": SAMPLE_FORMAT, "key": key, "meta": meta, **mask_record}, use_bin_type=True)
    assert isinstance(packed, bytes)
    return packed


def decode_sample(payload: bytes) -> tuple[dict[str, Any], MaskHeader]:
    """(record, mask header); everything but the runs is checked. Raises CorruptShardError or FormatVersionError."""
    try:
        record = msgpack.unpackb(payload, raw=False, strict_map_key=True)
    except (ValueError, msgpack.exceptions.UnpackException, RecursionError, UnicodeDecodeError) as error:
        raise CorruptShardError(f"sample is not valid msgpack: {error}") from error
    _check_record(record)
    return record, decode_header(record)


def read_header(payload: bytes) -> tuple[str, MaskHeader]:
    """(key, mask header) without unpacking the runs: parsing stops before `data`, the last field."""
    unpacker = msgpack.Unpacker(raw=False, strict_map_key=True, max_buffer_size=max(1, len(payload)))
    unpacker.feed(payload)
    fields: dict[str, Any] = {}
    try:
        for _ in range(unpacker.read_map_header()):
            name = unpacker.unpack()
            if name == "data":
                break
            fields[name] = unpacker.unpack()
    except (ValueError, TypeError, msgpack.exceptions.UnpackException, RecursionError) as error:
        raise CorruptShardError(f"sample header is not valid msgpack: {error}") from error
    _check_record(fields)
    return fields["key"], decode_header(fields)


def member_stem(key: str) -> str:
    """The tar member name of a key, without suffix: ASCII, no dot, no slash, at most 90 bytes, one-to-one.

    Stock webdataset ends a key at the first dot of the base name, so dots are percent-escaped like everything else
    outside letters, digits, '_', '-' and '~'. Long names keep their beginning and end in a hash.
    """
    escaped = quote(key, safe="").replace(".", "%2E")
    if len(escaped) <= MAX_MEMBER_STEM:
        return escaped
    return f"{escaped[: MAX_MEMBER_STEM - 33]}~{hashlib.sha256(key.encode()).hexdigest()[:32]}"


def _check_record(record: Any) -> None:
    if not isinstance(record, dict):
        raise CorruptShardError(f"sample is a {type(record).__name__}, expected a map")
    version = record.get("format")
    if type(version) is not int or version < 1:
        raise CorruptShardError(f"sample field 'format' is {version!r}, expected {SAMPLE_FORMAT}")
    if version > SAMPLE_FORMAT:
        raise FormatVersionError(
            f"sample has format {version}, this code knows up to {SAMPLE_FORMAT}: update MaskStream"
        )
    if not isinstance(record.get("key"), str) or not record["key"]:
        raise CorruptShardError(f"sample field 'key' is {record.get('key')!r}, expected a non-empty string")
    if not isinstance(record.get("meta"), dict):
        raise CorruptShardError("sample field 'meta' must be a map")
