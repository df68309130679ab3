"""Transformer decoder with masked attention (Mask2Former, arXiv:2112.01527 sec. 3.2.1).

Every layer refines the queries, which predict masks and classes; it attends only where the previous prediction's mask
is positive. Parameter names equal the reference's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.models.outputs import MaskOutputs, MaskPrediction, PredictedMasks
from trainer.models.pixel_decoder import NUM_LEVELS, sine_position_code
from trainer.models.recompute import RecomputingModule


def predicted_masks(embeddings: Tensor, features: Tensor, matched_gradients: bool) -> PredictedMasks:
    """Mask logits [B, Q, h, w], products of embeddings [B, Q, D] and features [B, D, h, w].

    With `matched_gradients` the masks are detached, and the two factors are returned as mask_embeddings and
    mask_features; `trainer.loss.mask_gradients` backpropagates the gradients of the few matched masks to them.
    """
    with torch.set_grad_enabled(torch.is_grad_enabled() and not matched_gradients):
        masks = PredictedMasks(pred_masks=torch.einsum("bqd,bdhw->bqhw", embeddings, features))
    if matched_gradients:
        masks["mask_embeddings"], masks["mask_features"] = embeddings, features
    return masks


def blocked_positions(pred_masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Where a mask, resized to `size`, is negative (probability below 1/2).

    pred_masks: logits [B, Q, H, W] -> bool [B, Q, h * w]. Resized before the comparison; no gradient.
    """
    resized = F.interpolate(pred_masks.detach(), size=size, mode="bilinear", align_corners=False)
    return resized.flatten(2) < 0


def allowed_positions(blocked: Tensor) -> Tensor:
    """Attention mask for all heads: bool [B, Q, HW] -> [B, 1, Q, HW], True = attend.

    A query that is blocked everywhere attends everywhere: a softmax over nothing would be NaN.
    """
    return (~blocked | blocked.all(dim=-1, keepdim=True))[:, None]


class MultiheadAttention(nn.Module):
    """Multi-head attention with `nn.MultiheadAttention`'s parameter names, but one mask for all heads.

    The torch module needs a mask per head, [B * heads, Q, HW]; here it is broadcast from [B, 1, Q, HW].
    """

    def __init__(self, dim: int, nheads: int) -> None:
        super().__init__()
        self.nheads = nheads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None) -> Tensor:
        """query [B, Q, D], key and value [B, N, D], allowed bool [B, 1, Q, N] (None: everything) -> [B, Q, D]."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (F.linear(x, weight, bias).unflatten(-1, (self.nheads, -1)).transpose(1, 2)  # [B, heads, N, d]
                   for x, weight, bias in zip((query, key, value), weights, biases, strict=True))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        return self.out_proj(attended.transpose(1, 2).flatten(2))


class CrossAttentionLayer(nn.Module):
    """Masked cross-attention of queries to a feature map; residual, post-norm."""

    def __init__(self, dim: int, nheads: int) -> None:
        super().__init__()
        self.multihead_attn = MultiheadAttention(dim, nheads)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, query_embed: Tensor, key: Tensor, value: Tensor, allowed: Tensor) -> Tensor:
        """x [B, Q, D], query_embed [Q, D], key and value [B, HW, D], allowed bool [B, 1, Q, HW] -> [B, Q, D]."""
        return self.norm(x + self.multihead_attn(x + query_embed, key, value, allowed))


class SelfAttentionLayer(nn.Module):
    """Self-attention among queries; residual, post-norm."""

    def __init__(self, dim: int, nheads: int) -> None:
        super().__init__()
        self.self_attn = MultiheadAttention(dim, nheads)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, query_embed: Tensor) -> Tensor:
        """x [B, Q, D], query_embed [Q, D] -> [B, Q, D]."""
        positioned = x + query_embed
        return self.norm(x + self.self_attn(positioned, positioned, x))


class FFNLayer(nn.Module):
    """Two linear layers with ReLU; residual, post-norm."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(dim, ffn_dim)
        self.linear2 = nn.Linear(ffn_dim, dim)
        self.norm = nn.LayerNorm(dim)
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, Q, D] -> [B, Q, D]."""
        return self.norm(x + self.linear2(F.relu(self.linear1(x))))


class MLP(nn.Module):
    """Three linear layers of equal width with ReLUs in between."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(dim, dim) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]"""
        first, second, last = self.layers
        return last(F.relu(second(F.relu(first(x)))))


