"""A torch.export program from pixels to class scores, which runs with torch alone."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export
from torch.fx import GraphModule

from trainer.data.transforms import normalize
from trainer.exporting.files import ExportError, written
from trainer.models import Segmenter
from trainer.pretrained import Pretrained

MAX_SIDE = 16_384  # pixels
_TRACED = (2, 3, 96, 160)  # two images, not square: torch.export would treat a size of 1 as a constant
_CHECKED = (1, 3, 128, 64)


def write_program(pretrained: Pretrained, folder: Path) -> list[Path]:
    """program.pt2, compared with the model on an image of another size before it is written. ExportError on mismatch.

    Loading it needs only torch: `torch.export.load(path).module()(images)`.
    """
    program = inference_program(pretrained)
    images = torch.randint(0, 256, _CHECKED, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    with torch.no_grad():
        actual, expected = program.module()(images), InferenceGraph(pretrained)(images)
    difference = (actual - expected).abs().max().item()
    if not difference <= 1e-4 * max(1.0, expected.abs().max().item()):
        raise ExportError(f"scores of the exported program differ from the model's by {difference}")

    def write(path: Path) -> None:
        with path.open("wb") as file:  # not a path: torch would require the suffix .pt2
            torch.export.save(program, file)

    return [written(folder / "program.pt2", write)]


class InferenceGraph(nn.Module):
    """The network from pixels to scores as a single module."""

    def __init__(self, pretrained: Pretrained) -> None:
        super().__init__()
        self.model: Segmenter = pretrained.model
        self.mean = list(pretrained.config.backbone.image_mean)
        self.std = list(pretrained.config.backbone.image_std)

    def forward(self, images: Tensor) -> Tensor:
        """RGB uint8 [B, 3, H, W] -> scores per class float32 [B, C, H, W]; argmax over C gives class ids."""
        outputs = self.model(self.normalized(images))
        return self.model.semantic_logits(outputs, (images.shape[2], images.shape[3]))

    def normalized(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> what the network takes, float32 [B, 3, H, W]."""
        return normalize(images, self.mean, self.std)


def inference_program(pretrained: Pretrained) -> ExportedProgram:
    """`InferenceGraph`, traced for any batch size, and for any H and W that are multiples (at least 2) of the model's
    size divisor."""
    divisor = pretrained.config.decoder_head.size_divisor
    rows, columns = (Dim(name, min=2, max=MAX_SIDE // divisor) for name in ("rows", "columns"))
    sizes = {0: Dim("batch", min=1, max=1024), 2: divisor * rows, 3: divisor * columns}
    with torch.no_grad():
        program = export(InferenceGraph(pretrained).eval(), (torch.zeros(_TRACED, dtype=torch.uint8),),
                         dynamic_shapes={"images": sizes})
    for module in program.graph_module.modules():
        if isinstance(module, GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)  # it contains local file paths
    return program
