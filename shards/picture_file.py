"""Open picture files with Pillow: size limits, damage and EXIF orientation are handled here for everybody.

Pillow's own limits do not apply: an intact file is read up to MAX_SIDE pixels a side, whatever metadata it carries.
Unreadable files raise CorruptShardError with Pillow's reason.
"""

from __future__ import annotations

import io
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from shards.errors import CorruptShardError
from shards.rle import MAX_SIDE

MAX_PIXELS = 1 << 27  # limit for pictures whose size is not known from elsewhere; 400 MB decoded
Pixels = npt.NDArray[np.uint8]



class _StoredTiff(TiffImageFile):
    """A TIFF whose pixels stay as they are stored. Pillow's class rotates them by their orientation tag while decoding,
    unlike those of all other formats, and has a limit of its own on their number."""

    def _open(self) -> None:
        super()._open()
        self._size = getattr(self, "_tile_size", self._size)

    def load_prepare(self) -> None:
        ImageFile.ImageFile.load_prepare(self)

    def load_end(self) -> None:
        pass


JPEG_START = b"\xff\xd8\xff"
PNG_START = b"\x89PNG\r\n\x1a\n"
_KINDS: dict[str, tuple[type[ImageFile.ImageFile], tuple[bytes, ...]]] = {  # reader, and how such files begin
    "JPEG": (JpegImageFile, (JPEG_START,)), "PNG": (PngImageFile, (PNG_START,)), "BMP": (BmpImageFile, (b"BM",)),
    "TIFF": (_StoredTiff, (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")), "WebP": (WebPImageFile, (b"RIFF",)),
}
_IHDR, _DEPTH, _COLOUR, _IHDR_CRC = slice(12, 16), 24, 25, slice(29, 33)  # positions in a PNG's header
_GREY, _PALETTE = 0, 3  # colour types of PNG
_TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")  # irrelevant to the pixels, and Pillow limits their size
# What Pillow raises on damaged files, found by fuzzing.
DECODER_ERRORS = (OSError, EOFError, ValueError, SyntaxError, AssertionError, LookupError, TypeError, ArithmeticError,
                  struct.error)
UPRIGHT = 1  # EXIF orientation of an image that is stored upright
_TO_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_by_pillow(data: bytes, name: str, size: tuple[int, int] | None = None) -> Pixels:
    """RGB pixels `[H,W,3]` uint8 of a JPEG or PNG; the size `(H,W)`, when given, is checked before decoding."""
    with open_picture(data, name, ("JPEG", "PNG")) as image:
        if size is not None and (image.height, image.width) != size:
            raise CorruptShardError(
                f"image of {name} is {image.height}x{image.width}, its masks are {size[0]}x{size[1]}"
            )
        if image.mode.startswith("I") or (data.startswith(PNG_START) and data[_DEPTH] > 8):
            raise CorruptShardError(f"{name} has 16 bits per channel; convert it to 8")
        pixels = load_picture(image, name)
        return np.asarray(pixels if pixels.mode == "RGB" else pixels.convert("RGB"))  # convert() would copy


def check_pixels(data: bytes, name: str) -> None:
    """Raise CorruptShardError for a picture of more than MAX_PIXELS, without decoding it: small files can be huge."""
    with open_picture(data, name, ("JPEG", "PNG")) as image:
        if image.width * image.height > MAX_PIXELS:
            raise CorruptShardError(f"{name} of {len(data)} bytes is {image.width}x{image.height} = "
                                    f"{image.width * image.height} pixels, legal: at most {MAX_PIXELS}; cut it into "
                                    "parts")


def open_label_map(data: bytes, name: str) -> ImageFile.ImageFile:
    """Open a PNG, TIFF or BMP of class ids such that its pixels will be the stored values.

    Pillow treats grey as brightness and scales 1, 2 and 4 bits to 0..255, but leaves palette indices alone. So a grey
    file of less than 8 bits is opened as if it had a palette, by changing one byte of its header.
    """
    if data.startswith(PNG_START) and data[_IHDR] == b"IHDR" and len(data) >= _IHDR_CRC.stop:
        if data[_COLOUR] == _GREY and data[_DEPTH] < 8:
            header = data[_IHDR] + data[_IHDR.stop : _COLOUR] + bytes([_PALETTE]) + data[_COLOUR + 1 : _IHDR_CRC.start]
            data = data[: _IHDR.start] + header + zlib.crc32(header).to_bytes(4, "big") + data[_IHDR_CRC.stop :]
    elif data.startswith(PNG_START):
        raise CorruptShardError(f"{name} is not a readable PNG file: it does not begin with an IHDR chunk")
    return open_picture(data, name, ("PNG", "TIFF", "BMP"))


def kind_of(data: bytes) -> str | None:
    """The format of a picture file by its first bytes: JPEG, PNG, BMP, TIFF or WebP; None for all others."""
    return next((kind for kind, (_, starts) in _KINDS.items() if data.startswith(starts)), None)


def open_picture(data: bytes, name: str, formats: tuple[str, ...]) -> ImageFile.ImageFile:
    """Read a picture's header. Raises CorruptShardError when it is not one of `formats` or is too large."""
    found = kind_of(data)
    legal = " or ".join([", ".join(formats[:-1]), formats[-1]] if len(formats) > 1 else formats)
    if found is None:
        begins = f", it begins with {data[:8]!r}" if data else ""
        raise CorruptShardError(f"{name} is not a readable {legal} file of {len(data)} bytes{begins}")
    if found not in formats:
        raise CorruptShardError(f"{name} is a {found} file, legal: {legal}")
    try:
        image = _opened(_without(data, _TEXT_CHUNKS))
    except DECODER_ERRORS as error:
        raise CorruptShardError(f"{name} is not a readable {found} file of {len(data)} bytes: {error}") from error
    if max(image.size) > MAX_SIDE:
        raise CorruptShardError(f"{name} is {image.width}x{image.height} pixels, legal: at most {MAX_SIDE} a side")
    return image


def _opened(data: bytes) -> ImageFile.ImageFile:
    """Bypasses Image.open, which has its own limits and hides the reason. Warnings of damaged metadata are ignored."""
    reader, _ = _KINDS[kind_of(data) or "PNG"]  # an unknown file makes the PNG reader say so
    with quiet():
        return reader(io.BytesIO(data))


@contextmanager
def quiet() -> Iterator[None]:
    """Without Python's warnings. Their filters belong to all threads, so only one at a time changes them."""
    with _filters_in_use(), warnings.catch_warnings(action="ignore"):
        yield


@cache
def _filters_in_use() -> threading.RLock:
    return threading.RLock()


def load_picture(image: ImageFile.ImageFile, name: str) -> Image.Image:
    """Decode the pixels of an opened picture. Raises CorruptShardError when they are damaged or truncated."""
    try:
        image.load()
    except DECODER_ERRORS as error:
        raise CorruptShardError(f"{name} is not a readable image, it is damaged or truncated: {error}") from error
    return image


def exif_orientation(data: bytes) -> int:
    """EXIF orientation of a picture, 1 to 8; 1 (upright) if it is missing or invalid."""
    if data.startswith(JPEG_START) and b"Exif" not in data and b"Orientation" not in data:  # the latter in XMP
        return UPRIGHT
    for skipped in ((b"IDAT", b"fdAT"), (b"IDAT", b"fdAT", *_TEXT_CHUNKS)):  # text may be too large for Pillow
        try:
            with quiet(), _opened(_without(data, skipped)) as image:
                value = Image.Image.getexif(image).get(ExifTags.Base.Orientation)  # PNG's own would decode pixels
        except DECODER_ERRORS:  # damage is reported by whoever decodes the pixels
            continue
        return value if value in _TO_UPRIGHT else UPRIGHT
    return UPRIGHT


def upright(pixels: Pixels, orientation: int) -> Pixels:
    """Rotate or flip stored pixels `[H,W,3]` to what viewers show; `orientation` as from `exif_orientation`."""
    if orientation not in _TO_UPRIGHT:
        return pixels
    return np.asarray(Image.fromarray(pixels).transpose(_TO_UPRIGHT[orientation]))


def _without(png: bytes, kinds: tuple[bytes, ...]) -> bytes:
    """A PNG without chunks of these kinds; malformed chunks stay, so that the decoder reports them."""
    if not png.startswith(PNG_START) or not any(kind in png for kind in kinds):
        return png
    return PNG_START + b"".join(chunk for chunk in _chunks(png) if chunk[4:8] not in kinds)


def _chunks(png: bytes) -> Iterator[bytes]:
    position = len(PNG_START)
    while position < len(png):
        end = position + 12 + int.from_bytes(png[position : position + 4], "big")
        yield png[position:end]
        position = end
