"""Stable import path of `MaskClassificationLoss`, which is defined in `trainer.loss`."""

from trainer.loss.mask_classification_loss import MaskClassificationLoss

__all__ = ["MaskClassificationLoss"]
