"""How long does a trained model take for an image, by head, image size and format, on the CPU?

From uint8 pixels to scores of 150 classes at the size of the image, in one forward pass, with a random ViT-S and heads
of the recipes' sizes. Latency is for one image, throughput for a batch. eager is PyTorch as it is; compiled is
`torch.compile` of the whole graph for one shape; program is the file of `torch.export`, and ONNX is `model.onnx` in
onnxruntime. Repetitions of all formats are interleaved in one process; ratios are medians over repetitions.
It is an error if the scores of a format differ from eager's by more than a thousandth of the largest.

example: python -m benchmarks.latency
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from benchmarks.evaluation import CLASSES, SIZES
from benchmarks.results import Result, benchmark_parser, spread
from shards.manifest import ClassInfo
from shards.picture import default_colors
from trainer.build import build_model
from trainer.config import load_run_config
from trainer.exporting.onnx_model import write_onnx
from trainer.exporting.program import InferenceGraph, inference_program
from trainer.pretrained import Pretrained

WIDTHS = {"m2f": ("hidden_dim=256", "nheads=8", "enc_ffn=1024", "dec_ffn=1024"), "linear": (),
          "eomt": ("num_blocks=3",), "pmt": ()}
Run = Callable[[Tensor], Tensor]


def model_of(head: str) -> Pretrained:
    """An untrained model: what it takes does not depend on its weights."""
    vit = [f"backbone.random.{name}={value}" for name, value in SIZES.items()]
    config = load_run_config(None, [f"decoder_head.type={head}", "device=cpu", *vit,
                                    *(f"decoder_head.{width}" for width in WIDTHS[head])])
    classes = [ClassInfo(name=f"class {number}", color=color) for number, color in enumerate(default_colors(CLASSES))]
    return Pretrained(model=build_model(config, CLASSES).eval(), config=config, classes=classes)


def formats_of(pretrained: Pretrained, folder: Path) -> dict[str, Run]:
    """Each format as a function from images to scores."""
    graph = InferenceGraph(pretrained).eval()
    [path] = [path for path in write_onnx(pretrained, folder) if path.suffix == ".onnx"]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    found: dict[str, Run] = {"eager": graph, "compiled": torch.compile(graph, dynamic=False)}
    found["program"] = inference_program(pretrained).module()
    found["ONNX"] = lambda images: torch.from_numpy(session.run(["scores"], {"images": images.numpy()})[0])
    return found


def measure(table: Any, head: str, size: int, runs: dict[str, Run], batch: int, repetitions: int) -> None:
    """The rows of one head and size."""
    generator = torch.Generator().manual_seed(size)
    batches = [torch.randint(0, 256, (count, 3, size, size), generator=generator).to(torch.uint8)
               for count in (1, batch)]
    expected = [runs["eager"](images) for images in batches]
    for name, run in runs.items():  # also warms up
        for images, scores in zip(batches, expected, strict=True):
            assert (run(images) - scores).abs().max() <= 1e-3 * scores.abs().max(), name
    seconds: dict[str, list[list[float]]] = {name: [[], []] for name in runs}
    for _ in range(repetitions):
        for name, run in runs.items():
            for taken, images in zip(seconds[name], batches, strict=True):
                start = time.perf_counter()
                run(images)
                taken.append(time.perf_counter() - start)
    eager = np.array(seconds["eager"])
    for name, taken in seconds.items():
        one, many = np.array(taken)
        table.row(head, size, name, spread(one, 1000), spread(eager[0] / one), spread(batch / many),
                  spread(eager[1] / many))


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--heads", nargs="+", default=list(WIDTHS), help="heads (default: all)")
    parser.add_argument("--sizes", nargs="+", type=int, default=[256, 512], help="image sides (default: 256 512)")
    parser.add_argument("--batch", type=int, default=4, help="images per batch for throughput (default: 4)")
    parser.add_argument("--repetitions", type=int, default=5, help="interleaved repetitions (default: 5)")
    parser.add_argument("--compiled-sizes", nargs="*", type=int, help="sizes at which compiled models are measured "
                        "too, which takes minutes for each (default: all)")
    arguments = parser.parse_args()
    result = Result("latency", arguments.results)
    table = result.table(f"From pixels to scores of {CLASSES} classes; speeds relative to eager", "head", "side",
                         "format", "latency, ms", "speed", f"images/s, batch of {arguments.batch}", "speed")
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        for head in arguments.heads:
            runs = formats_of(model_of(head), Path(folder, head))
            for size in arguments.sizes:
                is_compiled = arguments.compiled_sizes is None or size in arguments.compiled_sizes
                chosen = {name: run for name, run in runs.items() if name != "compiled" or is_compiled}
                measure(table, head, size, chosen, arguments.batch, arguments.repetitions)
    result.note(f"{torch.get_num_threads()} threads.")
    result.save()


if __name__ == "__main__":
    main()
