"""Predict class ids for images, with the windows, views and rounding configured in `eval.*`.

By default an image is resized as normalised floats, windows have a size that the network accepts (a small image is
padded), and scores are float32. `eval.reference` reproduces a published evaluation instead, so that numbers are
comparable: "dinov3" (github.com/facebookresearch/dinov3, eval/segmentation) resizes uint8 images with Pillow, cuts
windows inside the image (a square where both sides are below the crop) and computes Mask2Former's scores in bfloat16;
"eomt" (github.com/tue-mps/eomt) resizes with Pillow until the image just covers one window, and spreads windows evenly.

    images -> views (sizes, mirrored) -> windows -> network, eval.window_batch at a time -> small outputs per window
           -> for each band of rows: scores of all views, averaged -> class ids of the band

The windows of all views and of all images of a call are batched together; scores at full size exist for one band only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from shards.errors import ConfigError, RunError
from trainer.config import RunConfig
from trainer.data.transforms import normalize
from trainer.evaluation.score_memory import ScoreMemory
from trainer.evaluation.sliding_window import covering_size, view_size
from trainer.evaluation.views import Pixels, View, ViewRules, Window, WindowQueue
from trainer.models import Segmenter
from trainer.models.outputs import Outputs
from trainer.models.resizing import Rows, Size
from trainer.out_of_memory import OutOfMemory, allocator_error
from trainer.precision import autocast

Extra = Literal["confidence", "probabilities"]


class Segmented(NamedTuple):
    """What is predicted for an image, on the model's device."""

    label_map: Tensor  # class ids [H, W]; uint8 up to 256 classes, else int32
    confidence: Tensor | None = None  # float32 [H, W]: probability of the predicted class
    probabilities: Tensor | None = None  # float16 [C, H, W]


