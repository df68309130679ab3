"""Decode the pictures of a source dataset: images of all supported formats, and label maps as stored.

Images of more than 8 bits, or with other bands than grey or RGB, have no obvious meaning as RGB: they are refused, or
converted as `dataset.image_range` and `dataset.image_bands` say, after decoding by tifffile and imagecodecs (the extra
`tiff`). A file must hold one picture: TIFFs of several pages (but for thumbnails and overviews) and animated WebP files
are refused.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    EXTRASAMPLES,
    IMAGELENGTH,
    IMAGEWIDTH,
    PHOTOMETRIC_INTERPRETATION,
    SAMPLESPERPIXEL,
    ImageFileDirectory_v2,
)

from preprocess.config import DatasetConfig
from preprocess.extras import import_extra
from shards.errors import CorruptShardError, DatasetError
from shards.picture_file import DECODER_ERRORS, PNG_START, kind_of, load_picture, open_label_map, open_picture
from shards.rle import MAX_CLASSES, MAX_SIDE
from shards.sample import decode_image

IMAGE_FORMATS = ("JPEG", "PNG", "WebP", "TIFF", "BMP")
READABLE_FORMATS = {"JPEG": "jpg", "PNG": "png"}  # which shards hold: suffix of each
_COLOR_MODES = ("RGB", "RGBA", "P", "L", "1")
_LABEL_MODES = ("1", "L", "P", "I", "I;16", "I;16B")  # single-channel values; palettes hold the index
_BIG_TIFF, _BIG_TIFF_OF_MOTOROLA = b"II+\0", b"MM\0+"  # how files begin
_MIN_IS_WHITE, _SEPARATED, _ALPHA = 0, 5, (1, 2)  # values in TIFF files
_KIND_OF_PAGE, _OVERVIEW_OR_MASK = 254, 1 | 4  # a tag, and its bits
_MOST_PAGES = 1000  # looked at; more would be a damaged chain
_LARGEST_DECODED = 1 << 32  # bytes of a picture that tifffile or imagecodecs decode
_ROWS = 1024  # converted at once, as float64
_PNG_DEPTH, _PNG_COLOR, _PNG_BANDS = 24, 25, {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_LUMA_AND_COLOR = (1, 2, 3, 4)  # bands with an RGB meaning: grey or RGB, with or without alpha
Pixels = npt.NDArray[np.uint8]


class Conversion(NamedTuple):
    """How pixels without an RGB meaning become RGB (`dataset.image_range`, `dataset.image_bands`)."""

    range: tuple[float, float] | None = None  # stored values that become 0 and 255
    bands: tuple[int, ...] = ()  # the bands, counted from 1, that become red, green and blue (or grey, if one)

    @classmethod
    def of(cls, config: DatasetConfig) -> Conversion:
        """As the settings say."""
        low_high = (config.image_range[0], config.image_range[1]) if config.image_range else None
        return cls(low_high, tuple(config.image_bands))


def decode_source_image(data: bytes, name: str, conversion: Conversion) -> tuple[Pixels, str]:
    """RGB pixels uint8 [H, W, 3], and the suffix under which shards hold the file as it is; "" if they cannot.

    Raises CorruptShardError or DatasetError naming the file.
    """
    bits, bands, has_meaning = _described(data, name)
    if bits <= 8 and has_meaning and not conversion.bands:
        if suffix := READABLE_FORMATS.get(kind_of(data) or ""):
            return decode_image(data, name), suffix
        with open_picture(data, name, IMAGE_FORMATS) as image:
            frames = getattr(image, "n_frames", 1) if image.format == "WEBP" else 1
            if frames > 1:
                raise DatasetError(f"{name} is an animation of {frames} frames, legal: one picture")
            return np.asarray(load_picture(image, name).convert("RGB")), ""
    if (bits > 8 and conversion.range is None) or not (has_meaning or conversion.bands):
        wanted = [*(["dataset.image_range=[low, high], the stored values that become 0 and 255"] if bits > 8 else []),
                  *([] if has_meaning else ["dataset.image_bands=[r, g, b], the bands to use, counted from 1"])]
        raise DatasetError(f"{name} has {bits} bits per channel and {bands} channel{'s' if bands > 1 else ''}, legal: "
                           f"8 bits, grey or RGB. Set {' and '.join(wanted)}; or convert the images")
    return _converted(_raw(data, name), bits, conversion, name), ""


def encode_png(pixels: Pixels) -> bytes:
    """The pixels as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def read_stored_labels(data: bytes, name: str, reads_colors: bool, most_pixels: int) -> npt.NDArray[Any]:
    """Stored values [H, W] of a label map, or its colours uint8 [H, W, 3]; palette images give the index or the colour.

    Raises DatasetError when it is not such an image, or has more than `most_pixels`; CorruptShardError when damaged.
    """
    with open_label_map(data, name) as image:
        modes, advice = (_COLOR_MODES, f"legal with labels: rgb: {', '.join(_COLOR_MODES)}") if reads_colors else (
            _LABEL_MODES, "a label map must have one channel of class ids (for colours, write a class table with "
                          "labels: rgb and set dataset.class_file to it)")
        if image.mode not in modes:
            raise DatasetError(f"{name} has mode {image.mode}; {advice}")
        if image.format == "TIFF":
            _tiff_tags(data, name)
            if not reads_colors:
                _check_label_tiff(image, name)
        if image.width * image.height > most_pixels:
            raise DatasetError(f"{name} is {image.width}x{image.height}, but its image has only {most_pixels} pixels; "
                               "their sizes must be equal")
        loaded = load_picture(image, name)
        values = np.asarray(loaded.convert("RGB") if reads_colors else loaded)
    if values.min() < 0 or values.max() > MAX_CLASSES:
        raise DatasetError(f"{name} holds labels {values.min()}..{values.max()}, legal: 0..{MAX_CLASSES}")
    return values.astype(np.uint8) if values.dtype == bool else values


