"""Builders of the networks, in float32 on the CPU. `trainer.build` chooses among them."""

from __future__ import annotations

from shards.errors import ConfigError
from trainer.model_config import AdapterConfig, BackboneConfig, DecoderHeadConfig
from trainer.models.adapter import DINOv3Adapter
from trainer.models.backbone import build_backbone
from trainer.models.eomt import EomtHead, PartialBackbone
from trainer.models.heads import LinearBackbone, LinearHead, Mask2FormerHead
from trainer.models.segmenter import Segmenter

__all__ = ["Segmenter", "build_eomt", "build_linear", "build_mask2former"]


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
    start, end = head.mask_annealing
    return Segmenter(PartialBackbone(vit, head.num_blocks), EomtHead(
        vit.embed_dim,
        num_classes,
        num_queries=head.num_queries,
        num_blocks=head.num_blocks,
        num_upscale_blocks=head.num_upscale_blocks,
        activation=vit.vit.config.hidden_act,
        mask_annealing=(start, end),
        annealing_steps=list(zip(head.mask_annealing_starts, head.mask_annealing_ends, strict=True)),
    ))
