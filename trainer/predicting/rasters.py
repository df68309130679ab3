"""Predict images too large for memory, and GeoTIFFs: windows are read from disk, and rows of ids written as they come.

    <name>.tif            class ids as a TIFF, tiled and compressed, with the colours; place and projection of a GeoTIFF
    <name>-overlay.png    at most 2,048 pixels

rasterio reads TIFFs of any layout, and GeoTIFFs; tifffile only plain ones whose pixels lie uncompressed in one piece.
Both give the ids that the whole image in memory would give.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from shards.errors import CorruptShardError
from shards.files.atomic import atomic_path
from shards.picture import overlay, save_picture
from shards.picture_file import MAX_PIXELS
from trainer.evaluation.predictor import Predictor
from trainer.pretrained import Pretrained

_OVERVIEW = 2048  # pixels of the longer side of the overlay
_BLOCK = 512


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
    def overview(self, size: tuple[int, int]) -> npt.NDArray[np.uint8]:
        """The image at a smaller size, [h, w, 3]."""

    @abstractmethod
    def write(self, path: Path, bands: Iterator[tuple[tuple[int, int], npt.NDArray[Any]]], dtype: str,
              colors: list[tuple[int, int, int]], done: Callable[[int], object]) -> None:
        """Write rows of ids to a TIFF; `done` is told the number of rows after each."""

    @abstractmethod
    def close(self) -> None:
        """Close the file."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class RasterioRaster(Raster):
    """Through GDAL."""

    def __init__(self, path: Path, device: torch.device) -> None:
        import rasterio

        self._rasterio = rasterio
        try:
            self._file = rasterio.open(path)
        except rasterio.errors.RasterioIOError as error:
            raise CorruptShardError(f"{path} is not a readable raster: {error}") from error
        if set(self._file.dtypes) != {"uint8"}:
            kinds = ", ".join(sorted(set(self._file.dtypes)))
            self._file.close()
            raise CorruptShardError(f"{path} has bands of {kinds}, legal: uint8; convert it, for example with "
                                    "gdal_translate -ot Byte -scale")
        self._bands = [1, 2, 3] if self._file.count >= 3 else [1, 1, 1]
        super().__init__((self._file.height, self._file.width), device)

    @property
    def has_place(self) -> bool:
        """Whether it is georeferenced."""
        return self._file.crs is not None

    def read(self, rows: tuple[int, int], columns: tuple[int, int]) -> npt.NDArray[np.uint8]:
        window = self._rasterio.windows.Window.from_slices(rows, columns)
        return np.asarray(self._file.read(self._bands, window=window))

    def overview(self, size: tuple[int, int]) -> npt.NDArray[np.uint8]:
        return np.asarray(self._file.read(self._bands, out_shape=(3, *size))).transpose(1, 2, 0)

    def write(self, path: Path, bands: Iterator[tuple[tuple[int, int], npt.NDArray[Any]]], dtype: str,
              colors: list[tuple[int, int, int]], done: Callable[[int], object]) -> None:
        height, width = self.shape[2:]
        profile = {"driver": "GTiff", "height": height, "width": width, "count": 1, "dtype": dtype, "tiled": True,
                   "blockxsize": _BLOCK, "blockysize": _BLOCK, "compress": "deflate", "BIGTIFF": "IF_SAFER",
                   "crs": self._file.crs, "transform": self._file.transform}
        with self._rasterio.open(path, "w", **profile) as target:
            if dtype == "uint8":
                target.write_colormap(1, {number: (*color, 255) for number, color in enumerate(colors)})
            for rows, ids in bands:
                target.write(ids, 1, window=self._rasterio.windows.Window.from_slices(rows, (0, width)))
                done(rows[1] - rows[0])

    def close(self) -> None:
        self._file.close()


