"""The segmentation heads. All have `forward(features)` and `semantic_logits(outputs, size)`, so that training, sliding
windows and evaluation are independent of the kind of head. EoMT's is in `trainer.models.eomt`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.models.backbones.base import Backbone
from trainer.models.mask_decoder import MaskedTransformerDecoder
from trainer.models.outputs import MaskOutputs, PixelOutputs
from trainer.models.pixel_decoder import MSDeformAttnPixelDecoder
from trainer.models.resizing import Rows, Size, resize

OutputsT = TypeVar("OutputsT", MaskOutputs, PixelOutputs)


class SegmentationHead(nn.Module, ABC, Generic[OutputsT]):
    """Interface of all heads."""

    activation: str | None = None  # transformers' name, where it depends on the ViT

    @abstractmethod
    def semantic_logits(self, outputs: OutputsT, size: Size, dtype: torch.dtype = torch.float32,
                        rows: Rows | None = None) -> Tensor:
        """Per-class scores [B, C, H, W] at `size`, from the outputs of `forward`; with `rows` only those rows of them.

        Mask classification heads multiply classes and masks in `dtype`, which is then also the dtype of the scores.
        """

    @abstractmethod
    def probabilities(self, scores: Tensor) -> Tensor:
        """Scores [B, C, ...] as probabilities that sum to 1 over the classes, same shape."""

    def set_progress(self, step: float, total_steps: int) -> None:
        """Called before every step with its number, from 0; ignored by most heads."""

    def set_matched_gradients(self, enabled: bool) -> None:
        """Heads with masks: detach pred_masks; return also the embeddings and features of which they are products."""


class MaskClassificationHead(SegmentationHead[MaskOutputs]):
    """A head whose queries each predict a mask and a class: outputs are pred_logits, pred_masks and aux_outputs."""

    def semantic_logits(self, outputs: MaskOutputs, size: Size, dtype: torch.dtype = torch.float32,
                        rows: Rows | None = None) -> Tensor:
        """Per-class scores [B, C, H, W] at `size`: masks weighted by their class probabilities, summed.

        These are scores, not logits: each is in 0..Q (MaskFormer's semantic inference, arXiv:2107.06278 sec. 3.4). The
        DINOv3 reference rounds both factors, and so the scores, to bfloat16 (`dtype`).
        """
        pred_masks = outputs["pred_masks"]
        with torch.autocast(pred_masks.device.type, enabled=False):
            classes = outputs["pred_logits"].float().softmax(dim=-1)[..., :-1]  # [B, Q, C], without "no object"
            masks = resize(pred_masks, size, rows).sigmoid()
            return torch.einsum("bqc,bqhw->bchw", classes.to(dtype), masks.to(dtype))

    def probabilities(self, scores: Tensor) -> Tensor:
        """The scores divided by their sum: a pixel's class as a mixture of the masks that contain it."""
        return scores / scores.sum(1, keepdim=True).clamp_(min=torch.finfo(scores.dtype).tiny)


class Mask2FormerHead(MaskClassificationHead):
    """Pixel decoder and masked-attention decoder (Mask2Former, arXiv:2112.01527).

    in_channels  channels of the features "1".."4", fine to coarse
    hidden_dim   width of all later layers: a multiple of 32 and of nheads
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        hidden_dim: int,
        num_classes: int,
        *,
        num_queries: int,
        nheads: int,
        enc_layers: int,
        enc_ffn: int,
        dec_layers: int,
        dec_ffn: int,
    ) -> None:
        super().__init__()
        self.pixel_decoder = MSDeformAttnPixelDecoder(
            in_channels, hidden_dim, nheads=nheads, ffn_dim=enc_ffn, num_layers=enc_layers)
        self.predictor = MaskedTransformerDecoder(
            hidden_dim, num_classes, num_queries=num_queries, nheads=nheads, ffn_dim=dec_ffn, num_layers=dec_layers)

    def set_matched_gradients(self, enabled: bool) -> None:
        """See `mask_decoder.predicted_masks`."""
        self.predictor.matched_gradients = enabled

    def forward(self, features: dict[str, Tensor], with_aux: bool = False) -> MaskOutputs:
        """Features {"1".."4"}: [B, D, H/s, W/s] -> pred_logits [B, Q, C + 1] and pred_masks [B, Q, H/4, W/4].

        In training or with `with_aux` also aux_outputs: the same two for each of the dec_layers earlier predictions.
        """
        mask_features, multi_scale = self.pixel_decoder(features)
        return self.predictor(multi_scale, mask_features, with_aux=self.training or with_aux)


class LinearBackbone(nn.Module):
    """The ViT with feature maps instead of tokens as output, for the linear head."""

    def __init__(self, feature_model: Backbone) -> None:
        super().__init__()
        self.feature_model = feature_model

    @property
    def backbone(self) -> Backbone:
        """The ViT; `feature_model`, the attribute's name, is fixed by the reference's keys."""
        return self.feature_model

    def forward(self, images: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Normalised images [B, 3, H, W] -> for each layer a patch map [B, D, H/16, W/16] and class token [B, D]."""
        features = self.feature_model(images)
        return list(zip(features.patch_maps, features.cls_tokens, strict=True))


class LinearHead(SegmentationHead[PixelOutputs]):
    """Linear probe: channel dropout, batch norm, 1x1 convolution (DINOv2, arXiv:2304.07193 sec. 7.4)."""

    def __init__(
        self, in_channels: Sequence[int], num_classes: int, *, dropout: float, use_batchnorm: bool, use_cls_token: bool
    ) -> None:
        super().__init__()
        channels = sum(in_channels) * (2 if use_cls_token else 1)
        self.use_cls_token = use_cls_token
        self.dropout = nn.Dropout2d(dropout)
        self.batchnorm_layer = nn.BatchNorm2d(channels) if use_batchnorm else nn.Identity()
        self.conv = nn.Conv2d(channels, num_classes, 1)
        nn.init.normal_(self.conv.weight, std=0.01)
        assert self.conv.bias is not None
        nn.init.zeros_(self.conv.bias)

    def forward(self, features: list[tuple[Tensor, Tensor]]) -> PixelOutputs:
        """Patch map [B, D, h, w] and class token [B, D] per layer -> {"logits": [B, C, h, w]}.

        h and w are those of the first layer's map. Class tokens are used only if the head was built with them.
        """
        size = features[0][0].shape[-2:]
        maps = []
        for patch_map, cls_token in features:
            maps.append(F.interpolate(patch_map, size=size, mode="bilinear", align_corners=False))
            if self.use_cls_token:
                maps.append(cls_token[:, :, None, None].expand(-1, -1, *size))
        # Maps rebuilt from tokens are transposed views, on which BatchNorm2d fails: see DINOv3Adapter._pyramid.
        stacked = torch.cat(maps, dim=1).contiguous()  # [B, sum D, h, w]
        return {"logits": self.conv(self.batchnorm_layer(self.dropout(stacked)))}

    def semantic_logits(self, outputs: PixelOutputs, size: Size, dtype: torch.dtype = torch.float32,
                        rows: Rows | None = None) -> Tensor:
        """Class logits float32 [B, C, H, W], resized bilinearly to `size`; with `rows` only those rows of them."""
        return resize(outputs["logits"], size, rows)

    def probabilities(self, scores: Tensor) -> Tensor:
        """Softmax over the classes."""
        return scores.softmax(1)