class Predictor:
    """Turns images into class ids as configured in `eval.*`: sliding window or whole image, one or several views."""

    def __init__(self, model: Segmenter, config: RunConfig, num_classes: int, device: torch.device) -> None:
        self.model, self.config, self.num_classes, self.device = model, config, num_classes, device
        self.settings, self.size_divisor = config.eval, config.decoder_head.size_divisor
        settings = self.settings
        self.rules = ViewRules(
            crop_size=None if settings.mode == "whole" else settings.crop_size,
            stride=None if settings.reference == "eomt" else settings.stride,
            size_divisor=self.size_divisor if settings.reference is None else None,
            mean=config.backbone.image_mean, std=config.backbone.image_std)

    def __call__(self, image: Tensor) -> Tensor:
        """uint8 [3, H, W] on any device -> class ids [H, W] on the model's device. Raises like `segment`."""
        return next(self.segment([image])).label_map

    def segment(self, images: Sequence[Tensor], extra: Extra | None = None) -> Iterator[Segmented]:
        """Images uint8 [3, H, W], of any sizes, on any device -> what is predicted for each, in their order.

        `extra` adds what is rarely needed: the confidence, or with it all probabilities (2 bytes per class and pixel).
        Raises OutOfMemory naming the settings that determine how much memory an image takes.
        """
        queue = WindowQueue(self._run, self.settings.window_batch)
        all_views: list[list[View]] = []
        for image in images:
            with self._explaining(image):
                all_views.append(self.views(image))
                queue.add(_in_order_of_need(all_views[-1]))
        for number, image in enumerate(images):
            with self._explaining(image), torch.inference_mode():
                result = self._segment(all_views[number], queue, extra)
            all_views[number] = []
            yield result

    def bands(self, pixels: Pixels) -> Iterator[tuple[Rows, Tensor]]:
        """Rows and their class ids uint8 or int32 [rows, W] of one image at its own size, from top to bottom.

        `pixels` are uint8, [1, 3, H, W] when sliced; only those of a window at a time are. Raises ConfigError for
        settings that resize the image, and like `segment`.
        """
        size = (pixels.shape[2], pixels.shape[3])
        if self.view_sizes(size) != [size] or self.settings.mode == "whole":
            raise ConfigError("an image that is read in parts is predicted at its own size, window by window: set "
                              "eval.mode=slide, eval.resize_short_side=null, eval.tta_ratios=[] and no "
                              "eval.reference=eomt")
        flips = (False, True) if self.settings.tta_flip else (False,)
        views = [View(pixels, size, self.rules, mirrored=mirrored) for mirrored in flips]
        queue = WindowQueue(self._run, self.settings.window_batch)
        queue.add(_in_order_of_need(views))
        with self._explaining(pixels), torch.inference_mode():
            for rows, ids, _ in self._ids_of_bands(views, queue, wanted=False):
                yield rows, ids.to(self._id_dtype)

    @property
    def _id_dtype(self) -> torch.dtype:
        return torch.uint8 if self.num_classes <= 256 else torch.int32

    def _segment(self, views: list[View], queue: WindowQueue, extra: Extra | None) -> Segmented:
        (height, width), classes = views[0].full, self.num_classes
        label_map = torch.empty(height, width, dtype=self._id_dtype, device=self.device)
        confidence = torch.empty(height, width, device=self.device) if extra is not None else None
        probabilities = (torch.empty(classes, height, width, dtype=torch.float16, device=self.device)
                         if extra == "probabilities" else None)
        for rows, ids, average in self._ids_of_bands(views, queue, wanted=extra is not None):
            label_map[slice(*rows)] = ids
            if confidence is not None and average is not None:
                confidence[slice(*rows)] = average[0].gather(0, ids[None])[0]
            if probabilities is not None and average is not None:
                probabilities[:, slice(*rows)] = average[0]
        return Segmented(label_map, confidence, probabilities)

    def _ids_of_bands(self, views: list[View], queue: WindowQueue,
                      wanted: bool) -> Iterator[tuple[Rows, Tensor, Tensor | None]]:
        """Bands of rows, as large as the memory allows: ids int64 [rows, W], and if `wanted` the probabilities."""
        first = views[0].windows[0]
        queue.compute(first)
        assert first.outputs is not None
        memory = ScoreMemory(views, self.num_classes, first.outputs, self.settings.window_batch, averages=wanted)
        for rows in memory.bands(int(self.settings.memory_gb * 1e9)):
            for view in views:
                for window in view.needs(rows):
                    queue.compute(window)
            scores, average = self._band(views, rows, wanted)
            yield rows, _class_ids(scores)[0], average
            for view in views:
                view.close(rows[1])

    def _band(self, views: list[View], rows: Rows, wanted: bool) -> tuple[Tensor, Tensor | None]:
        """Rows of what the class ids are the argmax of, and if `wanted` of the probabilities; [1, C, rows, W] each.

        Several views are averaged after a softmax over classes, even of Mask2Former's scores, as in the DINOv3
        reference, whose published numbers with several views depend on it. A single view needs none for its argmax, but
        the reference rounds it, and so decides ties.
        """
        total = average = None
        softmax = len(views) > 1 or self.settings.reference == "dinov3"
        for view in views:
            scores = view.scores(rows, self.num_classes, self._score_rows)
            if wanted:
                probabilities = self.model.probabilities(scores) / len(views)
                average = probabilities if average is None else average.add_(probabilities)
            if softmax:
                scores = scores.softmax(1)
            total = scores if total is None else total.add_(scores)
        assert total is not None
        return total, average

    def view_sizes(self, size: Size) -> list[Size]:
        """The sizes to which an image of this size is resized, one per scale."""
        settings = self.settings
        if settings.reference == "eomt":
            return [covering_size(size, settings.crop_size)]
        ratios: list[float] | list[None] = settings.tta_ratios or [None]
        return [view_size(size, settings.resize_short_side, ratio) for ratio in ratios]

    def views(self, image: Tensor) -> list[View]:
        """The views of an image uint8 [3, H, W]: each scale, then each scale mirrored."""
        full = (image.shape[1], image.shape[2])
        sizes = self.view_sizes(full)
        self._check_memory(full, sizes)
        pixels = [self.view(image, size) for size in sizes]
        flips = (False, True) if self.settings.tta_flip else (False,)
        return [View(view, full, self.rules, mirrored=mirrored) for mirrored in flips for view in pixels]

    def _check_memory(self, full: Size, sizes: Sequence[Size]) -> None:
        """Raise OutOfMemory for views whose pixels alone exceed the budget, before they are made: of an image of a
        single row, the short side may be enlarged a thousandfold, and the long one with it."""
        channel_bytes = 1 if self.settings.reference is not None else 4
        needed = sum(3 * height * width * channel_bytes for height, width in sizes if (height, width) != full)
        if needed > self.settings.memory_gb * 1e9:
            height, width = max(sizes, key=lambda size: size[0] * size[1])
            raise OutOfMemory(f"image of {full[1]}x{full[0]} pixels: its views, of up to {width}x{height} pixels, take "
                              f"{needed / 1e9:.2f} GB, but eval.memory_gb is {self.settings.memory_gb:g}. Raise it, or "
                              "lower eval.resize_short_side, eval.tta_ratios or, with eval.reference=eomt, "
                              "eval.crop_size")

    def view(self, image: Tensor, size: Size) -> Tensor:
        """uint8 [3, H, W] -> [1, 3, *size] on the model's device: uint8, or normalised float32 if resized as floats."""
        if self.settings.reference is not None:
            return _resize_by_pillow(image, size)[None].to(self.device, non_blocking=True)
        pixels = image[None].to(self.device, non_blocking=True)
        if size == tuple(image.shape[1:]):
            return pixels
        resized = F.interpolate(pixels.float(), size, mode="bilinear", align_corners=False, antialias=True)
        return normalize(resized, self.rules.mean, self.rules.std)  # of fewer pixels, if the image is huge

    @torch.inference_mode()
    def _run(self, windows: Tensor) -> Outputs:
        """The network on normalised windows [B, 3, h, w]. Raises RunError if what it gives is not finite."""
        try:
            with autocast(self.config, self.device):
                outputs = self.model(windows)
        except ValueError as error:  # only reference windows can have sizes that do not fit
            raise ConfigError(f"eval.reference={self.settings.reference} cuts a window that the network rejects: "
                              f"{error}. Set eval.crop_size and eval.resize_short_side to multiples of "
                              f"{self.size_divisor} as published, or eval.reference=null") from error
        named = cast(dict[str, Any], outputs)
        if not all(value.isfinite().all() for value in named.values() if isinstance(value, Tensor)):
            raise RunError(f"the network's outputs for a window of {windows.shape[3]}x{windows.shape[2]} pixels are "
                           "not finite, so they are no prediction; the training of these weights diverged, or they "
                           "are damaged")
        if not self.settings.half_scores:
            return outputs
        return cast(Outputs, {name: value.bfloat16() if isinstance(value, Tensor) else value
                              for name, value in named.items()})

    def _score_rows(self, outputs: Outputs, size: Size, rows: Rows) -> Tensor:
        half = self.settings.half_scores or self.settings.reference == "dinov3"
        scores = self.model.semantic_logits(outputs, size, torch.bfloat16 if half else torch.float32, rows)
        expected = (1, self.num_classes, rows[1] - rows[0], size[1])
        assert scores.shape == expected, f"scores are {tuple(scores.shape)}, expected {expected}"
        return scores

    @contextmanager
    def _explaining(self, image: Pixels) -> Iterator[None]:
        """Turn an allocator's error into OutOfMemory."""
        height, width = image.shape[-2:]
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, OutOfMemory) or (line := allocator_error(error)) is None:
                raise
            settings = self.settings
            raise OutOfMemory(
                f"image of {width}x{height} pixels, {self.num_classes} classes: out of memory ({line}). Lower "
                f"eval.memory_gb (now {settings.memory_gb}), eval.window_batch (now {settings.window_batch}), "
                f"eval.crop_size (now {settings.crop_size}) or eval.resize_short_side (now "
                f"{settings.resize_short_side or 'null'}); set eval.mode=slide (now {settings.mode})") from error


def _class_ids(scores: Tensor) -> Tensor:
    """[1, C, rows, W] -> int64 [1, rows, W]: the argmax. On one or two threads numpy's takes half the time of torch's,
    which is longer than anything else that is done with the scores of a linear head."""
    if scores.device.type == "cpu" and torch.get_num_threads() <= 2:
        return torch.from_numpy(scores.numpy().argmax(1))
    return scores.argmax(1)


def _in_order_of_need(views: Sequence[View]) -> list[Window]:
    return [window for _, _, window in sorted(
        ((view.due(window), number, window) for view in views for number, window in enumerate(view.windows)),
        key=lambda entry: entry[:1])]


def _resize_by_pillow(image: Tensor, size: Size) -> Tensor:
    """uint8 [3, H, W] -> uint8 [3, *size] on the host: bilinear, antialiased, each pass rounded to 8 bits."""
    pixels = Image.fromarray(image.permute(1, 2, 0).cpu().contiguous().numpy())
    resized = pixels.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)
