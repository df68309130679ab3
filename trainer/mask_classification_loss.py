"""`MaskClassificationLoss` where other programs import it from; it lives in `trainer.loss`."""

from trainer.loss.mask_classification_loss import MaskClassificationLoss

__all__ = ["MaskClassificationLoss"]
