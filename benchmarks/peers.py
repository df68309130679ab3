"""Other loaders on the same crops, delivering dense float masks, written as their users write them.

Every `*_batches` yields (uint8 images [B, 3, H, W], B targets {"masks": float32 [N, H, W], "labels": int64 [N]}).
`streaming` imports torchvision, which is not needed here and not compatible with every torch, so an empty module
replaces it.
"""

from __future__ import annotations

import io
import shutil
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from shards.sample import CropSample
from trainer.data.transforms import draw_photometric, normalize, photometric_distort
from trainer.model_config import IMAGENET_MEAN, IMAGENET_STD

Sample = tuple[Tensor, dict[str, Tensor]]
Batches = Callable[[], Iterable[tuple[Tensor, list[dict[str, Tensor]]]]]
_IGNORED = 255


def encoded(samples: Iterable[CropSample]) -> list[tuple[str, bytes, bytes]]:
    """(key, JPEG, PNG of class ids) of each sample."""
    found = []
    for number, sample in enumerate(samples):
        with io.BytesIO() as stream:
            Image.fromarray(sample.label_map().astype(np.uint8)).save(stream, "PNG")
            found.append((f"{number:06}", sample.image_bytes, stream.getvalue()))
    return found


def sample_of(jpeg: bytes, png: bytes) -> Sample:
    """Decode, flip at random, and build dense masks."""
    image, label_map = np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB")), np.asarray(Image.open(io.BytesIO(png)))
    if torch.rand(()) < 0.5:
        image, label_map = image[:, ::-1], label_map[:, ::-1]
    return torch.from_numpy(image.transpose(2, 0, 1).copy()), dense_target(label_map)


def dense_target(label_map: npt.NDArray[np.uint8]) -> dict[str, Tensor]:
    labels = np.unique(label_map)
    labels = labels[labels != _IGNORED]
    return {"masks": torch.from_numpy(label_map[None] == labels[:, None, None]).float(),
            "labels": torch.from_numpy(labels.astype(np.int64))}


def collate(samples: list[Sample]) -> tuple[Tensor, list[dict[str, Tensor]]]:
    return torch.stack([image for image, _ in samples]), [target for _, target in samples]


def webdataset_batches(items: list[tuple[str, bytes, bytes]], folder: Path, size: int) -> Batches:
    import webdataset

    folder.mkdir()
    with webdataset.TarWriter(str(folder / "0.tar")) as writer:
        for key, jpeg, png in items:
            writer.write({"__key__": key, "jpg": jpeg, "png": png})
    return lambda: (webdataset.WebDataset(str(folder / "0.tar"), shardshuffle=False).shuffle(100)
                    .to_tuple("jpg", "png").map(lambda pair: sample_of(*pair)).batched(size, collation_fn=collate))


def mosaic_batches(items: list[tuple[str, bytes, bytes]], folder: Path, size: int) -> Batches:
    stand_in_for_torchvision()
    from streaming import MDSWriter, StreamingDataset

    with MDSWriter(out=str(folder), columns={"jpg": "bytes", "png": "bytes"}, progress_bar=False) as writer:
        for _, jpeg, png in items:
            writer.write({"jpg": jpeg, "png": png})

    class Crops(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, at: int) -> Sample:
            item = super().__getitem__(at)
            return sample_of(item["jpg"], item["png"])

    crops = Crops(local=str(folder), shuffle=True, batch_size=size)
    return lambda: DataLoader(crops, batch_size=size, collate_fn=collate)


def litdata_batches(items: list[tuple[str, bytes, bytes]], folder: Path, size: int) -> Batches:
    from litdata import StreamingDataset
    from litdata.streaming.writer import BinaryWriter

    folder.mkdir()
    writer = BinaryWriter(str(folder), chunk_bytes="32MB")
    for number, (_, jpeg, png) in enumerate(items):
        writer.add_item(number, {"jpg": jpeg, "png": png})
    writer.done()
    writer.merge()

    class Crops(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, index: object) -> Sample:
            item = super().__getitem__(index)
            return sample_of(item["jpg"], item["png"])

    crops = Crops(str(folder), shuffle=True)
    return lambda: DataLoader(crops, batch_size=size, collate_fn=collate)