class MaskedTransformerDecoder(RecomputingModule):
    """`num_layers` decoder layers that cycle through the levels, coarse first; makes `num_layers + 1` predictions."""

    def __init__(
        self, hidden_dim: int, num_classes: int, *, num_queries: int, nheads: int, ffn_dim: int, num_layers: int
    ) -> None:
        super().__init__()
        layers = range(num_layers)
        self.transformer_cross_attention_layers = nn.ModuleList(CrossAttentionLayer(hidden_dim, nheads) for _ in layers)
        self.transformer_self_attention_layers = nn.ModuleList(SelfAttentionLayer(hidden_dim, nheads) for _ in layers)
        self.transformer_ffn_layers = nn.ModuleList(FFNLayer(hidden_dim, ffn_dim) for _ in layers)
        self.post_norm = nn.LayerNorm(hidden_dim)
        self.query_feat = nn.Embedding(num_queries, hidden_dim)
        self.query_embed = nn.Embedding(num_queries, hidden_dim)
        self.level_embed = nn.Embedding(NUM_LEVELS, hidden_dim)
        self.matched_gradients = False
        self.class_embed = nn.Linear(hidden_dim, num_classes + 1)
        self.mask_embed = MLP(hidden_dim)

    def forward(self, multi_scale: list[Tensor], mask_features: Tensor, with_aux: bool) -> MaskOutputs:
        """Predictions from three maps [B, D, h, w] (coarse to fine) and mask features [B, D, H/4, W/4].

        Returns pred_logits [B, Q, C + 1] and pred_masks [B, Q, H/4, W/4] (raw logits); with `with_aux` also
        aux_outputs, the same two for the queries before each layer. Without it, their classes are not computed.
        """
        levels = [self._keys_and_values(level, features) for level, features in enumerate(multi_scale)]
        x = self.query_feat.weight.expand(mask_features.shape[0], -1, -1)  # [B, Q, D]
        query_embed = self.query_embed.weight  # [Q, D]
        aux_outputs: list[MaskPrediction] = []
        blocks = zip(self.transformer_cross_attention_layers, self.transformer_self_attention_layers,
                     self.transformer_ffn_layers, strict=True)
        for layer, (cross_attention, self_attention, ffn) in enumerate(blocks):
            normed = self.post_norm(x)
            masks = self._masks(normed, mask_features)
            if with_aux:
                aux_outputs.append({"pred_logits": self.class_embed(normed), **masks})
            key, value, size = levels[layer % NUM_LEVELS]
            allowed = allowed_positions(blocked_positions(masks["pred_masks"], size))
            x = self.run(cross_attention, x, query_embed, key, value, allowed)
            x = self.run(lambda x, attend=self_attention, ffn=ffn: ffn(attend(x, query_embed)), x)
        normed = self.post_norm(x)
        outputs: MaskOutputs = {"pred_logits": self.class_embed(normed), **self._masks(normed, mask_features)}
        if with_aux:
            outputs["aux_outputs"] = aux_outputs
        return outputs

    def _keys_and_values(self, level: int, features: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """Keys and values [B, hw, D] of one level [B, D, h, w]; only keys contain the position."""
        _, dim, height, width = features.shape
        value = features.flatten(2).transpose(1, 2) + self.level_embed.weight[level]
        return value + sine_position_code(height, width, dim, features.device), value, (height, width)

    def _masks(self, normed: Tensor, mask_features: Tensor) -> PredictedMasks:
        return predicted_masks(self.mask_embed(normed), mask_features, self.matched_gradients and self.training)
