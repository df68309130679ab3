"""Encode a sample's image and label map as picture files, and write them below a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from shards.errors import CorruptShardError
from shards.files.atomic import naming
from shards.manifest import ClassInfo
from shards.picture import encode_png
from shards.picture_file import UPRIGHT, exif_orientation
from shards.rle import ignore_value
from shards.sample import CropSample


def exported_image(sample: CropSample) -> tuple[bytes, str]:
    """(file, suffix) of the image: the stored bytes, unless other programs would turn them.

    MaskStream ignores EXIF orientation, as the masks fit the stored pixels. Other readers apply it, so an image that
    has one is stored as PNG of the same pixels without it.
    """
    if exif_orientation(sample.image_bytes) == UPRIGHT:
        return sample.image_bytes, sample.image_suffix
    return encode_png(Image.fromarray(sample.image)), "png"


def label_png(label_map: npt.NDArray[Any], classes: Sequence[ClassInfo], palette: bool = True) -> bytes:
    """A PNG of class ids: 8 bits, with the class colours as palette or grey; 16 bits grey for more than 255 classes.

    Ignored pixels are 255 (65535), black in the palette.
    """
    if ignore_value(len(classes)) > 255:
        return encode_png(Image.fromarray(label_map.astype(np.uint16)))
    picture = Image.fromarray(label_map.astype(np.uint8))
    if palette:
        colors = np.zeros((256, 3), np.uint8)
        colors[: len(classes)] = [info.color for info in classes]
        picture.putpalette(colors.tobytes())
    return encode_png(picture)


def write_new(path: Path, data: bytes) -> None:
    """Write a file. Raises CorruptShardError when there is one: a key that occurs twice, or, on a file system that
    ignores case, two keys that differ in it only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path):
        try:
            with path.open("xb") as file:
                file.write(data)
        except FileExistsError:
            raise CorruptShardError(f"two samples would be written to {path}: their keys are equal, or the file system "
                                    "does not tell them apart") from None
