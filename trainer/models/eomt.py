"""EoMT (arXiv:2503.19108): the last ViT blocks process the queries themselves; no adapter, no pixel decoder.

In training, each of these blocks lets a query attend only to patches where its mask, predicted before the block, is
positive. The fraction of masked queries is annealed to zero, block by block, so that inference needs no masks.
Parameter names below `segmentation_model.1.` equal those of transformers' `EomtDinov3ForUniversalSegmentation`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from shards.errors import ConfigError
from trainer.models.backbones.base import Backbone, Grid
from trainer.models.heads import MaskClassificationHead
from trainer.models.mask_decoder import blocked_positions, predicted_masks
from trainer.models.outputs import MaskOutputs, MaskPrediction, PredictedMasks

_ANNEALING_POWER = 0.9


class SharedBlocks(NamedTuple):
    """Tokens and the blocks to come, which also take queries in front of the tokens."""

    tokens: Tensor  # [B, prefix + N, D]
    blocks: Sequence[Callable[[Tensor, Tensor | None], Tensor]]  # (tokens [B, T, D], allowed [B, 1, T, T]) -> tokens
    norm: Callable[[Tensor], Tensor]
    grid: Grid


class PartialBackbone(nn.Module):
    """A ViT run up to its last `num_blocks` blocks, which are returned for the head to run."""

    def __init__(self, backbone: Backbone, num_blocks: int) -> None:
        super().__init__()
        if num_blocks > backbone.depth:
            raise ConfigError(f"decoder_head.num_blocks is {num_blocks}, legal: at most the {backbone.depth} blocks of "
                              "the backbone")
        self.num_blocks = num_blocks
        self.backbone = backbone

    def forward(self, images: Tensor) -> SharedBlocks:
        """Normalised images [B, 3, H, W] -> tokens and remaining blocks. Raises ValueError like the ViT."""
        vit = self.backbone
        first = vit.depth - self.num_blocks
        with torch.set_grad_enabled(vit.trainable and torch.is_grad_enabled()):
            tokens, grid, rope = vit.embed(images)
            for number in range(first):
                tokens = vit.block(number, tokens, rope)
        # Not under no_grad: even in a frozen ViT these blocks backpropagate to the queries.
        blocks = [lambda tokens, allowed, number=number: vit.block(number, tokens, rope, allowed)
                  for number in range(first, vit.depth)]
        return SharedBlocks(tokens, blocks, vit.norm, grid)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of a map."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, D, H, W] -> same shape."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()


class UpscaleLayer(nn.Module):
    """Doubles a map's size: transposed convolution, activation, depthwise convolution, norm."""

    def __init__(self, dim: int, activation: nn.Module) -> None:
        super().__init__()
        self.conv1 = nn.ConvTranspose2d(dim, dim, 2, stride=2)
        self.activation = activation
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.layernorm2d = ChannelNorm(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """[B, D, H, W] -> [B, D, 2H, 2W]"""
        return self.layernorm2d(self.conv2(self.activation(self.conv1(x))))


class UpscaleBlock(nn.Module):
    """A sequence of `UpscaleLayer`s."""

    def __init__(self, dim: int, num_layers: int, activation: nn.Module) -> None:
        super().__init__()
        self.block = nn.ModuleList(UpscaleLayer(dim, activation) for _ in range(num_layers))

    def forward(self, x: Tensor) -> Tensor:
        """[B, D, H, W] -> [B, D, H * 2^n, W * 2^n]"""
        for layer in self.block:
            x = layer(x)
        return x


class MaskHead(nn.Module):
    """Three linear layers of equal width with activations in between."""

    def __init__(self, dim: int, activation: nn.Module) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = (nn.Linear(dim, dim) for _ in range(3))
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]"""
        return self.fc3(self.activation(self.fc2(self.activation(self.fc1(x)))))


class QueryTokensHead(MaskClassificationHead):
    """Queries that ViT blocks process together with the tokens, and their predictions.

    num_blocks          blocks that process the queries; num_blocks + 1 predictions
    num_upscale_blocks  doublings of the patch grid; 2 gives masks at stride 4
    activation          transformers' name of the ViT's activation, gelu or silu
    mask_annealing      part of the run, as two fractions, over which masking is phased out
    annealing_steps     alternatively, the steps (start, end) of it for each block; empty: mask_annealing

    `attn_mask_probs` [num_blocks], each block's fraction of masked queries, is a buffer and part of the weights. In
    evaluation nothing is random: a block masks all queries if its fraction is at least 1/2, otherwise none.
    """

    attn_mask_probs: Tensor

    def __init__(
        self,
        dim: int,
        num_classes: int,
        *,
        num_queries: int,
        num_blocks: int,
        num_upscale_blocks: int,
        activation: str,
        mask_annealing: tuple[float, float],
        annealing_steps: Sequence[tuple[int, int]] = (),
    ) -> None:
        super().__init__()
        self.mask_annealing = mask_annealing
        self.annealing_steps = annealing_steps
        self.matched_gradients = False
        self.activation = activation
        self.query = nn.Embedding(num_queries, dim)
        self.upscale_block = UpscaleBlock(dim, num_upscale_blocks, ACT2FN[activation])
        self.mask_head = MaskHead(dim, ACT2FN[activation])
        self.class_predictor = nn.Linear(dim, num_classes + 1)
        self.register_buffer("attn_mask_probs", torch.ones(num_blocks))
        self._update_masked_blocks([1.0] * num_blocks)
        self.register_load_state_dict_post_hook(_update_after_loading)

    def set_matched_gradients(self, enabled: bool) -> None:
        """See `mask_decoder.predicted_masks`."""
        self.matched_gradients = enabled

    def set_progress(self, step: float, total_steps: int) -> None:
        """Set the fractions of masked queries for this step of the run."""
        shares = [remaining_share((step - start) / (end - start)) for start, end in self.annealing_steps]
        if not shares:
            shares = masking_shares(step / total_steps, len(self.attn_mask_probs), self.mask_annealing)
        self._update_masked_blocks(shares)
        for entry, share in zip(self.attn_mask_probs.unbind(), shares, strict=True):
            entry.fill_(share)  # copying a new host tensor would synchronise with the device

    def predict_through(self, features: SharedBlocks, with_aux: bool = False) -> MaskOutputs:
        """-> pred_logits [B, Q, C + 1] and pred_masks [B, Q, h * 2^u, w * 2^u], for an h x w grid and u upscale layers.

        In training or with `with_aux` also aux_outputs: the same two, predicted before each of the blocks.
        """
        with_aux = with_aux or self.training
        masked_blocks = self._masked_in_training if self.training else self._masked_in_evaluation
        queries = self.query.weight.expand(features.tokens.shape[0], -1, -1)
        tokens = torch.cat((queries.to(features.tokens.dtype), features.tokens), dim=1)  # [B, T, D]
        aux_outputs: list[MaskPrediction] = []
        for block, masked, share in zip(features.blocks, masked_blocks, self.attn_mask_probs.unbind(), strict=True):
            allowed = None
            if with_aux or masked:
                normed = features.norm(tokens)
                masks = self._masks(normed, features.grid)
                if with_aux:
                    aux_outputs.append({"pred_logits": self._classes(normed), **masks})
                if masked:
                    allowed = self._allowed(masks["pred_masks"], tokens.shape[1], features.grid, share)
            tokens = block(tokens, allowed)
        normed = features.norm(tokens)
        outputs: MaskOutputs = {"pred_logits": self._classes(normed), **self._masks(normed, features.grid)}
        if with_aux:
            outputs["aux_outputs"] = aux_outputs
        return outputs

    def _update_masked_blocks(self, shares: Sequence[float]) -> None:
        """Keep host copies of what the buffer implies, to avoid synchronising with the device."""
        self._masked_in_training = [share > 0 for share in shares]
        self._masked_in_evaluation = [share >= 0.5 for share in shares]

    def _classes(self, normed: Tensor) -> Tensor:
        return self.class_predictor(normed[:, : self.query.num_embeddings])

    def _masks(self, normed: Tensor, grid: tuple[int, int]) -> PredictedMasks:
        patches = normed[:, -(grid[0] * grid[1]):].transpose(1, 2).unflatten(2, grid)  # [B, D, h, w]
        # Contiguous, because otherwise the depthwise weight's gradient is channels-last, which DDP copies.
        upscaled = self.upscale_block(patches.contiguous())
        embeddings = self.mask_head(normed[:, : self.query.num_embeddings])
        return predicted_masks(embeddings, upscaled, self.matched_gradients and self.training)

    def _allowed(self, pred_masks: Tensor, num_tokens: int, grid: tuple[int, int], share: Tensor) -> Tensor:
        """bool [B, 1, T, T]: all tokens attend to all, except that a masked query sees only the patches in its mask."""
        visible = ~blocked_positions(pred_masks, grid)  # [B, Q, N]
        if self.training:
            visible |= (torch.rand(visible.shape[:2], device=visible.device) > share)[:, :, None]
        allowed = visible.new_ones(visible.shape[0], 1, num_tokens, num_tokens)
        allowed[:, 0, : visible.shape[1], -visible.shape[2]:] = visible
        return allowed


class EomtHead(QueryTokensHead):
    """EoMT's head: the blocks are the last ones of the ViT."""

    def forward(self, features: SharedBlocks, with_aux: bool = False) -> MaskOutputs:
        """See `predict_through`."""
        return self.predict_through(features, with_aux)


def masking_shares(progress: float, num_blocks: int, window: tuple[float, float]) -> list[float]:
    """Fraction of masked queries in each block at `progress` (0..1) of the run.

    Within the window, masking is phased out block by block, first block first, each over two thirds of an equal part
    of the window, much as in the recipes published with arXiv:2503.19108.
    """
    start, end = window
    period = (end - start) / (num_blocks - 1 / 3)
    return [remaining_share((progress - start - block * period) / (2 / 3 * period)) for block in range(num_blocks)]


def remaining_share(t: float) -> float:
    """Fraction of queries still masked at t of a block's interval: 1 before it, (1 - t)^0.9 within, 0 after."""
    return float((1.0 - min(max(t, 0.0), 1.0)) ** _ANNEALING_POWER)


def _update_after_loading(head: nn.Module, _: Any) -> None:
    assert isinstance(head, QueryTokensHead)
    head._update_masked_blocks(head.attn_mask_probs.tolist())
