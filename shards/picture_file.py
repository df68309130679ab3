"""Picture files as Pillow reads them: one decision on what is too large, what is damaged, and which way is up.

Pillow's own limits do not apply: a sound file is read up to MAX_SIDE pixels a side, whatever text it carries. What
cannot be read is refused with Pillow's reason, as CorruptShardError.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from shards.errors import CorruptShardError
from shards.rle import MAX_SIDE

MAX_PIXELS = 1 << 27  # of a picture whose size nobody has said beforehand; 400 MB decoded
Pixels = npt.NDArray[np.uint8]

JPEG_START = b"\xff\xd8\xff"
PNG_START = b"\x89PNG\r\n\x1a\n"
_STARTS = {"JPEG": JPEG_START, "PNG": PNG_START}
_IHDR, _DEPTH, _COLOUR, _IHDR_CRC = slice(12, 16), 24, 25, slice(29, 33)  # where a PNG's header keeps what we read
_GREY, _PALETTE = 0, 3  # colour types of PNG
_ASIDE = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")  # chunks that say nothing about pixels, and that Pillow limits in size
# What Pillow raises on damaged files, found by fuzzing.
_DECODER_ERRORS = (OSError, EOFError, ValueError, SyntaxError, AssertionError, LookupError, TypeError, struct.error)
UPRIGHT = 1  # EXIF's number for an image that is stored as it is shown
_TO_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_by_pillow(data: bytes, name: str, size: tuple[int, int] | None = None) -> Pixels:
    """RGB `[H,W,3]` of a JPEG or PNG; the size `(H,W)`, when given, is checked before decoding."""
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
    """Raise CorruptShardError, before it is decoded, for a picture that a few bytes may blow up to MAX_SIDE a side."""
    with open_picture(data, name, ("JPEG", "PNG")) as image:
        if image.width * image.height > MAX_PIXELS:
            raise CorruptShardError(f"{name} of {len(data)} bytes is {image.width}x{image.height} = "
                                    f"{image.width * image.height} pixels, legal: at most {MAX_PIXELS}; cut it into "
                                    "parts")


def open_label_map(data: bytes, name: str) -> ImageFile.ImageFile:
    """Read the header of a PNG of class ids, so that its pixels will be the samples as they are stored.

    Pillow takes grey for brightness and spreads 1, 2 and 4 bits over 0..255; palette indices it leaves alone. So a
    grey file of so few bits is opened as if it had a palette, which changes one byte of its header.
    """
    if data.startswith(PNG_START) and data[_IHDR] == b"IHDR" and len(data) >= _IHDR_CRC.stop:
        if data[_COLOUR] == _GREY and data[_DEPTH] < 8:
            header = data[_IHDR] + data[_IHDR.stop : _COLOUR] + bytes([_PALETTE]) + data[_COLOUR + 1 : _IHDR_CRC.start]
            data = data[: _IHDR.start] + header + zlib.crc32(header).to_bytes(4, "big") + data[_IHDR_CRC.stop :]
    elif data.startswith(PNG_START):
        raise CorruptShardError(f"{name} is not a readable PNG file: it does not begin with the chunk IHDR")
    return open_picture(data, name, ("PNG",))


def open_picture(data: bytes, name: str, formats: tuple[str, ...]) -> ImageFile.ImageFile:
    """Read a picture's header. Raises CorruptShardError when it has none of the formats or is too large."""
    found = next((kind for kind, start in _STARTS.items() if data.startswith(start)), None)
    legal = " or ".join(formats)
    if found is None:
        begins = f", it begins with {data[:8]!r}" if data else ""
        raise CorruptShardError(f"{name} is not a readable {legal} file of {len(data)} bytes{begins}")
    if found not in formats:
        raise CorruptShardError(f"{name} is a {found} file, legal: {legal}")
    try:
        image = _opened(_without(data, _ASIDE))
    except _DECODER_ERRORS as error:
        raise CorruptShardError(f"{name} is not a readable {found} file of {len(data)} bytes: {error}") from error
    if max(image.size) > MAX_SIDE:
        raise CorruptShardError(f"{name} is {image.width}x{image.height} pixels, legal: at most {MAX_SIDE} a side")
    return image


def _opened(data: bytes) -> ImageFile.ImageFile:
    """Not by Image.open, which has limits of its own and loses the reason. Damaged metadata is nobody's business."""
    with warnings.catch_warnings(action="ignore"):
        return JpegImageFile(io.BytesIO(data)) if data.startswith(JPEG_START) else PngImageFile(io.BytesIO(data))


def load_picture(image: ImageFile.ImageFile, name: str) -> Image.Image:
    """Decode the pixels of an opened picture. Raises CorruptShardError when they are damaged or cut short."""
    try:
        image.load()
    except _DECODER_ERRORS as error:
        raise CorruptShardError(f"{name} is not a readable image, it is damaged or cut short: {error}") from error
    return image


def exif_orientation(data: bytes) -> int:
    """How a JPEG or PNG wants to be turned, 1 to 8 as EXIF counts; 1, upright, where it does not say, or nonsense."""
    for aside in ((b"IDAT", b"fdAT"), (b"IDAT", b"fdAT", *_ASIDE)):  # of a PNG; text may be too much for Pillow
        try:
            with warnings.catch_warnings(action="ignore"), _opened(_without(data, aside)) as image:
                value = Image.Image.getexif(image).get(ExifTags.Base.Orientation)  # PNG's own would decode pixels
        except _DECODER_ERRORS:  # the pixels are for others to judge
            continue
        return value if value in _TO_UPRIGHT else UPRIGHT
    return UPRIGHT


def upright(pixels: Pixels, orientation: int) -> Pixels:
    """Stored pixels `[H,W,3]` as a viewer shows them; `orientation` as `exif_orientation` gives it."""
    if orientation not in _TO_UPRIGHT:
        return pixels
    return np.asarray(Image.fromarray(pixels).transpose(_TO_UPRIGHT[orientation]))


def _without(png: bytes, kinds: tuple[bytes, ...]) -> bytes:
    """A PNG without its chunks of some kinds; what is malformed stays, to be named by who decodes it."""
    if not png.startswith(PNG_START) or not any(kind in png for kind in kinds):
        return png
    return PNG_START + b"".join(chunk for chunk in _chunks(png) if chunk[4:8] not in kinds)


def _chunks(png: bytes) -> Iterator[bytes]:
    position = len(PNG_START)
    while position < len(png):
        end = position + 12 + int.from_bytes(png[position : position + 4], "big")
        yield png[position:end]
        position = end
