"""The files that `trainer/predict.py` writes for an image, and which of them exist already.

    <name>.png                  ids: class ids in the image's size, shown in the class colours
    <name>-overlay.png          overlay: the image under the class colours, with a legend
    <name>-confidence.png       confidence: probability of the predicted class, 0 to 255 for 0 to 1
    <name>-probabilities.npz    probabilities: float16 [C, H, W] under "probabilities"
    <name>-rle.json             rle: COCO's run lengths of each predicted class
    predicted-with.json         the model, its settings and classes, for the whole folder

A video gives only <name>-overlay.mp4. A raster (a GeoTIFF, or a TIFF too large for memory) gives <name>.tif in place of
<name>.png, and only ids and overlay.
"""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from shards.errors import ConfigError
from shards.files.atomic import write_atomically
from shards.files.outside_json import parse_json
from shards.files.plain_file import LARGEST_TEXT, read_plain
from shards.files.strict_json import to_json
from shards.manifest import ClassInfo
from shards.picture import encode_png
from trainer.evaluation.prediction import Prediction
from trainer.evaluation.predictor import Extra
from trainer.predicting.inputs import Source

SUFFIXES = {"ids": ".png", "overlay": "-overlay.png", "confidence": "-confidence.png",
            "probabilities": "-probabilities.npz", "rle": "-rle.json"}
RASTER_KINDS = {"ids", "overlay"}
RECORD = "predicted-with.json"


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """Where predictions go.

    kinds         of `SUFFIXES`
    label_offset  added to the ids in the PNGs; 1 is what ADE20K's test server takes
    """

    folder: Path
    kinds: Collection[str]
    label_offset: int = 0

    @property
    def extra(self) -> Extra | None:
        """What the predictor has to add for these kinds."""
        if "probabilities" in self.kinds:
            return "probabilities"
        return "confidence" if "confidence" in self.kinds else None

    def paths(self, source: Source) -> dict[str, Path]:
        """Kind -> file; for a video only the overlay, a video too."""
        base = self.folder / source.name.parent / source.name.stem
        if source.is_video:
            return {"overlay": Path(f"{base}-overlay.mp4")}
        return {kind: Path(f"{base}{SUFFIXES[kind]}") for kind in self.kinds}

    def raster_paths(self, source: Source) -> dict[str, Path]:
        """As `paths`, of a raster. Raises ConfigError for other kinds than ids and overlay."""
        if others := sorted(set(self.kinds) - RASTER_KINDS):
            raise ConfigError(f"{source.shown} is a GeoTIFF or too large for memory, legal with --save: "
                              f"{', '.join(sorted(RASTER_KINDS))}; found {', '.join(others)}")
        return {kind: path.with_suffix(".tif") if kind == "ids" else path for kind, path in self.paths(source).items()}

    def is_done(self, source: Source, since: int = 0) -> bool:
        """Whether all files of a source exist, and are not older than `since` (see `claim_folder`); each is written
        atomically."""
        return any(all(path.exists() and path.stat().st_mtime_ns >= since for path in paths.values())
                   for paths in self._possible(source))

    def _possible(self, source: Source) -> Iterator[dict[str, Path]]:
        yield self.paths(source)
        if source.may_be_raster and RASTER_KINDS.issuperset(self.kinds):
            yield self.raster_paths(source)

    def check(self, sources: Sequence[Source], overwrite: bool) -> None:
        """Raise ConfigError when a prediction would overwrite an image, another prediction or, unless it is wanted,
        a file that was there before the folder's first prediction."""
        written: dict[Path, Source] = {}
        is_claimed = (self.folder / RECORD).exists()
        for source in sources:
            for path in (path for paths in self._possible(source) for path in paths.values()):
                other = written.setdefault(path, source)
                if other is not source:
                    raise ConfigError(f"predictions of {other.shown} and {source.shown} would both be written to "
                                      f"{path}; use a different --output for each, or give their common folder or a "
                                      "quoted glob, which keep sub-folders apart")
        inputs = {source.path.resolve() for source in sources if source.path is not None}
        for path, source in written.items():
            if path.resolve() in inputs:
                raise ConfigError(f"the prediction of {source.shown} would overwrite the image {path}; choose another "
                                  "--output")
            if not overwrite and not is_claimed and path.exists():
                raise ConfigError(f"{path} exists, and is no prediction: {self.folder} has no {RECORD}; choose "
                                  "another --output, or add --overwrite")

    def write(self, source: Source, prediction: Prediction) -> None:
        """Write the files of an image."""
        contents = {"ids": self._ids, "overlay": _overlay, "confidence": _confidence, "probabilities": _probabilities,
                    "rle": _rle}
        for kind, path in self.paths(source).items():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, contents[kind](prediction))

    def _ids(self, prediction: Prediction) -> bytes:
        if not self.label_offset:
            return prediction.png()
        wide = len(prediction.classes) + self.label_offset > 256
        ids = prediction.label_map.astype(np.uint16) + self.label_offset
        return encode_png(Image.fromarray(ids if wide else ids.astype(np.uint8)))


def claim_folder(folder: Path, identity: dict[str, Any], classes: Sequence[ClassInfo], overwrite: bool) -> int:
    """Write the folder's record; returns the time (unix ns) before which files in it are not predictions of this model,
    0 if all are.

    Raises ConfigError if it holds another model's predictions, unless they are to be overwritten: some would be skipped
    as done, and a folder of two models' predictions is no one's result. When they are overwritten, the record keeps the
    time of it, as not all of them may be, or not in one go.
    """
    path = folder / RECORD
    found = _record(path, overwrite)
    kept, since = found.get("identity"), found.get("since")
    different = sorted(name for name in identity if not isinstance(kept, dict) or kept.get(name) != identity[name])
    if different and not overwrite and path.exists():
        raise ConfigError(f"{folder} holds predictions of another model or other settings ({', '.join(different)} "
                          "differ); choose another --output, or add --overwrite")
    if different and overwrite and folder.exists():
        since = _time_in(folder)
    elif type(since) is not int:
        since = 0
    folder.mkdir(parents=True, exist_ok=True)
    record = {"identity": identity, "classes": {str(number): info.name for number, info in enumerate(classes)}}
    write_atomically(path, to_json({**record, **({"since": since} if since else {})}, indent=1).encode())
    return since


def _time_in(folder: Path) -> int:
    """Now, in unix ns, by the clock that dates the files of a folder: another one may be ahead."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_mtime_ns


def _record(path: Path, overwrite: bool) -> dict[str, Any]:
    """A folder's record, empty without one. Raises ConfigError when it is malformed, unless it is to be overwritten."""
    try:
        return parse_json(read_plain(path, LARGEST_TEXT), str(path))
    except FileNotFoundError:
        return {}
    except ConfigError:
        if not overwrite:
            raise
        return {}


def _overlay(prediction: Prediction) -> bytes:
    return encode_png(prediction.overlay_with_legend())


def _confidence(prediction: Prediction) -> bytes:
    assert prediction.confidence is not None
    return encode_png(Image.fromarray((np.clip(prediction.confidence, 0, 1) * 255).round().astype(np.uint8)))


def _probabilities(prediction: Prediction) -> bytes:
    buffer = io.BytesIO()
    assert prediction.probabilities is not None
    np.savez_compressed(buffer, probabilities=prediction.probabilities)
    return buffer.getvalue()


def _rle(prediction: Prediction) -> bytes:
    return to_json(prediction.rle()).encode()
