"""An ONNX file from pixels to class scores, for onnxruntime, TensorRT and whatever else reads ONNX.

    input    images  uint8 [batch, 3, height, width], RGB, of any batch size, height and width
    output   scores  float32 [batch, classes, height, width]; argmax over the classes gives class ids

Normalisation and padding are inside: images are padded on the right and at the bottom with the mean colour, to
multiples of the model's size divisor and at least twice that, as `eval.mode=whole` pads them; scores are cut to the
image. The graph consists of standard operators; deformable attention is made of gathers.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.export import Dim, ExportedProgram, export
from tqdm import tqdm

from shards.errors import ConfigError
from shards.files.strict_json import to_json
from shards.manifest import class_table
from shards.rle import ignore_value
from trainer.exporting.files import ExportError, written
from trainer.exporting.program import MAX_SIDE, InferenceGraph
from trainer.models.deform_attn import sampling_by_gathers
from trainer.pretrained import Pretrained

if TYPE_CHECKING:
    import onnx_ir

ONNX_NAME = "model.onnx"
LARGEST_FILE = 1_900_000_000  # bytes of weights; beyond, they are in a file of their own: protobuf ends at 2 GiB
_OPSET = 18  # the first with antialiased Resize, which DINOv2 with registers needs
_LIBRARIES = ("onnx", "onnxscript", "onnxruntime")
_TRACED = (2, 3, 90, 150)
_CHECKED = ((1, 3, 64, 96), (2, 3, 101, 70), (1, 3, 20, 205))  # fitting, to be padded, and thinner than two cells
_TRIES = 3
_TOLERANCE = 1e-4  # of the largest score, at least of 1
_UNWANTED = {"GridSample", "SequenceAt", "SplitToSequence", "Loop", "If", "Scan"}  # TensorRT fails with them


def check_installed() -> None:
    """Raise ConfigError unless the libraries of the extra `onnx` are installed."""
    missing = [name for name in _LIBRARIES if find_spec(name) is None]
    if missing:
        raise ConfigError(f"--formats onnx needs {', '.join(missing)}: run pip install 'maskstream[onnx]', or leave "
                          "out onnx")


def write_onnx(pretrained: Pretrained, folder: Path, *, largest_file: int = LARGEST_FILE) -> list[Path]:
    """model.onnx, and model.onnx.data with the weights if they have more than `largest_file` bytes.

    Before they count as written, onnxruntime's scores are compared with the model's, at three sizes; the largest
    difference is printed. Raises ExportError on a mismatch, ConfigError when a library is missing.
    """
    check_installed()
    import onnx
    import onnx_ir

    model = onnx_model(pretrained)
    weights = sum(tensor.nbytes for tensor in _weights(model))
    data = f"{ONNX_NAME}.data" if weights > largest_file else None
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".onnx-", dir=folder) as place:
        staged = Path(place) / ONNX_NAME
        onnx_ir.save(model, staged, external_data=data)
        onnx.checker.check_model(str(staged), full_check=True)
        error, largest = compare_with_model(staged, pretrained)
        tqdm.write(f"{folder / ONNX_NAME}: scores in onnxruntime differ from the model's by at most {error:.1e} "
                   f"(largest score {largest:.2f}; sizes {', '.join('x'.join(map(str, size)) for size in _CHECKED)})")
        return [written(folder / name, staged.with_name(name).replace) for name in (data, ONNX_NAME) if name]


class AnySizeGraph(InferenceGraph):
    """`InferenceGraph` for images of any size, which it pads as described above."""

    def __init__(self, pretrained: Pretrained) -> None:
        super().__init__(pretrained)
        self.divisor = pretrained.config.decoder_head.size_divisor

    def forward(self, images: Tensor) -> Tensor:
        """RGB uint8 [B, 3, H, W] -> scores per class float32 [B, C, H, W]."""
        height, width = images.shape[2:]
        rows, columns = (torch.sym_max(2, (side + self.divisor - 1) // self.divisor) * self.divisor
                         for side in (height, width))
        padded = F.pad(self.normalized(images), (0, columns - width, 0, rows - height))
        return self.model.semantic_logits(self.model(padded), (rows, columns))[:, :, :height, :width]


def onnx_model(pretrained: Pretrained) -> onnx_ir.Model:
    """The simplified graph with its metadata. Raises ExportError if it holds an operator that not every runtime has."""
    import onnx_ir
    import onnxscript.optimizer
    from onnx_ir.passes import common

    with _quiet():
        program = torch.onnx.export(
            _any_size_program(pretrained), dynamo=True, opset_version=_OPSET, optimize=False, verbose=False,
            input_names=["images"], output_names=["scores"],
            dynamic_shapes={"images": {0: "batch", 2: "height", 3: "width"}})
        assert program is not None
        model: onnx_ir.Model = program.model
        # The optimiser's time grows with the square of the graph's size, and these two halve it in no time.
        onnxscript.optimizer.fold_constants(model)
        onnx_ir.passes.Sequential(common.CommonSubexpressionEliminationPass(), common.RemoveUnusedNodesPass())(model)
        onnxscript.optimizer.optimize(model)
        common.ClearMetadataAndDocStringPass()(model)  # of nodes; it contains local file paths
        for value in (*model.graph.inputs, *model.graph.initializers.values(), *model.graph.outputs):
            value.metadata_props.clear()
    found = {node.op_type for node in model.graph.all_nodes() if node.domain or node.op_type in _UNWANTED}
    if found:
        raise ExportError(f"the ONNX graph holds the operators {', '.join(sorted(found))}, legal: those of the "
                          f"standard domain except {', '.join(sorted(_UNWANTED))}; install the versions of "
                          "constraints.txt, or report this with those of torch and onnxscript")
    version = metadata.version("maskstream")
    model.producer_name, model.producer_version = "MaskStream", version
    model.metadata_props.update(_description(pretrained), maskstream=version)
    return model


def compare_with_model(path: Path, pretrained: Pretrained) -> tuple[float, float]:
    """Largest difference between onnxruntime's scores (on the CPU) and the model's, and the largest score.

    Raises ExportError if it is too large. Masked attention compares masks with a threshold, where rounding can decide,
    so another random image is tried; a wrong graph fails on all of them.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    graph, worst, largest = AnySizeGraph(pretrained).eval(), 0.0, 0.0
    for size in _CHECKED:
        for seed in range(_TRIES):
            images = torch.randint(0, 256, size, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
            with torch.no_grad():
                expected = graph(images)
            (scores,) = session.run(["scores"], {"images": images.numpy()})
            if scores.shape != expected.shape:
                raise ExportError(f"scores of {path.name} in onnxruntime have the shape {scores.shape} for images "
                                  f"{size}, expected: {tuple(expected.shape)}")
            difference, highest = ((torch.from_numpy(scores) - expected).abs().max().item(),
                                   expected.abs().max().item())
            if difference <= _TOLERANCE * max(1.0, highest):
                break
        else:
            raise ExportError(f"scores of {path.name} in onnxruntime differ from the model's by {difference:.1e} for "
                              f"images {size}, legal: at most {_TOLERANCE * max(1.0, highest):.1e}; nothing was "
                              "written. Install the versions of constraints.txt, or report this with your own")
        worst, largest = max(worst, difference), max(largest, highest)
    return worst, largest


def _any_size_program(pretrained: Pretrained) -> ExportedProgram:
    sizes = {0: Dim("batch", min=1, max=1024), 2: Dim("height", min=1, max=MAX_SIDE),
             3: Dim("width", min=1, max=MAX_SIDE)}
    graph = AnySizeGraph(pretrained).eval()
    with torch.no_grad(), sampling_by_gathers(graph):
        return export(graph, (torch.zeros(_TRACED, dtype=torch.uint8),), dynamic_shapes={"images": sizes},
                      prefer_deferred_runtime_asserts_over_guards=True)  # what rounding up sides implies is not proven


def _description(pretrained: Pretrained) -> dict[str, str]:
    """The file's metadata; all but the prose is JSON."""
    backbone, head = pretrained.config.backbone, pretrained.config.decoder_head
    return {
        "input": "RGB uint8 [batch, 3, height, width] of any size; normalisation and padding are inside the graph",
        "output": "scores float32 [batch, classes, height, width]; argmax over the classes gives class ids",
        "classes": to_json(class_table(pretrained.classes)),
        "ignore_index": to_json(ignore_value(len(pretrained.classes))),
        "image_mean": to_json(backbone.image_mean),
        "image_std": to_json(backbone.image_std),
        "size_divisor": to_json(head.size_divisor),
        "head": to_json(head.type),
    }


def _weights(model: onnx_ir.Model) -> list[Any]:
    values = (initializer.const_value for initializer in model.graph.initializers.values())
    return [value for value in values if value is not None]


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns about torchvision, which nothing here needs, and about its own internals."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
