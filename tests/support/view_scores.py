"""The scores of one view, all rows at once, through the predictor's own parts."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.evaluation.predictor import Predictor
from trainer.evaluation.views import View, WindowQueue
from trainer.models.resizing import Size


@torch.inference_mode()
def view_scores(predictor: Predictor, pixels: Tensor, size: Size, mirrored: bool) -> Tensor:
    """Scores float32 [1, C, *size] of a view [1, 3, h, w] as the network sees it; of a mirrored one, mirrored back."""
    view = View(pixels.flip(3) if mirrored else pixels, size, predictor.rules, mirrored=mirrored)
    queue = WindowQueue(predictor._run, predictor.settings.window_batch)
    queue.add(view.windows)
    for window in view.windows:
        queue.compute(window)
    return view.scores((0, size[0]), predictor.num_classes, predictor._score_rows)
