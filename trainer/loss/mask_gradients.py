"""Hand gradients of masks, known already, to the tensors that the masks came from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainer.models.outputs import MaskPrediction


def with_gradients(value: Tensor, items: Sequence[MaskPrediction], matches: Tensor, gradients: Tensor) -> Tensor:
    """`value`, a scalar, with the gradients that the predictions' matched masks have under it.

    items        the L predictions; see `MaskClassificationLoss.step`
    matches      int64 [L, 3, M]: image, query and target of each of the M masks
    gradients    float32 [B, L, N, h, w]: of the mask matched with each of up to N targets; zero where there is none

    Raises ValueError when some predictions come with their factors and others without.

    Only the matched queries' masks have a gradient at all. Masks are linear in what they are made of, so the gradient
    of embeddings and features needs two products over those few masks, where autograd would take all queries'.
    """
    without = sum("mask_embeddings" not in item for item in items)
    if 0 < without < len(items):
        raise ValueError(f"{without} of {len(items)} predictions lack mask_embeddings and mask_features; legal: in all "
                         "of them or in none")
    if without:
        for layer, item in enumerate(items):  # one by one: no two whole gradients need to exist at once
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
    """Gradients of one prediction's masks [B, Q, h, w]: zero but for the matched ones."""

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
        whole = gradients.new_zeros(ctx.shape, dtype=ctx.dtype)
        whole[images, queries] = (gradients[images, ctx.layer, target_ids] * upstream).to(ctx.dtype)
        return upstream, None, None, None, whole


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
        of_embeddings: dict[int, Tensor] = {}
        of_features = []
        for group, feature in zip(ctx.groups, features, strict=True):
            maps = feature.float().flatten(2)  # [B, D, hw]
            images, queries, target_ids = matches[group].unbind(1)  # [g, M]
            layers = torch.arange(len(group), device=maps.device)[:, None]
            # A place for every target of every image in every layer, so that one product does for all of them.
            masks = (gradients if len(group) == len(matches) else gradients[:, group]).flatten(1, 2).flatten(2)
            matched = maps.new_zeros(*gradients.shape[:1], len(group), gradients.shape[2], maps.shape[1])
            whole = torch.stack([embeddings[layer] for layer in group])  # [g, B, Q, D]
            matched[images, layers, target_ids] = whole[layers, images, queries].float() * upstream
            of_matched = (masks @ maps.mT).view_as(matched) * upstream  # [B, g, N, D]
            found = torch.zeros_like(whole)
            found[layers, images, queries] = of_matched[images, layers, target_ids].to(whole.dtype)
            of_embeddings |= zip(group, found.unbind(), strict=True)
            of_features.append((matched.flatten(1, 2).mT @ masks).view(feature.shape).to(feature.dtype))
        return None, None, None, None, *(of_embeddings[layer] for layer in range(len(matches))), *of_features
