"""Predict images too large for memory, and GeoTIFFs: windows are read from disk, and rows of ids written as they come.

    <name>.tif            class ids as a TIFF, tiled and compressed, with the colours; place and projection of a GeoTIFF
    <name>-overlay.png    at most 2,048 pixels, and the legend

rasterio reads TIFFs of any layout, and GeoTIFFs; tifffile only plain ones whose pixels lie uncompressed in one piece.
Both give the ids that the whole image in memory would give.
"""

from __future__ import annotations

import importlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from shards.errors import ConfigError, CorruptShardError
from shards.files.atomic import atomic_path
from shards.files.plain_file import LARGEST_PICTURE, open_plain, plain_size
from shards.picture import save_picture
from shards.picture_file import MAX_PIXELS, UPRIGHT, kind_of, quiet
from shards.rle import MAX_SIDE
from trainer.evaluation.prediction import Prediction
from trainer.evaluation.predictor import Predictor
from trainer.pretrained import Pretrained

_OVERVIEW = 2048  # pixels of the longer side of the overlay
_BLOCK = 512
_BAND_STEP = 16  # rows: bands of ids end on whole ones, except the last

Bands = Iterator[tuple[tuple[int, int], npt.NDArray[Any]]]
"""Rows (first, end) and their ids [rows, W], from top to bottom."""


