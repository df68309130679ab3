"""The complete model, features and head, with the reference's checkpoint keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from shards.errors import ConfigError
from trainer.models.adapter import DINOv3Adapter
from trainer.models.backbones.base import Backbone
from trainer.models.deltas import with_deltas
from trainer.models.eomt import PartialBackbone
from trainer.models.fitting import check_fit
from trainer.models.heads import LinearBackbone, SegmentationHead
from trainer.models.outputs import Outputs
from trainer.models.pmt import TappedBackbone
from trainer.models.resizing import Rows, Size
from trainer.models.weights import WeightsFile, weights_in

FeatureModel = DINOv3Adapter | LinearBackbone | PartialBackbone | TappedBackbone

_ADVICE = "Check backbone, adapter and decoder_head settings against those of the saved model"
_OTHER_CLASSES = "; if it has other classes, name the classifier in load.ignore, such as ['*class_embed*']"


class Segmenter(nn.Module):
    """Keys start with `segmentation_model.0.` (features, including the ViT) or `segmentation_model.1.` (head)."""

    def __init__(self, features: FeatureModel, head: SegmentationHead[Any]) -> None:
        super().__init__()
        self.segmentation_model = nn.ModuleList([features, head])

    @property
    def head(self) -> SegmentationHead[Any]:
        """The segmentation head."""
        return cast(SegmentationHead[Any], self.segmentation_model[1])

    @property
    def backbone(self) -> Backbone:
        """The ViT."""
        return cast(FeatureModel, self.segmentation_model[0]).backbone

    def forward(self, images: Tensor) -> Outputs:
        """Normalised images [B, 3, H, W] -> the head's outputs. ValueError for sizes that the features reject."""
        features, head = self.segmentation_model
        return head(features(images))

    def semantic_logits(self, outputs: Outputs, size: Size, dtype: torch.dtype = torch.float32,
                        rows: Rows | None = None) -> Tensor:
        """Per-class scores [B, C, H, W] at `size`, from the outputs of `forward`; for `dtype` and `rows` see the
        head."""
        return self.head.semantic_logits(outputs, size, dtype, rows)

    def probabilities(self, scores: Tensor) -> Tensor:
        """Scores [B, C, ...] as probabilities over the classes."""
        return self.head.probabilities(scores)

    def head_state_dict(self) -> dict[str, Tensor]:
        """All parameters and buffers except the ViT's: the layout of Meta's released head, adapter included."""
        prefix = self._vit_prefix
        return {key: value for key, value in self.state_dict().items() if not key.startswith(prefix)}

    def meta_state_dict(self) -> dict[str, Tensor]:
        """The whole model, including the ViT, with the keys and shapes of Meta's full model."""
        prefix = self._vit_prefix
        vit = {prefix + key: tensor for key, tensor in self.backbone.meta_state_dict().items()}
        return self.head_state_dict() | vit

    def trainable_state_dict(self) -> dict[str, Tensor]:
        """The part that training changes and a checkpoint stores: the whole model, or all but a frozen ViT."""
        return self.meta_state_dict() if self.backbone.trainable else self.head_state_dict()

    def load_trainable_state_dict(self, state: Mapping[str, Tensor], what: str = "the weights") -> None:
        """Load the result of `trainable_state_dict`. Raises ConfigError for other keys or shapes, and loads nothing."""
        if self.backbone.trainable:
            self.load_meta_state_dict(state, what)
        else:
            self._load_head(state, what)

    def load_meta_state_dict(self, state: Mapping[str, Tensor], what: str = "the weights") -> None:
        """Load the whole model from Meta's layout. Raises ConfigError, before anything changes, if it does not fit."""
        weights = weights_in(state, what)
        check_fit(self.head_state_dict(), weights.model, what=what, advice=_ADVICE)
        self.backbone.load_meta_state_dict(weights.vit, what)
        self._load_head(weights.model, what)

    def load_weights(self, weights: WeightsFile, ignore: Sequence[str] = (),
                     base_sha256: str | None = None) -> list[str]:
        """Load weights from a file; returns the keys of adapter and head that were not loaded because of `ignore`.

        A ViT in the file is loaded if ours is trainable. Otherwise the ViT that the file contains, or identifies by
        hash, must be the configured one: a head is useless on another ViT. Differences are added to the configured
        ViT; `base_sha256` as `told_sha256` in `with_deltas`. Raises ConfigError if it is not the right one, and for
        every key that does not fit.
        """
        if not weights.model:
            raise ConfigError(f"{weights.path} contains a ViT but no head; set backbone.source to it instead")
        what = f"the weights in {weights.path}"
        if not weights.vit and weights.backbone_sha256 not in (None, self.backbone.weights_sha256()):
            raise ConfigError(f"the head in {weights.path} was trained on another ViT (sha256 "
                              f"{weights.backbone_sha256:.16}) than the configured backbone; set backbone.source to "
                              "that ViT")
        check_fit(self.head_state_dict(), weights.model, what=what, advice=_ADVICE + _OTHER_CLASSES, ignore=ignore)
        if weights.activation is not None and self.head.activation not in (None, weights.activation):
            raise ConfigError(f"the head in {weights.path} was trained with {weights.activation}, but on this ViT it "
                              f"would run with {self.head.activation}; use the file as published for transformers")
        if weights.vit:
            self._load_vit(weights, base_sha256)
        return self._load_head(weights.model, what, ignore)

    def _load_vit(self, weights: WeightsFile, base_sha256: str | None) -> None:
        state, backbone, what = weights.vit, self.backbone, f"the ViT's weights in {weights.path}"
        for name, theirs, ours in (("layer_norm_eps", weights.layer_norm_eps, backbone.layer_norm_eps),
                                   ("number of attention heads", weights.num_heads, backbone.num_heads)):
            if theirs not in (None, ours):
                raise ConfigError(f"the {name} of the ViT in {weights.path} is {theirs}, of the configured backbone "
                                  f"{ours}; set backbone.source to {weights.path} too")
        if weights.vit_form == "differences":
            if not backbone.trainable:
                raise ConfigError(f"{weights.path} changes the ViT, but backbone.trainable is false; set it to true")
            left_out = backbone.completed({})
            base = {key: tensor for key, tensor in backbone.meta_state_dict().items() if key not in left_out}
            state = with_deltas(base, state, what=f"the differences in {weights.path}",
                                base_sha256=backbone.weights_sha256(), told_sha256=base_sha256)
        if weights.vit_form != "complete":
            state = backbone.completed(state)
        if backbone.trainable:
            backbone.load_meta_state_dict(state, what)
        else:
            backbone.check_same(state, what)

    def _load_head(self, state: Mapping[str, Tensor], what: str, ignore: Sequence[str] = ()) -> list[str]:
        own = self.head_state_dict()
        ignored = check_fit(own, state, what=what, advice=_ADVICE, ignore=ignore)
        fitting = own.keys() - set(ignored)
        self.load_state_dict({key: state[key] for key in fitting}, strict=False)  # all but the ViT and `ignored`
        return ignored

    @property
    def _vit_prefix(self) -> str:
        """Prefix of the ViT's keys, in our own layout (followed by `vit.`) and in Meta's."""
        backbone = self.backbone
        return next(name for name, module in self.named_modules() if module is backbone) + "."
