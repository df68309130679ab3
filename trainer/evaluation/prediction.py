"""The prediction for one image, for people: class areas, overlay, legend, files. A notebook shows it as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from shards.coco import to_coco_rle
from shards.exports.pictures import label_png
from shards.files.atomic import write_atomically
from shards.looking.sheet import TILE, Row, fitted, legend_of, legend_sheet
from shards.manifest import ClassInfo
from shards.picture import encode_png, overlay
from shards.rle import encode_rle


class ClassArea(NamedTuple):
    """A class in a prediction."""

    id: int
    name: str
    color: tuple[int, int, int]
    pixels: int
    share: float  # of the image, 0 to 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Prediction:
    """What a model predicts for an image.

    image          uint8 [H, W, 3], upright
    label_map      class ids [H, W], uint8 up to 256 classes, else uint16
    classes        names and colours; an id is a position in the list
    confidence     float32 [H, W], probability of the predicted class, if it or all were asked for
    probabilities  float16 [C, H, W], if they were asked for
    """

    image: npt.NDArray[np.uint8] = field(repr=False)
    label_map: npt.NDArray[Any] = field(repr=False)
    classes: Sequence[ClassInfo] = field(repr=False)
    confidence: npt.NDArray[np.float32] | None = field(default=None, repr=False)
    probabilities: npt.NDArray[np.float16] | None = field(default=None, repr=False)

    def areas(self) -> list[ClassArea]:
        """The classes that were predicted, the largest first."""
        pixels = np.bincount(self.label_map.reshape(-1), minlength=len(self.classes)).tolist()
        order = sorted((-count, number) for number, count in enumerate(pixels) if count)
        return [ClassArea(number, self.classes[number].name, self.classes[number].color, -count,
                          -count / self.label_map.size) for count, number in order]

    def mask(self, which: int | str) -> npt.NDArray[np.bool_]:
        """Bool [H, W]: where a class, given by id or name, was predicted. Raises KeyError for a class that is none."""
        names = [info.name for info in self.classes]
        if which in names:
            return np.isin(self.label_map, [number for number, name in enumerate(names) if name == which])
        if isinstance(which, str) or not 0 <= which < len(names):
            raise KeyError(f"class {which!r}, legal: an id from 0 to {len(names) - 1}, or a name in `classes`")
        return np.asarray(self.label_map == which)

    def overlay(self, alpha: float = 0.5) -> Image.Image:
        """The image under the class colours, at its own size."""
        return Image.fromarray(overlay(self.image, self.label_map, [info.color for info in self.classes], alpha))

    def overlay_with_legend(self) -> Image.Image:
        """The overlay at the image's own size, and next to it the predicted classes with their shares."""
        row = Row(caption="", legend=legend_of(self.label_map, self.classes), pictures=[np.asarray(self.overlay())])
        return legend_sheet([row], self.label_map.shape[1])

    def picture(self, tile: int = 2 * TILE) -> Image.Image:
        """Image, overlay and legend, each picture at most `tile` pixels wide and high."""
        height, width = self.label_map.shape
        image, small = fitted(self.image, self.label_map, min(tile, max(height, width)))
        row = Row(caption=f"{width} x {height}", legend=legend_of(self.label_map, self.classes),
                  pictures=[image, overlay(image, small, [info.color for info in self.classes])])
        return legend_sheet([row], tile)

    def png(self) -> bytes:
        """A PNG of the class ids, which viewers show in the class colours (8 bits; beyond 255 classes 16 bits grey)."""
        return label_png(self.label_map, self.classes)

    def save(self, path: str | Path) -> None:
        """Write `png()` to a file."""
        write_atomically(Path(path), self.png())

    def rle(self) -> list[dict[str, Any]]:
        """Per predicted class, the largest first: {"category_id", "category", "area" in pixels, "segmentation"}, the
        last as COCO's compressed RLE {"size": [H, W], "counts"}."""
        coded = {rle["category_id"]: {"size": rle["size"], "counts": rle["counts"].decode("ascii")}
                 for rle in to_coco_rle(encode_rle(self.label_map, len(self.classes)))}
        return [{"category_id": area.id, "category": area.name, "area": area.pixels, "segmentation": coded[area.id]}
                for area in self.areas()]

    def _repr_png_(self) -> bytes:
        return encode_png(self.picture())

    def __repr__(self) -> str:
        height, width = self.label_map.shape
        areas = self.areas()
        shown = ", ".join(f"{area.name} {area.share:.1%}" for area in areas[:5])
        return f"Prediction({width} x {height}: {shown}{', …' if len(areas) > 5 else ''})"