def _check_label_tiff(image: Any, name: str) -> None:
    """Refuse what Pillow would scale or invert."""
    bits = image.tag_v2.get(BITSPERSAMPLE, (1,))[0]
    if bits not in (1, 8, 16, 32) or image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == _MIN_IS_WHITE:
        raise DatasetError(f"{name} is a TIFF of {bits} bits{', white is zero' if bits in (1, 8, 16) else ''}, legal "
                           "for label maps: 8 or 16 bits, black is zero; convert it to PNG")


def _described(data: bytes, name: str) -> tuple[int, int, bool]:
    """(bits per band, bands, whether they mean grey or RGB with or without alpha)"""
    if data.startswith(PNG_START) and len(data) > _PNG_COLOR:
        open_picture(data, name, IMAGE_FORMATS).close()
        return data[_PNG_DEPTH], _PNG_BANDS.get(data[_PNG_COLOR], 1), True
    if kind_of(data) != "TIFF":
        open_picture(data, name, IMAGE_FORMATS).close()
        return 8, 3, True
    tags = _tiff_tags(data, name)
    bits, bands, extra = tags[BITSPERSAMPLE], tags[SAMPLESPERPIXEL], tags[EXTRASAMPLES]
    width, height = tags[IMAGEWIDTH], tags[IMAGELENGTH]
    if max(width, height) > MAX_SIDE or width * height * bands * bits > 8 * _LARGEST_DECODED:
        raise DatasetError(f"{name} is {width}x{height} pixels with {bands} bands of {bits} bits, legal: at most "
                           f"{MAX_SIDE} a side, and {_LARGEST_DECODED} bytes")
    if tags[PHOTOMETRIC_INTERPRETATION] == _SEPARATED:
        return bits, bands, bits == 8 and bands == 4  # CMYK, which Pillow converts as in JPEG files
    return bits, bands, bands in _LUMA_AND_COLOR and (bands in (1, 3) or extra in _ALPHA)


def _tiff_tags(data: bytes, name: str) -> dict[int, int]:
    """Tags of a TIFF's first page (of lists the first value), also of one that Pillow cannot decode.

    Raises DatasetError when there are more pages that are neither overviews nor masks.
    """
    if data.startswith(_BIG_TIFF_OF_MOTOROLA):
        raise DatasetError(f"{name} is a big-endian BigTIFF, legal: a little-endian one, or a plain TIFF; convert it")
    first: dict[int, int] = {}
    try:
        directory = ImageFileDirectory_v2(data[:16] if data.startswith(_BIG_TIFF) else data[:8])
        stream, pages, seen = io.BytesIO(data), 0, set[int]()
        while (place := directory.next) and place not in seen and len(seen) < _MOST_PAGES:
            seen.add(place)
            stream.seek(place)
            with warnings.catch_warnings(action="ignore"):
                directory.load(stream)
            tags = {tag: _first(directory.get(tag, default)) for tag, default in (
                (BITSPERSAMPLE, 1), (SAMPLESPERPIXEL, 1), (EXTRASAMPLES, 0), (IMAGEWIDTH, 0), (IMAGELENGTH, 0),
                (PHOTOMETRIC_INTERPRETATION, 0), (_KIND_OF_PAGE, 0))}
            first = first or tags
            pages += not (tags[_KIND_OF_PAGE] & _OVERVIEW_OR_MASK) or tags is first
    except DECODER_ERRORS as error:
        raise CorruptShardError(f"{name} is not a readable TIFF file of {len(data)} bytes: {error}") from error
    if not first:
        raise CorruptShardError(f"{name} is not a readable TIFF file of {len(data)} bytes: it has no page")
    if pages > 1:
        raise DatasetError(f"{name} is a TIFF of {pages} pages, legal: one, besides overviews and masks; save the "
                           "pages as files of their own")
    return first


def _first(value: Any) -> int:
    return int(value[0] if isinstance(value, Sequence) else value)


def _raw(data: bytes, name: str) -> npt.NDArray[Any]:
    """Stored values [H, W] or [H, W, bands], by tifffile or imagecodecs."""
    tifffile, codecs = (import_extra(module, "tiff", name) for module in ("tifffile", "imagecodecs"))
    try:
        if kind_of(data) != "TIFF":
            return np.asarray(codecs.imread(data))
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            page = file.pages.first
            values = np.asarray(page.asarray())
            return np.moveaxis(values, 0, -1) if page.axes.startswith("S") else values
    except (*DECODER_ERRORS, RuntimeError, tifffile.TiffFileError) as error:
        raise CorruptShardError(f"{name} is not a readable image: {error}") from error


def _converted(values: npt.NDArray[Any], bits: int, conversion: Conversion, name: str) -> Pixels:
    values = values[..., None] if values.ndim == 2 else values
    bands = conversion.bands or ((1,) if values.shape[-1] <= 2 else (1, 2, 3))
    if max(bands) > values.shape[-1]:
        raise DatasetError(f"{name} has {values.shape[-1]} bands, but dataset.image_bands is {list(bands)}")
    pixels = np.empty((*values.shape[:2], 3), np.uint8)
    for start in range(0, len(values), _ROWS):
        chosen = values[start : start + _ROWS, :, [band - 1 for band in bands]]
        if bits > 8:
            assert conversion.range is not None
            low, high = conversion.range
            scaled = (chosen.astype(np.float64) - low) * 255 / (high - low)
            chosen = np.nan_to_num(np.clip(np.rint(scaled), 0, 255))  # NaN marks missing pixels: black
        pixels[start : start + _ROWS] = chosen
    return pixels
