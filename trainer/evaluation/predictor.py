"""Predict class ids for one image, with the windows, views and rounding configured in `eval.*`.

By default an image is resized as normalised floats, windows have a size that the network accepts (a small image is
padded), and scores are float32. `eval.reference` reproduces a published evaluation instead, so that numbers are
comparable: "dinov3" (github.com/facebookresearch/dinov3, eval/segmentation) resizes uint8 images with Pillow, cuts
windows inside the image (a square where both sides are below the crop) and computes Mask2Former's scores in bfloat16;
"eomt" (github.com/tue-mps/eomt) resizes with Pillow until the image just covers one window, and spreads windows evenly.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from shards.errors import ConfigError
from trainer.config import RunConfig
from trainer.data.transforms import normalize
from trainer.evaluation.sliding_window import Size, covering_size, slide_inference, view_size
from trainer.models import Segmenter
from trainer.out_of_memory import OutOfMemory, allocator_error


class Predictor:
    """Turns one image into class ids as configured in `eval.*`: sliding window or whole image, one or several views."""

    def __init__(self, model: Segmenter, config: RunConfig, num_classes: int, device: torch.device) -> None:
        self.model, self.config, self.num_classes, self.device = model, config, num_classes, device
        self.settings, self.size_divisor = config.eval, config.decoder_head.size_divisor

    def __call__(self, image: Tensor) -> Tensor:
        """uint8 [3, H, W] on any device -> int64 [H, W] class ids on the model's device.

        Raises OutOfMemory naming the settings that determine how much memory an image takes.
        """
        height, width = image.shape[1:]
        try:
            return self._predict(image)
        except (RuntimeError, MemoryError) as error:
            if (line := allocator_error(error)) is None:
                raise
            settings, gigabytes = self.settings, 4 * self.num_classes * height * width / 1e9
            raise OutOfMemory(
                f"image of {width}x{height} pixels, {self.num_classes} classes: out of memory ({line}). Its scores "
                f"take several times {gigabytes:.1f} GB: resize it; lower eval.crop_size (now {settings.crop_size}) "
                f"or eval.resize_short_side (now {settings.resize_short_side or 'null'}); set eval.mode=slide (now "
                f"{settings.mode})") from error

    @torch.inference_mode()
    def _predict(self, image: Tensor) -> Tensor:
        """See `__call__`.

        The class probabilities of all views are averaged. They are a softmax over classes even of Mask2Former's scores,
        as in the DINOv3 reference, whose published numbers with several views depend on it.
        """
        size = (image.shape[1], image.shape[2])
        total = torch.zeros(1, self.num_classes, *size, device=self.device)  # [1, C, H, W]
        for mirrored in (False, True) if self.settings.tta_flip else (False,):
            for view in (self.view(image, side) for side in self.view_sizes(size)):
                total += self.view_scores(view.flip(3) if mirrored else view, size, mirrored).softmax(1)
        return total.argmax(1)[0]

    def view_sizes(self, size: Size) -> list[Size]:
        """The sizes to which an image of this size is resized, one per scale."""
        settings = self.settings
        if settings.reference == "eomt":
            return [covering_size(size, settings.crop_size)]
        ratios: list[float] | list[None] = settings.tta_ratios or [None]
        return [view_size(size, settings.resize_short_side, ratio) for ratio in ratios]

    def view(self, image: Tensor, size: Size) -> Tensor:
        """uint8 [3, H, W] -> normalised float32 [1, 3, *size] on the model's device."""
        mean, std = self.config.backbone.image_mean, self.config.backbone.image_std
        if self.settings.reference is not None:
            return normalize(_resize_by_pillow(image, size)[None].to(self.device, non_blocking=True), mean, std)
        pixels = normalize(image[None].to(self.device, non_blocking=True), mean, std)
        if size == tuple(image.shape[1:]):
            return pixels
        return F.interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=True)

    @torch.inference_mode()
    def view_scores(self, view: Tensor, size: Size, mirrored: bool) -> Tensor:
        """Scores float32 [1, C, *size] of a normalised view [1, 3, h, w]; for a mirrored view, mirrored back."""
        settings = self.settings
        scores = slide_inference(
            self._window_scores, view, self.num_classes, None if settings.mode == "whole" else settings.crop_size,
            None if settings.reference == "eomt" else settings.stride,
            size_divisor=self.size_divisor if settings.reference is None else None)
        resized = F.interpolate(scores, size, mode="bilinear", align_corners=False)
        return resized.flip(3) if mirrored else resized

    def _window_scores(self, window: Tensor) -> Tensor:
        try:
            with autocast(self.config, self.device):
                outputs = self.model(window)
        except ValueError as error:  # only reference windows can have sizes that do not fit
            raise ConfigError(f"eval.reference={self.settings.reference} cuts a window that the network rejects: "
                              f"{error}. Set eval.crop_size and eval.resize_short_side to multiples of "
                              f"{self.size_divisor} as published, or eval.reference=null") from error
        dtype = torch.bfloat16 if self.settings.reference == "dinov3" else torch.float32
        return self.model.semantic_logits(outputs, (window.shape[2], window.shape[3]), dtype)


def autocast(config: RunConfig, device: torch.device) -> torch.autocast:
    """bf16 autocast as set in `train.precision`; "auto" enables it on CUDA devices that support it."""
    precision = config.train.precision
    supported = device.type == "cuda" and torch.cuda.is_bf16_supported()
    enabled = precision == "bf16" or (precision == "auto" and supported)
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def _resize_by_pillow(image: Tensor, size: Size) -> Tensor:
    """uint8 [3, H, W] -> uint8 [3, *size] on the host: bilinear, antialiased, each pass rounded to 8 bits."""
    pixels = Image.fromarray(image.permute(1, 2, 0).cpu().contiguous().numpy())
    resized = pixels.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)
