"""A linear probe on CamVid, fitted without MaskStream's head, loss, loader or metrics: an independent check of them.

Batch norm and a 1x1 convolution on the last layer's patch tokens; AdamW, poly decay, no augmentation. The tokens are
those of transformers' own model on images of 476x364 pixels (26x34 patches of 14), or of MaskStream's DINOv2 on
544x416 (the same grid, 16 pixels per token) with each way of reaching that grid (backbone.patch_resize).

Every fit leaves a line in RESULTS/runs/linear_probe.jsonl, and is not repeated.

example: python -m benchmarks.linear_probe --data ../shared/data/camvid --vit ../shared/weights/dinov2-vits14
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm
from transformers import Dinov2Model

from benchmarks.real_backbone import lines_of, over_seeds
from benchmarks.results import Result, benchmark_parser, commit
from shards.files.strict_json import to_json
from trainer.model_config import IMAGENET_MEAN, IMAGENET_STD, BackboneConfig
from trainer.models.backbones.sources import build_backbone

CLASSES, VOID = 11, 11
GRID = (26, 34)
SIZE = (180, 240)  # of the logits in training
STEPS, BATCH, LR = 1500, 8, 1e-3
TOKENS = {"transformers": 14, "MaskStream, patch_resize image": 16, "MaskStream, patch_resize weights": 16}
Features = Callable[[Tensor], Tensor]


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="CamVid folder with train/, trainannot/, val/, …")
    parser.add_argument("--vit", required=True, help="DINOv2 as a Hugging Face directory")
    parser.add_argument("--tokens", nargs="*", default=list(TOKENS), choices=TOKENS, help="which to fit (default: all)")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--limit", type=int, help="use only the first images of each split (for a trial)")
    arguments = parser.parse_args()
    result = Result("linear_probe", arguments.results)
    finished = arguments.results / "runs" / "linear_probe.jsonl"
    for name in arguments.tokens:
        left = [seed for seed in arguments.seeds if [name, seed] not in [line["fit"] for line in lines_of(finished)]]
        if left:
            stride, features = extractor(name, arguments.vit)
            train, val = (load(arguments.data, split, stride, features, arguments.limit) for split in ("train", "val"))
            for seed in left:
                line = {"fit": [name, seed], "mIoU": miou(fit(*train, seed), *val), "commit": commit()}
                finished.parent.mkdir(parents=True, exist_ok=True)
                with finished.open("a") as file:
                    file.write(to_json(line) + "\n")
    report(result, lines_of(finished))
    result.save()


def report(result: Result, finished: list[dict[str, Any]]) -> None:
    """A row for each kind of tokens, over the seeds that are there."""
    table = result.table(f"Linear probe on CamVid val, {STEPS} steps of {BATCH}", "tokens from", "input", "val mIoU",
                         "seeds")
    for name, stride in TOKENS.items():
        scores = sorted(line["mIoU"] for line in finished if line["fit"][0] == name)
        if scores:
            table.row(name, f"{GRID[1] * stride}x{GRID[0] * stride}", over_seeds(scores), len(scores))


def extractor(name: str, vit: str) -> tuple[int, Features]:
    """(pixels per token, normalised images [B, 3, H, W] -> patch maps [B, D, h, w]) of a kind of tokens."""
    if name == "transformers":
        theirs = Dinov2Model.from_pretrained(vit, dtype=torch.float32).eval()
        return TOKENS[name], lambda x: theirs(x).last_hidden_state[:, 1:].transpose(1, 2).unflatten(2, GRID)
    ours = build_backbone(BackboneConfig(source=vit, layers="LAST", patch_resize=name.rpartition(" ")[2]))
    return TOKENS[name], lambda x: ours(x).patch_maps[0]


@torch.inference_mode()
def load(root: Path, split: str, stride: int, features: Features, limit: int | None) -> tuple[Tensor, Tensor]:
    """Patch maps float16 [N, D, *GRID] and labels uint8 [N, H, W] of a split."""
    maps, labels = [], []
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    for path in tqdm(sorted((root / split).iterdir())[:limit], desc=split, disable=None):
        image = Image.open(path).convert("RGB").resize((GRID[1] * stride, GRID[0] * stride), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
        maps.append(features(((pixels - mean) / std)[None])[0].half())
        labels.append(torch.from_numpy(np.array(Image.open(root / f"{split}annot" / f"{path.stem}.png"))))
    return torch.stack(maps), torch.stack(labels)


def fit(maps: Tensor, labels: Tensor, seed: int) -> nn.Module:
    """Batch norm and 1x1 convolution, trained on cached features."""
    generator = torch.Generator().manual_seed(seed)
    head = nn.Sequential(nn.BatchNorm2d(maps.shape[1]), nn.Conv2d(maps.shape[1], CLASSES, 1))
    nn.init.normal_(head[1].weight, std=0.01, generator=generator)
    optimizer = torch.optim.AdamW(head.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, STEPS, power=0.9)
    small = F.interpolate(labels[:, None], SIZE, mode="nearest")[:, 0].long()
    for _ in tqdm(range(STEPS), desc="fit", disable=None):
        chosen = torch.randint(len(maps), (BATCH,), generator=generator)
        logits = F.interpolate(head(maps[chosen].float()), SIZE, mode="bilinear", align_corners=False)
        loss = F.cross_entropy(logits, small[chosen], ignore_index=VOID)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return head.eval()


@torch.inference_mode()
def miou(head: nn.Module, maps: Tensor, labels: Tensor) -> float:
    """Mean IoU over the classes, at the labels' own size."""
    counts = torch.zeros(CLASSES, CLASSES, dtype=torch.int64)
    for patch_map, label in zip(maps, labels, strict=True):
        logits = F.interpolate(head(patch_map[None].float()), label.shape, mode="bilinear", align_corners=False)
        known = label != VOID
        pairs = label[known].long() * CLASSES + logits.argmax(1)[0][known]
        counts += torch.bincount(pairs, minlength=CLASSES**2).view(CLASSES, CLASSES)
    return float((counts.diag() / (counts.sum(0) + counts.sum(1) - counts.diag())).mean())


if __name__ == "__main__":
    main()
