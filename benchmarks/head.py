"""What does our Mask2Former head cost compared with the one in transformers, on the CPU?

Same sizes, weights and random features; it is an error if outputs or gradients differ. Repetitions are interleaved
in one process; ratios are medians over repetitions. Training: forward with all predictions, backward to weights and
features. Inference: no gradients, classes of the last prediction only. Only transformers also computes attention
weights to return, masks per attention head and for a layer after the last, and checks for infinities.

example: python -m benchmarks.head --size 512
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from timeit import timeit
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Mask2FormerConfig
from transformers.models.mask2former.modeling_mask2former import Mask2FormerPixelDecoder, Mask2FormerTransformerModule

from benchmarks.results import Result, benchmark_parser, spread
from trainer.models.heads import Mask2FormerHead

CHANNELS, CLASSES = [384] * 4, 150  # the features of a ViT-S, the classes of ADE20K
SIZES = Mask2FormerConfig()  # Mask2Former's own: hidden 256, 8 heads, FFN 1024 and 2048, 6 and 9 layers, 100 queries


class OurHead(Mask2FormerHead):
    """Our head, with lists of tensors as inputs and outputs."""

    def __init__(self) -> None:
        super().__init__(
            CHANNELS, SIZES.hidden_dim, CLASSES, num_queries=SIZES.num_queries, nheads=SIZES.num_attention_heads,
            enc_layers=SIZES.encoder_layers, enc_ffn=SIZES.encoder_feedforward_dim,
            dec_layers=SIZES.decoder_layers - 1, dec_ffn=SIZES.dim_feedforward)  # theirs counts predictions

    def pixels(self, *features: Tensor) -> list[Tensor]:
        mask_features, maps = self.pixel_decoder({str(level): x for level, x in enumerate(features, 1)})
        return [*maps, mask_features]

    def predictions(self, *maps: Tensor) -> list[Tensor]:
        last = self.predictor(list(maps[:-1]), maps[-1], with_aux=self.training)
        return [one[key] for one in (*last.get("aux_outputs", ()), last) for key in ("pred_logits", "pred_masks")]


class TheirHead(nn.Module):
    """The part of transformers' model between backbone and loss, with our weights."""

    def __init__(self, ours: OurHead) -> None:
        super().__init__()
        self.pixel_decoder = Mask2FormerPixelDecoder(SIZES, CHANNELS)
        self.predictor = Mask2FormerTransformerModule(SIZES.hidden_dim, SIZES)
        self.class_predictor = nn.Linear(SIZES.hidden_dim, CLASSES + 1)
        for target, source in zip(self.parameters(), in_their_order(ours), strict=True):
            target.data.copy_(source)

    def pixels(self, *features: Tensor) -> list[Tensor]:
        outputs = self.pixel_decoder(features)
        return [*outputs.multi_scale_features, outputs.mask_features]

    def predictions(self, *maps: Tensor) -> list[Tensor]:
        outputs = self.predictor(maps[:-1], maps[-1])
        pairs = list(zip(outputs.intermediate_hidden_states, outputs.masks_queries_logits, strict=True))
        return [x for queries, masks in pairs[0 if self.training else -1:]
                for x in (self.class_predictor(queries.transpose(0, 1)), masks)]


def in_their_order(ours: OurHead) -> list[Tensor]:
    """Our weights in transformers' order, which has separate keys, values and queries in self-attention."""
    pixels, masks = ours.pixel_decoder, ours.predictor
    parts: list[Any] = [pixels.encoder.level_encoding, pixels.input_convs, pixels.encoder.encoder, pixels.mask_feature,
                        pixels.lateral_convs, pixels.output_convs, masks.query_embed, masks.query_feat]
    for cross, own, ffn in zip(masks.transformer_cross_attention_layers, masks.transformer_self_attention_layers,
                               masks.transformer_ffn_layers, strict=True):
        joint: Any = own.self_attn
        parts += [x.chunk(3)[third] for third in (1, 2, 0) for x in (joint.in_proj_weight, joint.in_proj_bias)]
        parts += [joint.out_proj, own.norm, cross, ffn]
    parts += [masks.post_norm, masks.mask_embed, masks.level_embed, masks.class_embed]
    return [x for part in parts for x in (part.parameters() if isinstance(part, nn.Module) else [part])]


