"""The formats written by `trainer/export.py`. Every file is written atomically."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export
from torch.fx import GraphModule

from shards.errors import MaskStreamError
from shards.files.atomic import atomic_path, write_atomically
from shards.files.strict_json import to_json
from trainer.data.transforms import normalize
from trainer.models import Segmenter
from trainer.models.integrity import SealedFile, safetensors_metadata, seal_safetensors, write_hash_beside
from trainer.pretrained import Pretrained, export_config

MAX_SIDE = 16_384  # pixels
_TRACED = (2, 3, 96, 160)  # two images, not square: torch.export would treat a size of 1 as a constant
_CHECKED = (1, 3, 128, 64)


class ExportError(MaskStreamError):
    """The exported model's outputs differ from the model's."""


def write_directory(pretrained: Pretrained, folder: Path) -> list[Path]:
    """model.safetensors (the whole model, keys as in Meta's layout), then config.json."""
    state = _plain(pretrained.model.meta_state_dict())

    def write(path: Path) -> None:
        save_file(state, path, safetensors_metadata(metadata.version("maskstream")))
        seal_safetensors(path)

    weights = _written(folder / "model.safetensors", write)
    config = folder / "config.json"
    write_atomically(config, to_json(export_config(pretrained), indent=1).encode())
    return [weights, config]


def write_meta_files(pretrained: Pretrained, folder: Path) -> list[Path]:
    """meta/head.pth, a bare state dict of adapter and head like Meta's release; meta/backbone.pth, like Meta's ViTs.

    Raises ConfigError when Meta's layout cannot describe the ViT.
    """
    pretrained.model.backbone.check_meta_file()
    head = _plain(pretrained.model.head_state_dict())
    vit = _plain(pretrained.model.backbone.meta_state_dict())
    return [_written(folder / "meta" / "head.pth", lambda path: _save_sealed(head, path)),
            _written(folder / "meta" / "backbone.pth", lambda path: _save_sealed(vit, path))]


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

    return [_written(folder / "program.pt2", write)]


class InferenceGraph(nn.Module):
    """The network from pixels to scores as a single module."""

    def __init__(self, pretrained: Pretrained) -> None:
        super().__init__()
        self.model: Segmenter = pretrained.model
        self.mean = list(pretrained.config.backbone.image_mean)
        self.std = list(pretrained.config.backbone.image_std)

    def forward(self, images: Tensor) -> Tensor:
        """RGB uint8 [B, 3, H, W] -> scores per class float32 [B, C, H, W]; argmax over C gives class ids."""
        outputs = self.model(normalize(images, self.mean, self.std))
        return self.model.semantic_logits(outputs, (images.shape[2], images.shape[3]))


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


def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.detach().contiguous() for key, tensor in state.items()}


def _save_sealed(state: dict[str, Tensor], path: Path) -> None:
    with path.open("wb") as file:
        sealed = SealedFile(file)
        torch.save(state, sealed)  # type: ignore[arg-type]  # only written to
        sealed.seal()


def _written(path: Path, write: Callable[[Path], object]) -> Path:
    """Write a file atomically, with its sha256 next to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        write(temporary)
    write_hash_beside(path)
    return path
