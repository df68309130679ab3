"""Predict a video file frame by frame: an overlay video of the same size and frame rate. Needs PyAV (extra `video`)."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from shards.errors import ConfigError, CorruptShardError
from shards.files.atomic import atomic_path
from trainer.pretrained import Pretrained

_CODECS = ("libx264", "h264", "mpeg4")  # the first that PyAV was built with
_ONLY = {"format_whitelist": "mov,matroska,avi", "protocol_whitelist": "file"}  # not a playlist of other files and URLs
_FULL = (errno.ENOSPC, errno.EDQUOT)


def predict_video(pretrained: Pretrained, path: Path, output: Path, name: str) -> None:
    """Write the overlay video, without sound. Raises ConfigError without PyAV, CorruptShardError for a file that is not
    a readable video, called `name`, and OSError when the output cannot be written."""
    try:
        import av
    except ImportError as error:
        raise ConfigError(f"{name}: {error}; videos need: pip install 'maskstream[video]'") from error
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        with av.open(str(path), options=_ONLY) as source, atomic_path(output) as temporary:
            if not source.streams.video:
                raise CorruptShardError(f"{name} has no video stream")
            with av.open(str(temporary), "w", format="mp4") as target:
                _copy(pretrained, source, target, name)
    except av.error.FFmpegError as error:
        if error.errno in _FULL:
            raise OSError(error.errno, error.strerror, str(output)) from error
        raise CorruptShardError(f"{name} is not a readable video: {error.strerror}") from error


def _copy(pretrained: Pretrained, source: Any, target: Any, name: str) -> None:
    """Predict and encode all frames."""
    import av

    stream = None
    for prediction in pretrained.predict_all(_frames(source, name)):
        pixels = _even(np.asarray(prediction.overlay()))
        if 0 in pixels.shape:
            raise CorruptShardError(f"{name} has frames of a single row or column, legal: at least 2x2 pixels")
        if stream is None:
            stream = target.add_stream(_codec(), rate=source.streams.video[0].average_rate or 25)
            stream.width, stream.height, stream.pix_fmt = pixels.shape[1], pixels.shape[0], "yuv420p"
        target.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
    if stream is None:
        raise CorruptShardError(f"{name} has no frame that can be decoded")
    target.mux(stream.encode(None))


def _frames(source: Any, name: str) -> Iterator[npt.NDArray[np.uint8]]:
    """RGB frames, turned as a player turns them."""
    stream = source.streams.video[0]
    for frame in tqdm(source.decode(stream), total=stream.frames or None, desc=name, unit="frame", leave=False,
                      disable=None):
        pixels = frame.to_ndarray(format="rgb24")
        yield np.ascontiguousarray(np.rot90(pixels, round(getattr(frame, "rotation", 0) / 90)))


def _even(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Without the last row or column where there is an odd number of them, which the pixel format does not allow."""
    height, width = pixels.shape[:2]
    return np.ascontiguousarray(pixels[: height - height % 2, : width - width % 2])


def _codec() -> str:
    import av

    return next(name for name in _CODECS if name in av.codecs_available)
