"""Read a matrix from a MATLAB 5 file, such as Pascal Context's label maps.

scipy's reader ends the process on some damaged files, so this one reads the little that is needed, by the format's
description ("MAT-File Format" by The MathWorks):

    file      128 bytes, the last 4 of them version 0x0100 and "IM" (little-endian) or "MI"; then elements
    element   type and size, 4 bytes each, then the data, padded to 8 bytes; or, if the data fits in 4 bytes, 2 bytes
              each, then the data. An element of type COMPRESSED holds another one, deflated, and is not padded
    matrix    four elements: flags, int32 dimensions, name, and the numbers by columns, in the smallest type that fits
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from shards.errors import DatasetError

_HEADER, _VERSION, _PADDED_TO = 128, 0x0100, 8
_MATRIX, _COMPRESSED, _INT32 = 14, 15, 5
_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_ROOM = 4096  # bytes of a matrix besides its numbers


def read_matrix(data: bytes, name: str, variable: str, height: int, width: int) -> npt.NDArray[Any]:
    """The numbers of `variable`, [height, width]. Raises DatasetError naming the file (`name`) and what it holds."""
    try:
        order = {b"IM": "<", b"MI": ">"}[data[_HEADER - 2 : _HEADER]]
        if struct.unpack_from(f"{order}H", data, _HEADER - 4)[0] != _VERSION:
            raise ValueError("its version is not 5 (versions 6 and 7 are written as 5; 7.3 is HDF5)")
        found = dict[str, tuple[int, ...]]()
        for kind, content in _elements(data[_HEADER:], order):
            if kind == _COMPRESSED:
                plain = zlib.decompressobj().decompress(content, _ROOM + 8 * height * width)
                kind, content = next(_elements(plain, order))
            if kind != _MATRIX:
                continue
            parts = _elements(content, order)
            (_, _), (shape_kind, shape_data), (_, name_data) = next(parts), next(parts), next(parts)
            shape = tuple(np.frombuffer(shape_data, f"{order}i4").tolist()) if shape_kind == _INT32 else ()
            called = name_data.rstrip(b"\0").decode("latin-1")
            found[called] = shape
            if called == variable and shape == (height, width):
                kind, content = next(parts)
                numbers = np.frombuffer(content, order + _NUMBERS[kind])
                return numbers.reshape(width, height).T  # stored by columns
    except (ValueError, LookupError, StopIteration, struct.error, zlib.error) as error:
        raise DatasetError(f"{name} is not a readable MATLAB file: {error or 'it is truncated'}") from error
    raise DatasetError(f"{name} has the variables {found}, legal: {variable} of the image's size, {(height, width)}")


def _elements(data: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """(type, data) of each element; of a truncated one what is there."""
    place = 0
    while place + _PADDED_TO <= len(data):
        kind, size = struct.unpack_from(f"{order}II", data, place)
        if kind >> 16:
            kind, size = kind & 0xFFFF, kind >> 16
            yield kind, data[place + 4 : place + 4 + min(size, 4)]
            place += _PADDED_TO
            continue
        start = place + _PADDED_TO
        yield kind, data[start : start + size]
        place = start + size + (-size % _PADDED_TO if kind != _COMPRESSED else 0)
