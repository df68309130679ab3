"""The whole model: features and head, with the reference's checkpoint keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from shards.errors import ConfigError
from trainer.models.adapter import DINOv3Adapter
from trainer.models.backbone import DINOv3Backbone
from trainer.models.eomt import PartialBackbone
from trainer.models.fitting import check_fit
from trainer.models.heads import LinearBackbone, SegmentationHead
from trainer.models.outputs import Outputs
from trainer.models.weights import WeightsFile, weights_in

Features = DINOv3Adapter | LinearBackbone | PartialBackbone

_ADVICE = "Check backbone, adapter and decoder_head settings against those of the saved model"


class Segmenter(nn.Module):
    """Keys start with `segmentation_model.0.` (features, with the ViT inside) and `segmentation_model.1.` (head)."""

    def __init__(self, features: Features, head: SegmentationHead[Any]) -> None:
        super().__init__()
        self.segmentation_model = nn.ModuleList([features, head])

    @property
    def head(self) -> SegmentationHead[Any]:
        """The segmentation head."""
        return cast(SegmentationHead[Any], self.segmentation_model[1])

    @property
    def backbone(self) -> DINOv3Backbone:
        """The ViT."""
        return cast(Features, self.segmentation_model[0]).backbone

    def forward(self, images: Tensor) -> Outputs:
        """Normalised images [B, 3, H, W] -> the head's outputs. ValueError for sizes that the features refuse."""
        features, head = self.segmentation_model
        return head(features(images))

    def semantic_logits(self, outputs: Outputs, size: tuple[int, int],
                        dtype: torch.dtype = torch.float32) -> Tensor:
        """Per-class scores [B, C, H, W] at `size`, from what `forward` returned; `dtype`: see the head's."""
        return self.head.semantic_logits(outputs, size, dtype)

    def head_state_dict(self) -> dict[str, Tensor]:
        """Every parameter and buffer except the ViT's: Meta's layout of a released head (with its adapter)."""
        prefix = self._vit_prefix
        return {key: value for key, value in self.state_dict().items() if not key.startswith(prefix)}

    def meta_state_dict(self) -> dict[str, Tensor]:
        """The whole model, ViT included, with the keys and shapes of Meta's full model."""
        prefix = self._vit_prefix
        vit = {prefix + key: tensor for key, tensor in self.backbone.meta_state_dict().items()}
        return self.head_state_dict() | vit

    def trainable_state_dict(self) -> dict[str, Tensor]:
        """What training changes, and a checkpoint holds: the whole model, or all but the ViT when that is frozen."""
        return self.meta_state_dict() if self.backbone.trainable else self.head_state_dict()

    def load_trainable_state_dict(self, state: Mapping[str, Tensor], what: str = "the weights") -> None:
        """Load what `trainable_state_dict` gave. Other keys or shapes raise ConfigError, and nothing is loaded."""
        if self.backbone.trainable:
            self.load_meta_state_dict(state, what)
        else:
            self._load_head(state, what)

    def load_meta_state_dict(self, state: Mapping[str, Tensor], what: str = "the weights") -> None:
        """Take the whole model from Meta's layout. What does not fit raises ConfigError before anything changes."""
        weights = weights_in(state, what)
        check_fit(self.head_state_dict(), weights.model, what=what, advice=_ADVICE)
        self.backbone.load_meta_state_dict(weights.vit, what)
        self._load_head(weights.model, what)

    def load_weights(self, weights: WeightsFile, ignore: Sequence[str] = ()) -> list[str]:
        """Start from a file; returns the keys of adapter and head that `ignore` left as they were.

        A ViT in the file is loaded when ours is to be trained. Otherwise one that the file holds, or that it names by
        hash, has to be the configured one: a head is worth nothing on another ViT. Raises ConfigError for that and for
        every key that does not fit.
        """
        if not weights.model:
            raise ConfigError(f"{weights.path} holds a ViT and no head; name it in backbone.source")
        what = f"the weights in {weights.path}"
        if not weights.vit and weights.backbone_sha256 not in (None, self.backbone.weights_sha256()):
            raise ConfigError(f"the head in {weights.path} was trained on another ViT (sha256 "
                              f"{weights.backbone_sha256:.16}) than the configured backbone")
        check_fit(self.head_state_dict(), weights.model, what=what, advice=_ADVICE, ignore=ignore)
        if weights.vit and self.backbone.trainable:
            self.backbone.load_meta_state_dict(weights.vit, what)
        elif weights.vit:
            self.backbone.check_same(weights.vit, f"the ViT's weights in {weights.path}")
        return self._load_head(weights.model, what, ignore)

    def _load_head(self, state: Mapping[str, Tensor], what: str, ignore: Sequence[str] = ()) -> list[str]:
        own = self.head_state_dict()
        kept = check_fit(own, state, what=what, advice=_ADVICE, ignore=ignore)
        fitting = own.keys() - set(kept)
        self.load_state_dict({key: state[key] for key in fitting}, strict=False)  # complete but for ViT and `kept`
        return kept

    @property
    def _vit_prefix(self) -> str:
        """What the keys of the ViT start with, in our own layout (`…vit.`) and in Meta's."""
        backbone = self.backbone
        return next(name for name, module in self.named_modules() if module is backbone) + "."
