"""PMT, Plain Mask Transformer (arXiv:2603.25398): queries and a frozen ViT's tokens in a few plain ViT blocks.

The tokens of four of the ViT's layers are normalised, projected and summed; queries are prepended, and the blocks of
the decoder, built like those of a DINOv3, process both. Predictions, masked attention and its annealing are EoMT's. The
ViT itself stays as it is, so several heads can share it. Names of PMT's own parts equal those of its authors' code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DINOv3ViTConfig
from transformers.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTLayer

from trainer.models.backbones.base import Backbone, Features
from trainer.models.eomt import QueryTokensHead, SharedBlocks
from trainer.models.outputs import MaskOutputs
from trainer.models.recompute import RecomputingModule


class TappedBackbone(nn.Module):
    """A ViT that returns all tokens of its tapped layers."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Features:
        """Normalised images [B, 3, H, W] -> the ViT's features. Raises ValueError like the ViT."""
        features: Features = self.backbone(images)
        return features


class TokenNorm(nn.BatchNorm1d):
    """Batch norm over the channels of tokens, with statistics over the batch and all tokens."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> same shape."""
        return super().forward(x.transpose(1, 2).contiguous()).transpose(1, 2)


class PmtHead(QueryTokensHead, RecomputingModule):
    """Lateral projections of `num_layers` tapped layers, and `num_blocks` blocks of their own for tokens and queries.

    ffn_dim, num_heads   width of the blocks' MLP, and their attention heads (the ViT's)
    the rest             as in `QueryTokensHead`
    """

    def __init__(self, dim: int, num_classes: int, *, num_layers: int, num_heads: int, ffn_dim: int, **settings: Any
                 ) -> None:
        super().__init__(dim, num_classes, activation="gelu", **settings)
        self.bn = nn.ModuleList(TokenNorm(dim) for _ in range(num_layers))
        self.lateral_projections = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, dim // 2), nn.GELU(), nn.Linear(dim // 2, dim)) for _ in range(num_layers))
        self.scalers = nn.ParameterList(nn.Parameter(torch.ones(dim)) for _ in range(num_layers))
        config = DINOv3ViTConfig(hidden_size=dim, num_attention_heads=num_heads, intermediate_size=ffn_dim,
                                 key_bias=False, layer_norm_eps=1e-5, layerscale_value=1.0, hidden_act="gelu")
        config._attn_implementation = "sdpa"
        self.blocks = nn.ModuleList(DINOv3ViTLayer(config) for _ in range(len(self.attn_mask_probs)))
        self.decoder_norm = nn.LayerNorm(dim)
        self.head_dim = dim // num_heads
        self.blocks.apply(_reset_layer)

    def forward(self, features: Features, with_aux: bool = False) -> MaskOutputs:
        """A ViT's features -> predictions as in `predict_through`."""
        tokens = self.merged(features.layers)
        # A ViT without rotary code has put positions into its tokens; rotating no token is what the blocks then do.
        rope = features.rope or (tokens.new_empty(0, self.head_dim), tokens.new_empty(0, self.head_dim))
        blocks = [lambda tokens, allowed, block=block: self.run(block, tokens, allowed, rope) for block in self.blocks]
        return self.predict_through(SharedBlocks(tokens, blocks, self.decoder_norm, features.grid), with_aux)

    def merged(self, layers: list[Tensor]) -> Tensor:
        """Tokens [B, T, D] of each tapped layer -> their normalised, projected and scaled sum [B, T, D]."""
        lateral = []
        for tokens, norm, project, scale in zip(layers, self.bn, self.lateral_projections, self.scalers, strict=True):
            normed = norm(tokens)
            lateral.append((normed + project(normed)) * scale)
        return torch.stack(lateral).sum(dim=0)


def _reset_layer(module: nn.Module) -> None:
    """Initial weights of a ViT."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
