"""What the values or colours of a label map mean: which become which class, and which are ignored."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from shards.errors import DatasetError
from shards.rle import IGNORE_8_BIT, count_values, ignore_value

Color = tuple[int, int, int]
_UNKNOWN = -1  # in a colour look-up


class Mapped(NamedTuple):
    """A label map as class ids, and the number of its pixels that were not mapped exactly."""

    label_map: npt.NDArray[Any]  # uint8 or uint16 [H, W], `ignore_index` where unlabelled
    nearest: int = 0  # took the class of the nearest colour
    rest: int = 0  # were in no list, and ignored for that reason


@dataclass(frozen=True, kw_only=True)
class LabelMapping:
    """Stored values, or colours, to class ids. A value maps to `ignore_index` where its pixels are to be ignored.

    tolerance   colours: largest distance (Euclidean, in RGB) to a listed colour whose class a pixel may take
    ignore_rest ignore all values or colours that are not listed, instead of refusing them
    names       name -> stored value, where the dataset has names; some label files hold these
    legal       how errors describe the legal values
    identity    what the mapping adds to the hash of a shard set
    """

    num_classes: int
    values: Mapping[int, int] = field(default_factory=dict)
    colors: Mapping[Color, int] = field(default_factory=dict)
    tolerance: float = 0.0
    ignore_rest: bool = False
    names: Mapping[str, int] = field(default_factory=dict)
    legal: str = ""
    identity: tuple[Any, ...] = ()

    @property
    def ignore_index(self) -> int:
        """The id of ignored pixels."""
        return ignore_value(self.num_classes)

    @property
    def reads_colors(self) -> bool:
        """Whether label maps are RGB images, rather than single-channel ones."""
        return bool(self.colors)

    def apply(self, stored: npt.NDArray[Any], name: str) -> Mapped:
        """Map stored values [H, W], or colours uint8 [H, W, 3], to class ids.

        Raises DatasetError naming the file, the first unknown value, how many pixels have it, and the nearest legal
        one.
        """
        if self.reads_colors:
            return self._apply_to_colors(stored, name)
        return self._apply_to_bytes(stored) or self._apply_to_values(stored, name)

    def _apply_to_bytes(self, stored: npt.NDArray[Any]) -> Mapped | None:
        """As `_apply_to_values` in a third of the time, for 8-bit maps without unknown values; None for others."""
        if stored.dtype != np.uint8 or self.ignore_index != IGNORE_8_BIT:
            return None
        known, table = self._byte_table
        data = stored.tobytes()
        if data.translate(None, delete=known):
            return None
        return Mapped(np.frombuffer(data.translate(table), np.uint8).reshape(stored.shape))

    @functools.cached_property
    def _byte_table(self) -> tuple[bytes, bytes]:
        """The known byte values, and the class id of every byte value."""
        known = bytes(value for value in range(256) if value in self.values)
        return known, bytes(self.values.get(value, self.ignore_index) for value in range(256))

    def _apply_to_values(self, stored: npt.NDArray[Any], name: str) -> Mapped:
        counts = count_values(stored)
        present = np.flatnonzero(counts).tolist()
        unknown = [value for value in present if value not in self.values]
        if unknown and not self.ignore_rest:
            nearest = min(self.values, key=lambda value: (abs(value - unknown[0]), value))
            others = f", and {len(unknown) - 1} more values" if len(unknown) > 1 else ""
            called = "".join(f" {known!r}" for known, value in self.names.items() if value == unknown[0])
            raise DatasetError(f"{name} holds the label {unknown[0]}{called} ({int(counts[unknown[0]])} pixels{others}"
                               f"), legal: {self.legal}; the nearest is {nearest}")
        table = np.full(int(present[-1]) + 1, self.ignore_index, np.uint8 if self.ignore_index == 255 else np.uint16)
        for value in present:
            table[value] = self.values.get(value, self.ignore_index)
        mapped: npt.NDArray[Any] = table[stored]
        return Mapped(mapped, rest=int(counts[unknown].sum()) if unknown else 0)

    def _apply_to_colors(self, stored: npt.NDArray[Any], name: str) -> Mapped:
        packed = _packed(stored)
        mapped = _lookup(tuple(sorted(self.colors.items())))[packed]
        places = np.nonzero(mapped == _UNKNOWN)
        nearest = rest = 0
        if places[0].size:
            found, inverse, counts = np.unique(packed[places], return_inverse=True, return_counts=True)
            ids = np.empty(found.size, np.int32)
            for number, (color, count) in enumerate(zip(map(_unpacked, found.tolist()), counts.tolist(), strict=True)):
                closest, distance = self._closest(color)
                if distance <= self.tolerance:
                    ids[number], nearest = self.colors[closest], nearest + count
                elif self.ignore_rest:
                    ids[number], rest = self.ignore_index, rest + count
                else:
                    others = f", and up to {found.size - 1} more colours" if found.size > 1 else ""
                    raise DatasetError(
                        f"{name} holds the colour {hex_color(color)} ({count} pixels{others}), legal: {self.legal}; "
                        f"the nearest is {hex_color(closest)} at distance {distance:.1f} (tolerance is "
                        f"{self.tolerance:g})")
            mapped[places] = ids[inverse]
        return Mapped(mapped.astype(np.uint8 if self.ignore_index == 255 else np.uint16), nearest, rest)

    def _closest(self, color: Color) -> tuple[Color, float]:
        """The listed colour with the smallest distance; of several the first by value."""
        listed = sorted(self.colors)
        distances = np.linalg.norm(np.array(listed, np.float64) - color, axis=1)
        place = int(distances.argmin())
        return listed[place], float(distances[place])


def plain_mapping(num_classes: int, ignore_labels: tuple[int, ...], reduce_zero_label: bool) -> LabelMapping:
    """Ids as they are, or with `reduce_zero_label` one less and 0 ignored; `ignore_labels` are ignored too."""
    lowest = 1 if reduce_zero_label else 0
    ignored = {*ignore_labels, *([0] if reduce_zero_label else [])}
    values = {value: value - lowest for value in range(lowest, num_classes + lowest)}
    values |= dict.fromkeys(ignored, ignore_value(num_classes))
    return LabelMapping(
        num_classes=num_classes, values=values, identity=(ignore_labels, reduce_zero_label),
        legal=f"{lowest}..{num_classes + lowest - 1} ({num_classes} classes) and {sorted(ignored)} for ignored pixels")


def hex_color(color: Color) -> str:
    """#rrggbb"""
    return "#" + bytes(color).hex()


def _packed(colors: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint32]:
    red, green, blue = (colors[..., channel].astype(np.uint32) for channel in range(3))
    packed: npt.NDArray[Any] = red << 16 | green << 8 | blue
    return packed


def _unpacked(packed: int) -> Color:
    return packed >> 16, packed >> 8 & 255, packed & 255


@functools.lru_cache(maxsize=1)  # 64 MB
def _lookup(colors: tuple[tuple[Color, int], ...]) -> npt.NDArray[np.int32]:
    table = np.full(1 << 24, _UNKNOWN, np.int32)
    for color, value in colors:
        table[color[0] << 16 | color[1] << 8 | color[2]] = value
    return table
