"""Types of head outputs, which losses and evaluation consume."""

from __future__ import annotations

from typing import NotRequired, TypedDict

from torch import Tensor


class PredictedMasks(TypedDict):
    """Masks of one prediction and, with matched gradients, the two factors of which they are products."""

    pred_masks: Tensor  # logits [B, Q, h, w]
    mask_embeddings: NotRequired[Tensor]  # [B, Q, D]
    mask_features: NotRequired[Tensor]  # [B, D, h, w]


class MaskPrediction(PredictedMasks):
    """Masks and classes of one decoder layer."""

    pred_logits: Tensor  # [B, Q, C + 1], the last class is "no object"


class MaskOutputs(MaskPrediction):
    """The final prediction; in training also those of earlier layers, in layer order."""

    aux_outputs: NotRequired[list[MaskPrediction]]


class PixelOutputs(TypedDict):
    """Outputs of the linear head."""

    logits: Tensor  # [B, C, h, w]


Outputs = MaskOutputs | PixelOutputs
