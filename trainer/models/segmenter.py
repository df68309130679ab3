"""The whole model: features and head, with the reference's checkpoint keys."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

from torch import Tensor, nn

from shards.errors import ConfigError
from trainer.models.adapter import DINOv3Adapter
from trainer.models.backbone import DINOv3Backbone
from trainer.models.heads import LinearBackbone, LinearHead, Mask2FormerHead

_LISTED_KEYS = 5  # per group of an error message


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
        frozen = next(name for name, module in self.named_modules() if module is self.backbone) + "."
        return {key: value for key, value in self.state_dict().items() if not key.startswith(frozen)}

    def load_trainable_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load what `trainable_state_dict` gave. Other keys or shapes raise ConfigError, and nothing is loaded."""
        own = self.trainable_state_dict()
        misshaped = [f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
                     for key in own.keys() & state.keys() if state[key].shape != own[key].shape]
        groups = {
            "missing": _listed(own.keys() - state.keys()),
            "unexpected": _listed(state.keys() - own.keys()),
            "of another shape": _listed(misshaped),
        }
        problems = [f"{name}: {keys}" for name, keys in groups.items() if keys]
        if problems:
            raise ConfigError(f"the weights do not fit this model; {'; '.join(problems)}. "
                              "Check backbone, adapter and decoder_head settings against those of the saved model")
        self.load_state_dict(state, strict=False)  # complete but for the frozen ViT, as just checked


def _listed(keys: Iterable[str]) -> str:
    """The first few keys, sorted, and how many more there are."""
    ordered = sorted(keys)
    more = f" and {len(ordered) - _LISTED_KEYS} more" if len(ordered) > _LISTED_KEYS else ""
    return ", ".join(ordered[:_LISTED_KEYS]) + more
