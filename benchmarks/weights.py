"""Keys of the full models in Meta's layout, and the time and memory that building and loading one takes.

example: python -m benchmarks.weights --vit vitl16 --work-dir /tmp
Writes a ViT and a head (hidden 2048, as released) with random weights, as Meta's two files, and loads them in a
separate process. A ViT-L needs 4 GB of disk and 9 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import DINOv3ViTModel

from benchmarks.results import REPOSITORY, Result, benchmark_parser
from shards.files.strict_json import to_json
from trainer.build import build_model
from trainer.config import RunConfig, load_run_config
from trainer.model_config import AdapterConfig
from trainer.models import Segmenter
from trainer.models.adapter import DINOv3Adapter
from trainer.models.backbones.base import tapped_layers
from trainer.models.backbones.dinov3 import DINOv3Backbone
from trainer.models.backbones.dinov3_keys import RELEASED_VITS
from trainer.models.heads import Mask2FormerHead
from trainer.models.weights import read_weights

HIDDEN_DIM = 2048


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--vit", choices=RELEASED_VITS, default="vitl16", help="ViT to load (default: vitl16)")
    parser.add_argument("--work-dir", help="folder for temporary files (default: the system's)")
    parser.add_argument("--load", nargs=2, metavar=("VIT", "HEAD"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        load(*arguments.load)
        return
    result = Result(f"weights-{arguments.vit}", arguments.results)
    add_keys(result)
    with tempfile.TemporaryDirectory(dir=arguments.work_dir) as folder:
        vit, head = Path(folder) / "vit.pth", Path(folder) / "head.pth"
        write_random(meta_model(arguments.vit), vit, head)
        sizes = " and ".join(f"{path.stat().st_size / 1e9:.2f} GB" for path in (vit, head))
        measured = subprocess.run([sys.executable, "-m", "benchmarks.weights", "--load", vit, head], check=True,
                                  cwd=REPOSITORY, stdout=subprocess.PIPE, text=True).stdout
        table = result.table(f"Loading {arguments.vit} from files of {sizes}", "step", "seconds",
                             "high-water mark of memory, GB")
        for line in measured.splitlines():
            table.row(*json.loads(line))
    result.save()


def meta_model(kind: str) -> Segmenter:
    """A ViT with adapter and head of the released sizes, on the meta device: shapes without memory."""
    architecture = RELEASED_VITS[kind]
    with torch.device("meta"):
        vit = DINOv3ViTModel(architecture.config())
        adapter = DINOv3Adapter(DINOv3Backbone(vit, tapped_layers(architecture.blocks, "FOUR_EVEN_INTERVALS")),
                                AdapterConfig())
        head = Mask2FormerHead([architecture.dim] * 4, HIDDEN_DIM, 150, num_queries=100, nheads=16, enc_layers=6,
                               enc_ffn=4096, dec_layers=9, dec_ffn=4096)
        return Segmenter(adapter, head)


def add_keys(result: Result) -> None:
    """Number of keys and millions of parameters per part, for every published ViT."""
    table = result.table("The released models in Meta's layout", "ViT", "keys of the ViT", "of the adapter",
                         "of the head", "millions of parameters in the ViT", "in the adapter", "in the head")
    for kind in RELEASED_VITS:
        state = meta_model(kind).meta_state_dict()
        vit = {key: value for key, value in state.items() if key.startswith("segmentation_model.0.backbone.")}
        head = {key: value for key, value in state.items() if key.startswith("segmentation_model.1.")}
        adapter = {key: value for key, value in state.items() if key not in vit and key not in head}
        parts = (vit, adapter, head)
        sizes = (f"{sum(value.numel() for value in part.values()) / 1e6:.1f}" for part in parts)
        table.row(kind, *map(len, parts), *sizes)


def write_random(model: Segmenter, vit: Path, head: Path) -> None:
    """Write random weights in Meta's two layouts; the key third of the bias is zero, as released."""
    for path, state in ((vit, model.backbone.meta_state_dict()), (head, model.head_state_dict())):
        drawn = {key: torch.randn(value.shape) * 0.02 for key, value in state.items()}
        for key in drawn:
            if key.endswith("bias_mask"):
                drawn[key] = torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(len(drawn[key]) // 3)
            if key == "rope_embed.periods":
                drawn[key] = 100.0 ** (torch.arange(len(drawn[key])) / len(drawn[key]))
            if key.endswith("num_batches_tracked"):
                drawn[key] = torch.zeros((), dtype=torch.int64)
        torch.save(drawn, path)


def load(vit: str, head: str) -> None:
    """Build and load a model; print a JSON row with the seconds and peak memory after each step."""
    config: RunConfig = load_run_config(None, [f"backbone.source={vit}", f"decoder_head.hidden_dim={HIDDEN_DIM}"])
    report("import", None)
    started = time.perf_counter()
    model = build_model(config, 150)
    report("build the model with its ViT", started)
    started = time.perf_counter()
    model.load_weights(read_weights(head))
    report("load adapter and head", started)
    held = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    print(to_json(["(the model itself)", None, held / 1e9]))


def report(what: str, started: float | None) -> None:
    """Peak memory includes pages of mapped files (ru_maxrss would start at the parent process's peak)."""
    status = Path("/proc/self/status").read_text()
    peak = 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
    seconds = None if started is None else time.perf_counter() - started
    print(to_json([what, seconds, peak / 1e9]), flush=True)


if __name__ == "__main__":
    main()
