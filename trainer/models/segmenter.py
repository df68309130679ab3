"""The whole model: features and head, with the reference's checkpoint keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

from shards.errors import ConfigError
from trainer.models.adapter import DINOv3Adapter
from trainer.models.backbone import DINOv3Backbone
from trainer.models.fitting import check_fit
from trainer.models.heads import LinearBackbone, LinearHead, Mask2FormerHead
from trainer.models.weights import WeightsFile, weights_in

_ADVICE = "Check backbone, adapter and decoder_head settings against those of the saved model"


class Segmenter(nn.Module):
    """Keys start with `segmentation_model.0.` (features, with the frozen ViT inside) and `segmentation_model.1.`."""

    def __init__(self, features: DINOv3Adapter | LinearBackbone, head: Mask2FormerHead | LinearHead) -> None:
        super().__init__()
        self.segmentation_model = nn.ModuleList([features, head])

    @property
    def head(self) -> Mask2FormerHead | LinearHead:
        """The segmentation head."""
        return cast(Mask2FormerHead | LinearHead, self.segmentation_model[1])

    @property
    def backbone(self) -> DINOv3Backbone:
        """The frozen ViT."""
        return cast(DINOv3Adapter | LinearBackbone, self.segmentation_model[0]).backbone

    def forward(self, images: Tensor) -> dict[str, Any]:
        """Normalised images [B, 3, H, W] -> the head's outputs. ValueError for sizes that the features refuse."""
        features, head = self.segmentation_model
        return head(features(images))

    def semantic_logits(self, outputs: dict[str, Any], size: tuple[int, int]) -> Tensor:
        """Per-class scores float32 [B, C, H, W] at `size`, from what `forward` returned."""
        return self.head.semantic_logits(outputs, size)

    def trainable_state_dict(self) -> dict[str, Tensor]:
        """Every parameter and buffer except the frozen ViT's: what a checkpoint has to hold."""
        return {key: value for key, value in self.state_dict().items() if not key.startswith(self._vit_prefix)}

    def load_trainable_state_dict(
        self, state: Mapping[str, Tensor], what: str = "the weights", ignore: Sequence[str] = ()
    ) -> list[str]:
        """Load what `trainable_state_dict` gave. Other keys or shapes raise ConfigError, and nothing is loaded.

        Keys that match an `ignore` pattern are neither compared nor loaded. Returns the model's keys among them.
        """
        own = self.trainable_state_dict()
        kept = check_fit(own, state, what=what, advice=_ADVICE, ignore=ignore)
        fitting = own.keys() - set(kept)
        self.load_state_dict({key: state[key] for key in fitting}, strict=False)  # complete but for ViT and `kept`
        return kept

    def meta_state_dict(self) -> dict[str, Tensor]:
        """The whole model, ViT included, with the keys and shapes of Meta's full model."""
        prefix = self._vit_prefix
        vit = {prefix + key: tensor for key, tensor in self.backbone.meta_state_dict().items()}
        return self.trainable_state_dict() | vit

    def load_meta_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the whole model from Meta's layout. What does not fit raises ConfigError before anything changes."""
        weights = weights_in(state, "the state dict")
        check_fit(self.trainable_state_dict(), weights.model, what="the weights", advice=_ADVICE)
        self.backbone.load_meta_state_dict(weights.vit)
        self.load_trainable_state_dict(weights.model)

    def load_weights(self, weights: WeightsFile, ignore: Sequence[str] = ()) -> list[str]:
        """Start adapter and head from a file; returns the keys that `ignore` left as they were.

        The ViT is not loaded. One that the file holds, or that it names by hash, has to be the configured one: a head
        is worth nothing on another ViT. Raises ConfigError for that and for every key that does not fit.
        """
        if not weights.model:
            raise ConfigError(f"{weights.path} holds a ViT and no head; name it in backbone.source")
        if weights.vit:
            self.backbone.check_same(weights.vit, f"the ViT's weights in {weights.path}")
        if weights.backbone_sha256 not in (None, self.backbone.weights_sha256()):
            raise ConfigError(f"the head in {weights.path} was trained on another ViT (sha256 "
                              f"{weights.backbone_sha256:.16}) than the configured backbone")
        return self.load_trainable_state_dict(weights.model, f"the weights in {weights.path}", ignore)

    @property
    def _vit_prefix(self) -> str:
        """What the keys of the ViT start with, in our own layout (`…vit.`) and in Meta's."""
        return next(name for name, module in self.named_modules() if module is self.backbone) + "."