class MappedRaster(Raster):
    """Through a memory map of tifffile."""

    def __init__(self, path: Path, device: torch.device) -> None:
        import tifffile

        self._tifffile = tifffile
        try:
            self._pixels = tifffile.memmap(path, mode="r")
        except (ValueError, tifffile.TiffFileError) as error:
            raise CorruptShardError(f"{path} cannot be read in parts by tifffile: {error}; install rasterio: pip "
                                    "install 'maskstream[geo]'") from error
        if self._pixels.dtype != np.uint8 or self._pixels.ndim not in (2, 3):
            raise CorruptShardError(f"{path} is {self._pixels.dtype} {self._pixels.shape}, legal: uint8 [H, W] or "
                                    "[H, W, 3]")
        super().__init__((self._pixels.shape[0], self._pixels.shape[1]), device)

    def read(self, rows: tuple[int, int], columns: tuple[int, int]) -> npt.NDArray[np.uint8]:
        return self._rgb(self._pixels[slice(*rows), slice(*columns)]).transpose(2, 0, 1)

    def overview(self, size: tuple[int, int]) -> npt.NDArray[np.uint8]:
        rows, columns = (np.arange(new) * old // new for new, old in zip(size, self.shape[2:], strict=True))
        return self._rgb(self._pixels[rows][:, columns])

    def write(self, path: Path, bands: Iterator[tuple[tuple[int, int], npt.NDArray[Any]]], dtype: str,
              colors: list[tuple[int, int, int]], done: Callable[[int], object]) -> None:
        target = self._tifffile.memmap(path, shape=self.shape[2:], dtype=dtype, photometric="minisblack")
        for rows, ids in bands:
            target[slice(*rows)] = ids
            done(rows[1] - rows[0])
        target.flush()

    def close(self) -> None:
        del self._pixels

    @staticmethod
    def _rgb(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        return np.stack([pixels] * 3, -1) if pixels.ndim == 2 else np.asarray(pixels[..., :3])


def open_raster(path: Path, device: torch.device) -> Raster | None:
    """A TIFF that is to be read in parts: a GeoTIFF, or one too large to decode; None for all others, and where neither
    library is installed. Raises CorruptShardError when it cannot be read."""
    if path.suffix.lower() not in (".tif", ".tiff") or not path.is_file():
        return None
    if importlib.util.find_spec("rasterio") is not None:
        return _if_needed(RasterioRaster(path, device))
    if importlib.util.find_spec("tifffile") is not None and _pixels_of(path) > MAX_PIXELS:
        return MappedRaster(path, device)
    return None


def _if_needed(raster: RasterioRaster) -> RasterioRaster | None:
    if raster.has_place or raster.shape[2] * raster.shape[3] > MAX_PIXELS:
        return raster
    raster.close()
    return None


def _pixels_of(path: Path) -> int:
    import tifffile

    try:
        with tifffile.TiffFile(path) as file:
            return int(np.prod(file.pages[0].shape[:2]))
    except (tifffile.TiffFileError, IndexError) as error:
        raise CorruptShardError(f"{path} is not a readable TIFF: {error}") from error


def predict_raster(pretrained: Pretrained, raster: Raster, ids_path: Path | None,
                   overlay_path: Path | None, done: Callable[[int], object] = lambda rows: None) -> None:
    """Write the ids as a TIFF, and the overlay, whichever paths are given. Raises ConfigError for settings that resize
    the image."""
    predict = Predictor(pretrained.model, pretrained.config, len(pretrained.classes), pretrained.device)
    colors = [info.color for info in pretrained.classes]
    height, width = raster.shape[2:]
    scale = min(1.0, _OVERVIEW / max(height, width))
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    small = np.zeros(size, np.int64)
    rows_shown, columns_shown = (np.arange(new) * old // new for new, old in zip(size, (height, width), strict=True))
    dtype = "uint8" if len(colors) <= 256 else "uint16"

    def bands() -> Iterator[tuple[tuple[int, int], npt.NDArray[Any]]]:
        for rows, found in predict.bands(raster):
            ids = found.cpu().numpy().astype(dtype)
            chosen = (rows_shown >= rows[0]) & (rows_shown < rows[1])
            small[chosen] = ids[rows_shown[chosen] - rows[0]][:, columns_shown]
            yield rows, ids

    if ids_path is None:
        for rows, _ in bands():
            done(rows[1] - rows[0])
    else:
        ids_path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(ids_path) as temporary:
            raster.write(temporary, bands(), dtype, colors, done)
    if overlay_path is not None:
        overlay_path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(overlay_path) as temporary:
            save_picture(Image.fromarray(overlay(raster.overview(size), small, colors)), temporary)