class Raster(ABC):
    """An image on disk, read by windows; to a view it looks like a tensor uint8 [1, 3, H, W] on a device."""

    nbytes = 0  # in memory

    def __init__(self, size: tuple[int, int], device: torch.device) -> None:
        self.shape, self.device = (1, 3, *size), device

    def __getitem__(self, place: Any) -> Tensor:
        rows, columns = place[2:]
        first, last, _ = rows.indices(self.shape[2])
        left, right, _ = columns.indices(self.shape[3])
        pixels = torch.from_numpy(np.ascontiguousarray(self.read((first, last), (left, right))))
        return pixels[None].to(self.device, non_blocking=True)

    @abstractmethod
    def read(self, rows: tuple[int, int], columns: tuple[int, int]) -> npt.NDArray[np.uint8]:
        """[3, rows, columns]"""

    @abstractmethod
    def overview(self, rows: npt.NDArray[np.intp], columns: npt.NDArray[np.intp]) -> npt.NDArray[np.uint8]:
        """Evenly spread pixels of it, [h, w, 3]."""

    @abstractmethod
    def write(self, path: Path, bands: Bands, dtype: str, colors: Mapping[int, tuple[int, int, int]]) -> None:
        """Write ids as a TIFF of the same size and place, with the colours if they are of 8 bits."""

    @abstractmethod
    def close(self) -> None:
        """Close the file."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class RasterioRaster(Raster):
    """Through GDAL, which gives CMYK and YCbCr as RGB, and all others that are not RGB as a palette."""

    def __init__(self, rasterio: Any, path: Path, name: str, device: torch.device) -> None:
        self._rasterio = rasterio
        try:
            with quiet():  # it warns that a TIFF is a plain one
                self._file = rasterio.open(path, driver="GTiff")
        except rasterio.errors.RasterioIOError as error:
            raise CorruptShardError(f"{name} is not a readable TIFF: {error}") from error
        super().__init__((self._file.height, self._file.width), device)
        if set(self._file.dtypes) != {"uint8"}:
            kinds = ", ".join(sorted(set(self._file.dtypes)))
            self.close()
            raise CorruptShardError(f"{name} has bands of {kinds}, legal: uint8; convert it, for example with "
                                    "gdal_translate -ot Byte -scale")
        self._bands = [1, 2, 3] if self._file.count >= 3 else [1, 1, 1]
        self._palette = None
        if self._file.colorinterp[0] == rasterio.enums.ColorInterp.palette:
            self._palette = np.zeros((256, 3), np.uint8)
            for number, color in self._file.colormap(1).items():
                self._palette[number] = color[:3]

    @property
    def has_place(self) -> bool:
        """Whether it is georeferenced."""
        return self._file.crs is not None or not self._file.transform.is_identity

    def read(self, rows: tuple[int, int], columns: tuple[int, int]) -> npt.NDArray[np.uint8]:
        window = self._rasterio.windows.Window.from_slices(rows, columns)
        pixels = np.asarray(self._file.read(self._bands, window=window))
        return pixels if self._palette is None else self._palette[pixels[0]].transpose(2, 0, 1)

    def overview(self, rows: npt.NDArray[np.intp], columns: npt.NDArray[np.intp]) -> npt.NDArray[np.uint8]:
        pixels = np.asarray(self._file.read(self._bands, out_shape=(3, len(rows), len(columns))))
        return pixels.transpose(1, 2, 0) if self._palette is None else self._palette[pixels[0]]

    def write(self, path: Path, bands: Bands, dtype: str, colors: Mapping[int, tuple[int, int, int]]) -> None:
        height, width = self.shape[2:]
        profile = {"driver": "GTiff", "height": height, "width": width, "count": 1, "dtype": dtype, "tiled": True,
                   "blockxsize": _BLOCK, "blockysize": _BLOCK, "compress": "deflate", "BIGTIFF": "IF_SAFER",
                   "crs": self._file.crs, "transform": self._file.transform}
        with quiet():
            target = self._rasterio.open(path, "w", **profile)
        with target:
            if dtype == "uint8":
                target.write_colormap(1, {number: (*color, 255) for number, color in colors.items()})
            for rows, ids in bands:
                target.write(ids, 1, window=self._rasterio.windows.Window.from_slices(rows, (0, width)))

    def close(self) -> None:
        self._file.close()


class MappedRaster(Raster):
    """Through a memory map of tifffile."""

    def __init__(self, tifffile: Any, path: Path, name: str, device: torch.device) -> None:
        self._tifffile = tifffile
        with _first_page(tifffile, path, name) as page:
            is_plain = page.dtype == np.uint8 and page.is_memmappable and (page.axes, page.photometric.name) in (
                ("YX", "MINISBLACK"), ("YXS", "RGB"))
            size = (page.imagelength, page.imagewidth)
        if not is_plain:
            raise CorruptShardError(f"{name} cannot be read in parts by tifffile, only uncompressed grey and RGB of 8 "
                                    "bits in one piece can; install rasterio: pip install 'maskstream[geo]'")
        super().__init__(size, device)
        self._pixels = tifffile.memmap(path, page=0, mode="r").reshape(*size, -1)

    def read(self, rows: tuple[int, int], columns: tuple[int, int]) -> npt.NDArray[np.uint8]:
        return self._rgb(self._pixels[slice(*rows), slice(*columns)]).transpose(2, 0, 1)

    def overview(self, rows: npt.NDArray[np.intp], columns: npt.NDArray[np.intp]) -> npt.NDArray[np.uint8]:
        return self._rgb(self._pixels[np.ix_(rows, columns)])

    def write(self, path: Path, bands: Bands, dtype: str, colors: Mapping[int, tuple[int, int, int]]) -> None:
        height, width = self.shape[2:]
        look: dict[str, Any] = {"photometric": "minisblack"}
        if dtype == "uint8":
            table = np.zeros((3, 256), np.uint16)
            for number, color in colors.items():
                table[:, number] = np.multiply(color, 257)
            look = {"photometric": "palette", "colormap": table}
        tiles = (ids[first : first + _BAND_STEP, left : left + _BLOCK] for _, ids in bands
                 for first in range(0, len(ids), _BAND_STEP) for left in range(0, width, _BLOCK))
        self._tifffile.imwrite(path, tiles, shape=(height, width), dtype=dtype, tile=(_BAND_STEP, _BLOCK),
                               compression="zlib", metadata=None, **look)

    def close(self) -> None:
        del self._pixels

    @staticmethod
    def _rgb(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        return np.asarray(pixels[..., [0, 0, 0]] if pixels.shape[-1] < 3 else pixels[..., :3])


def open_raster(path: Path, name: str, device: torch.device) -> Raster | None:
    """A TIFF that is to be read in parts: a GeoTIFF, or one too large to decode; None for all others, and where neither
    library is installed. Raises CorruptShardError when it cannot be read, ConfigError if a library is needed, and
    OSError."""
    with os.fdopen(open_plain(path), "rb") as file:
        if kind_of(file.read(16)) != "TIFF":
            return None
    rasterio, tifffile = _library("rasterio"), _library("tifffile")
    raster: Raster
    if rasterio is not None:
        raster = RasterioRaster(rasterio, path, name, device)
        if raster.has_place:
            return raster
    elif tifffile is not None:
        with _first_page(tifffile, path, name) as page:
            if not _is_large(page.imagelength, page.imagewidth):
                return None
        raster = MappedRaster(tifffile, path, name, device)
    elif plain_size(path) > LARGEST_PICTURE:
        raise ConfigError(f"{name} is too large to be read as a whole; to read it in parts: pip install "
                          "'maskstream[geo]'")
    else:
        return None
    if not _is_large(*raster.shape[2:]):
        raster.close()
        return None
    if tifffile is not None:
        with _first_page(tifffile, path, name) as page:
            orientation = page.tags.get("Orientation")
        if orientation is not None and orientation.value != UPRIGHT:
            raster.close()
            raise CorruptShardError(f"{name} is to be turned (orientation {orientation.value}), which is not possible "
                                    "for what is read in parts; turn its pixels first")
    return raster


def _is_large(height: int, width: int) -> bool:
    """Whether an image cannot be decoded as a whole."""
    return height * width > MAX_PIXELS or max(height, width) > MAX_SIDE


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


@contextmanager
def _first_page(tifffile: Any, path: Path, name: str) -> Iterator[Any]:
    try:
        file = tifffile.TiffFile(path)
        page = file.pages[0]
    except (tifffile.TiffFileError, IndexError, ValueError) as error:
        raise CorruptShardError(f"{name} is not a readable TIFF: {error}") from error
    with file:
        yield page


def predict_raster(pretrained: Pretrained, raster: Raster, name: str, paths: Mapping[str, Path],
                   label_offset: int = 0) -> None:
    """Write the ids, as a TIFF, and the overlay, whichever are in `paths`. Raises ConfigError for settings that resize
    the image."""
    predict = Predictor(pretrained.model, pretrained.config, len(pretrained.classes), pretrained.device)
    height, width = raster.shape[2:]
    scale = min(1.0, _OVERVIEW / max(height, width))
    rows_shown, columns_shown = (np.arange(new) * old // new for new, old in (
        (max(1, round(side * scale)), side) for side in (height, width)))
    count = len(pretrained.classes) + label_offset
    small = np.zeros((len(rows_shown), len(columns_shown)), np.uint8 if count <= 256 else np.uint16)

    def bands() -> Bands:
        with tqdm(total=height, desc=name, unit="row", leave=False, disable=None) as bar:
            for rows, found in predict.bands(raster):
                ids = found.cpu().numpy().astype(small.dtype)
                chosen = (rows_shown >= rows[0]) & (rows_shown < rows[1])
                small[chosen] = ids[rows_shown[chosen] - rows[0]][:, columns_shown]
                yield rows, ids + small.dtype.type(label_offset)
                bar.update(rows[1] - rows[0])

    for path in paths.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    if "ids" in paths:
        colors = {number + label_offset: info.color for number, info in enumerate(pretrained.classes)}
        with atomic_path(paths["ids"]) as temporary:
            raster.write(temporary, bands(), small.dtype.name, colors)
    else:
        for _ in bands():
            pass
    if "overlay" in paths:
        shown = Prediction(image=raster.overview(rows_shown, columns_shown), label_map=small,
                           classes=pretrained.classes)
        with atomic_path(paths["overlay"]) as temporary:
            save_picture(shown.overlay_with_legend(), temporary)
