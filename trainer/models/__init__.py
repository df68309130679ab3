"""Builders of the networks, in float32 on the CPU. `trainer.build` chooses among them."""

from __future__ import annotations

from typing import Any

from shards.errors import ConfigError
from trainer.model_config import AdapterConfig, BackboneConfig, DecoderHeadConfig
from trainer.models.adapter import DINOv3Adapter
from trainer.models.backbones.sources import build_backbone
from trainer.models.eomt import EomtHead, PartialBackbone
from trainer.models.heads import LinearBackbone, LinearHead, Mask2FormerHead
from trainer.models.pmt import PmtHead, TappedBackbone
from trainer.models.segmenter import Segmenter

__all__ = ["Segmenter", "build_eomt", "build_linear", "build_mask2former", "build_pmt"]


def build_mask2former(
    backbone: BackboneConfig, adapter: AdapterConfig, head: DecoderHeadConfig, num_classes: int
) -> Segmenter:
    """ViT, adapter and Mask2Former head; adapter and head are initialised from torch's global RNG.

    Raises ConfigError when the ViT cannot be loaded or the settings are inconsistent.
    """
    if backbone.layers == "LAST":
        raise ConfigError("decoder_head.type m2f needs features of four layers, but backbone.layers is LAST; set it to "
                          "FOUR_EVEN_INTERVALS (or FOUR_LAST)")
    features = DINOv3Adapter(build_backbone(backbone), adapter)
    return Segmenter(features, Mask2FormerHead(
        [features.embed_dim] * 4,
        head.hidden_dim,
        num_classes,
        num_queries=head.num_queries,
        nheads=head.nheads,
        enc_layers=head.enc_layers,
        enc_ffn=head.enc_ffn,
        dec_layers=head.dec_layers,
        dec_ffn=head.dec_ffn,
    ))


def build_linear(backbone: BackboneConfig, head: DecoderHeadConfig, num_classes: int) -> Segmenter:
    """ViT and linear head, for any choice of layers. Raises ConfigError when the ViT cannot be loaded."""
    vit = build_backbone(backbone, use_norm=head.use_backbone_norm)
    return Segmenter(LinearBackbone(vit), LinearHead(
        [vit.embed_dim] * len(vit.layers),
        num_classes,
        dropout=head.dropout,
        use_batchnorm=head.use_batchnorm,
        use_cls_token=head.use_cls_token,
    ))


def build_eomt(backbone: BackboneConfig, head: DecoderHeadConfig, num_classes: int) -> Segmenter:
    """ViT whose last blocks also process the queries. ConfigError when it cannot be loaded or is too shallow."""
    vit = build_backbone(backbone)
    features = PartialBackbone(vit, head.num_blocks)
    return Segmenter(features, EomtHead(vit.embed_dim, num_classes, activation=vit.activation, **_query_tokens(head)))


def build_pmt(backbone: BackboneConfig, head: DecoderHeadConfig, num_classes: int) -> Segmenter:
    """ViT and a decoder of plain blocks. Raises ConfigError when the ViT cannot be loaded."""
    vit = build_backbone(backbone, released_heads=False)
    head.check_blocks(vit.embed_dim)
    return Segmenter(TappedBackbone(vit), PmtHead(
        vit.embed_dim,
        num_classes,
        num_layers=len(vit.layers),
        num_heads=vit.num_heads,
        ffn_dim=head.block_ffn or 4 * vit.embed_dim,
        **_query_tokens(head),
    ))


def _query_tokens(head: DecoderHeadConfig) -> dict[str, Any]:
    """The settings that EoMT and PMT share."""
    return {
        "num_queries": head.num_queries,
        "num_blocks": head.masked_blocks,
        "num_upscale_blocks": head.num_upscale_blocks,
        "mask_annealing": tuple(head.mask_annealing),
        "annealing_steps": list(zip(head.mask_annealing_starts, head.mask_annealing_ends, strict=True)),
    }
