"""Backpropagate precomputed mask gradients to the tensors from which the masks were computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainer.models.outputs import MaskPrediction


def with_gradients(value: Tensor, items: Sequence[MaskPrediction], matches: Tensor, gradients: Tensor) -> Tensor:
    """`value`, a scalar, with a backward pass that applies the given gradients of the predictions' matched masks.

    items        the L predictions; see `MaskClassificationLoss.step`
    matches      int64 [L, 3, M]: image, query and target of each of the M masks
    gradients    float32 [B, L, N, h, w]: of the mask matched with each of up to N targets; zero where there is none

    Raises ValueError when some predictions have mask factors and others do not.

    Only the matched queries' masks have nonzero gradients. Masks are linear in embeddings and features, so the
    gradients of these take two products over those few masks, where autograd would compute them over all queries.
    """
    without = sum("mask_embeddings" not in item for item in items)
    if 0 < without < len(items):
        raise ValueError(f"{without} of {len(items)} predictions lack mask_embeddings and mask_features; legal: in all "
                         "of them or in none")
    if without:
        for layer, item in enumerate(items):  # one by one, so that only one full gradient exists at a time
            value = _MaskGradients.apply(value, matches, gradients, layer, item["pred_masks"])
        return value
    by_features: dict[int, list[int]] = {}
    for layer, item in enumerate(items):
        by_features.setdefault(id(item["mask_features"]), []).append(layer)
    groups = list(by_features.values())  # layers that share their features: all of Mask2Former's, none of EoMT's
    embeddings = [item["mask_embeddings"] for item in items]
    features = [items[group[0]]["mask_features"] for group in groups]
    return _FactorGradients.apply(value, matches, gradients, groups, *embeddings, *features)


class _MaskGradients(torch.autograd.Function):
    """Gradients of one prediction's masks [B, Q, h, w]: zero except for the matched ones."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, matches: Tensor, gradients: Tensor, layer: int, masks: Tensor) -> Tensor:
        ctx.layer, ctx.shape, ctx.dtype = layer, masks.shape, masks.dtype
        ctx.save_for_backward(matches, gradients)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        matches, gradients = ctx.saved_tensors
        images, queries, target_ids = matches[ctx.layer]
        full = gradients.new_zeros(ctx.shape, dtype=ctx.dtype)
        full[images, queries] = (gradients[images, ctx.layer, target_ids] * upstream).to(ctx.dtype)
        return upstream, None, None, None, full


class _FactorGradients(torch.autograd.Function):
    """Gradients of mask embeddings [B, Q, D] and mask features [B, D, h, w]: products over the matched masks alone."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, matches: Tensor, gradients: Tensor, groups: Sequence[Sequence[int]],
                *factors: Tensor) -> Tensor:
        ctx.groups = groups
        ctx.save_for_backward(matches, gradients, *factors)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        matches, gradients, *factors = ctx.saved_tensors
        embeddings, features = factors[: len(matches)], factors[len(matches):]
        embedding_gradients: dict[int, Tensor] = {}
        feature_gradients = []
        for group, feature in zip(ctx.groups, features, strict=True):
            maps = feature.float().flatten(2)  # [B, D, hw]
            # Stacked: indexing with a list would copy it to the device, and wait for that.
            images, queries, target_ids = torch.stack([matches[layer] for layer in group]).unbind(1)  # [g, M]
            layers = torch.arange(len(group), device=maps.device)[:, None]
            # One row per target of every image and layer, so that a single batched product covers them all.
            own = gradients if len(group) == len(matches) else torch.stack([gradients[:, layer] for layer in group], 1)
            masks = own.flatten(1, 2).flatten(2)
            matched = maps.new_zeros(*gradients.shape[:1], len(group), gradients.shape[2], maps.shape[1])
            stacked = torch.stack([embeddings[layer] for layer in group])  # [g, B, Q, D]
            matched[images, layers, target_ids] = stacked[layers, images, queries].float() * upstream
            matched_gradients = (masks @ maps.mT).view_as(matched) * upstream  # [B, g, N, D]
            full = torch.zeros_like(stacked)
            full[layers, images, queries] = matched_gradients[images, layers, target_ids].to(stacked.dtype)
            embedding_gradients |= zip(group, full.unbind(), strict=True)
            feature_gradients.append((matched.flatten(1, 2).mT @ masks).view(feature.shape).to(feature.dtype))
        per_layer = (embedding_gradients[layer] for layer in range(len(matches)))
        return None, None, None, None, *per_layer, *feature_gradients