def online_batches(root: Path, count: int, size: int) -> Batches:
    """A folder of whole images, with the reference's training transform for every sample."""
    crops = OnlineCrops(root, count)
    return lambda: DataLoader(crops, batch_size=size, collate_fn=collate, shuffle=True)


class OnlineCrops(Dataset[Sample]):
    """Random scale, crop of at most 75 % of one class, flip, colour, normalisation, padding, masks."""

    def __init__(self, root: Path, count: int, size: int = 512) -> None:
        self.pairs = [(path, root / "annotations" / path.relative_to(root / "images").with_suffix(".png"))
                      for path in sorted((root / "images").rglob("*.jpg"))]
        self.count, self.size = count, size

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Sample:
        rng = np.random.default_rng(number)
        paths = self.pairs[number % len(self.pairs)]
        image, label = Image.open(paths[0]).convert("RGB"), Image.open(paths[1])
        scale = int(self.size * rng.uniform(0.5, 2.0)) / min(image.size)
        sides = (round(image.width * scale), round(image.height * scale))
        pixels = np.asarray(image.resize(sides, Image.Resampling.BILINEAR))
        label_map = np.asarray(label.resize(sides, Image.Resampling.NEAREST)) - np.uint8(1)  # 0 becomes 255: ignored
        window = self.window(label_map, rng)
        pixels, label_map = pixels[window], label_map[window]
        if rng.random() < 0.5:
            pixels, label_map = pixels[:, ::-1], label_map[:, ::-1]
        tensor = torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None]
        distorted = photometric_distort(tensor, torch.from_numpy(draw_photometric(rng))[None])
        below, right = self.size - pixels.shape[0], self.size - pixels.shape[1]
        padded = torch.nn.functional.pad(normalize(distorted, list(IMAGENET_MEAN), list(IMAGENET_STD)),
                                         (0, right, 0, below))
        return padded[0], dense_target(np.pad(label_map, ((0, below), (0, right)), constant_values=_IGNORED))

    def window(self, label_map: npt.NDArray[np.uint8], rng: np.random.Generator) -> tuple[slice, slice]:
        for _ in range(10):
            top, left = (int(rng.integers(0, max(side - self.size, 0) + 1)) for side in label_map.shape)
            window = slice(top, top + self.size), slice(left, left + self.size)
            counts = np.bincount(label_map[window].reshape(-1), minlength=256)[:_IGNORED]
            if (counts > 0).sum() > 1 and counts.max() < 0.75 * counts.sum():
                break
        return window


def stand_in_for_torchvision() -> None:
    try:
        import torchvision  # type: ignore[import-not-found, unused-ignore]  # noqa: F401
    except (ImportError, RuntimeError):
        for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional",
                     "torchvision.datasets"):
            module = types.ModuleType(name)
            module.__spec__ = ModuleSpec(name, None)
            module.__getattr__ = _any_class  # type: ignore[method-assign]
            sys.modules[name] = module


def _any_class(name: str) -> type:
    if name.startswith("__"):  # attributes that the import system looks up
        raise AttributeError(name)
    return type(name, (), {})


def available(items: list[tuple[str, bytes, bytes]], folder: Path, size: int) -> Iterator[tuple[str, Batches]]:
    """The installed peers, each with its own copy of the crops in `folder`."""
    for name, make in (("stock webdataset", webdataset_batches), ("MosaicML Streaming", mosaic_batches),
                       ("litdata", litdata_batches)):
        place = folder / make.__name__
        shutil.rmtree(place, ignore_errors=True)
        try:
            yield name, make(items, place, size)
        except ImportError as error:
            print(f"({name} is left out: {error})", file=sys.stderr)