class Operators(TorchDispatchMode):
    count = 0  # all dispatched operators, including views

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def cost(part: Callable[[Any], list[Tensor]], head: nn.Module) -> list[int]:
    """Number of operators in a training forward pass, and MiB kept for the backward pass besides the weights."""
    kept: dict[int, Tensor] = {}  # by storage, as views share one
    keep = saved_tensors_hooks(lambda x: kept.setdefault(x.untyped_storage().data_ptr(), x), lambda x: x)
    with Operators() as operators, keep:
        part(head.train())
    for weight in head.parameters():
        kept.pop(weight.untyped_storage().data_ptr(), None)
    return [operators.count, sum(x.untyped_storage().nbytes() for x in kept.values()) >> 20]


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--size", type=int, default=512, help="image side in pixels (default: 512)")
    parser.add_argument("--batch", type=int, default=1, help="batch size (default: 1)")
    parser.add_argument("--repetitions", type=int, default=7, help="interleaved repetitions (default: 7)")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    heads: list[Any] = [ours := OurHead(), TheirHead(ours)]
    result = Result("head", arguments.results)
    result.note("Weights, ours and theirs: "
                + ", ".join(f"{sum(x.numel() for x in head.parameters()):,}" for head in heads))
    sides = [arguments.size // stride for stride in (4, 8, 16, 32)]
    features = [torch.randn(arguments.batch, CHANNELS[0], side, side, requires_grad=True) for side in sides]
    maps = [x.detach().requires_grad_() for x in ours.pixels(*features)]
    parts: dict[str, Callable[[Any], list[Tensor]]] = {
        "pixel decoder": lambda head: head.pixels(*features), "mask decoder": lambda head: head.predictions(*maps),
        "whole head": lambda head: head.predictions(*head.pixels(*features))}
    upstream = {name: [torch.randn_like(x) for x in part(ours)] for name, part in parts.items()}

    def run(name: str, training: bool, head: nn.Module) -> list[Tensor]:
        with torch.set_grad_enabled(training):
            outputs = parts[name](head.train(training))
        if training:  # the weights' gradients are computed, but not returned
            wanted = [*features, *maps, *head.parameters()]
            outputs += torch.autograd.grad(outputs, wanted, upstream[name], allow_unused=True)[:8]
        return [x for x in outputs if x is not None]

    rows = [(name, training) for training in (True, False) for name in parts]
    for row in rows:  # also a warm-up; compared by norm, as a ReLU or a mask near 0 may flip
        for x, y in zip(*(run(*row, head) for head in heads), strict=True):
            assert (x - y).norm() < 0.01 * y.norm(), f"{row}: not the same function"
    times = np.array([[[timeit(partial(run, *row, head), number=1) for head in heads] for row in rows]
                      for _ in range(arguments.repetitions)])
    table = result.table(f"Images {arguments.size}x{arguments.size}, batch {arguments.batch}, {arguments.repetitions} "
                         "interleaved repetitions", "part", "ours, ms", "transformers, ms", "ours / transformers")
    for (name, training), pairs in zip(rows, times.transpose(1, 0, 2), strict=True):
        ours, theirs = (spread(column, 1000) for column in pairs.T)
        varied = max(one["high"] / one["low"] for one in (ours, theirs))
        noise = f" (identical work varied {varied:.1f}x)" if varied > 1.3 else ""
        table.row(f"{name}, {'training' if training else 'inference'}{noise}", ours, theirs,
                  spread(pairs[:, 0] / pairs[:, 1]))
    costs = result.table("A forward pass in training", "part", "operators, ours", "transformers",
                         "kept for backward, ours, MiB", "transformers")
    for name, part in parts.items():
        costs.row(name, *np.transpose([cost(part, head) for head in heads]).flat)
    result.save()


if __name__ == "__main__":
    main()
