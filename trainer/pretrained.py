"""Load a trained model with everything needed to use it: network, settings, classes.

    from trainer.pretrained import load_pretrained
    model = load_pretrained("exported")            # a directory from trainer/export.py, or a MaskStream checkpoint
    prediction = model.predict("photo.jpg")        # or uint8 [H, W, 3]; a picture in a notebook
    prediction.label_map, prediction.areas()       # class ids [H, W]; classes with their shares
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shards.cli.config_file import config_to_dict, override_config
from shards.cli.settings import without_places
from shards.errors import ConfigError
from shards.files.plain_file import LARGEST_PICTURE, read_plain
from shards.manifest import ClassInfo, class_table, classes_from_table
from shards.sample import decode_upright
from trainer.build import build_model
from trainer.config import EvalConfig, LoadConfig, RunConfig, run_config_from_dict
from trainer.distributed import pick_device
from trainer.evaluation.prediction import Prediction
from trainer.evaluation.predictor import Extra, Predictor
from trainer.model_config import BackboneConfig, RandomBackboneConfig
from trainer.models import Segmenter
from trainer.models.backbones.base import state_sha256
from trainer.models.declared import declared_backbone
from trainer.models.deform_attn import sample_by_triton
from trainer.models.integrity import sealed_config
from trainer.models.weights import EXPORT_MODEL_TYPE, WeightsFile
from trainer.precision import store_for_autocast
from trainer.run.checkpoint import Checkpoint, open_checkpoint

EXPORT_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A network in eval mode, the settings it was trained with (and is evaluated by), and its classes."""

    model: Segmenter
    config: RunConfig
    classes: list[ClassInfo]
    step: int | None = None  # optimiser steps of training, if the source records them
    weights: str | None = None  # "averaged" or "raw", of a checkpoint that has both

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def predict(self, image: NDArray[np.uint8] | str | Path, extra: Extra | None = None) -> Prediction:
        """Predict an RGB image uint8 [H, W, 3] or a file, as configured by `eval.*`; `extra` adds the confidence or all
        probabilities.

        A file is first rotated by its EXIF orientation. Raises CorruptShardError when it is unreadable, and ValueError
        for an array of another dtype or shape.
        """
        return next(self.predict_all([image], extra))

    def predict_all(self, images: Iterable[NDArray[np.uint8] | str | Path],
                    extra: Extra | None = None) -> Iterator[Prediction]:
        """As `predict`, for many images of any sizes, `eval.window_batch` at a time."""
        predict = Predictor(self.model, self.config, len(self.classes), self.device)
        dtype = np.uint8 if len(self.classes) <= 256 else np.uint16
        pixels = map(_pixels, images)
        while some := list(islice(pixels, self.config.eval.window_batch)):
            tensors = [torch.from_numpy(image.transpose(2, 0, 1).copy()) for image in some]
            for image, found in zip(some, predict.segment(tensors, extra), strict=True):
                confidence, probabilities = (None if tensor is None else tensor.cpu().numpy()
                                             for tensor in (found.confidence, found.probabilities))
                yield Prediction(image=image, label_map=found.label_map.cpu().numpy().astype(dtype),
                                 classes=self.classes, confidence=confidence, probabilities=probabilities)


def model_identity(pretrained: Pretrained) -> dict[str, Any]:
    """What determines a model's predictions, up to rounding: hashes of its weights, and settings."""
    config, model = pretrained.config, pretrained.model
    settings = replace(config.eval, **{name: getattr(EvalConfig(), name) for name in (
        "panels", "max_images", "window_batch", "memory_gb", "weights")})
    return {"head": state_sha256(model.head_state_dict()), "backbone": model.backbone.weights_sha256(),
            "eval": config_to_dict(settings), "precision": config.train.precision,
            "mean": list(config.backbone.image_mean), "std": list(config.backbone.image_std)}


def _pixels(image: NDArray[np.uint8] | str | Path) -> NDArray[np.uint8]:
    if isinstance(image, str | Path):
        image = decode_upright(read_plain(image, LARGEST_PICTURE), str(image))
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image is {image.dtype} {image.shape}, legal: uint8 [H, W, 3]")
    return image


def load_pretrained(
    source: str | Path | Checkpoint | WeightsFile,
    *,
    overrides: Sequence[str] = (),
    backbone_source: str | None = None,
    device: torch.device | None = None,
    for_export: bool = False,
) -> Pretrained:
    """Open an export (a directory or hub id) or a MaskStream checkpoint.

    `overrides` are key=value settings; of a checkpoint with averaged and raw weights, `eval.weights` says which are
    used, by default the averaged ones. `backbone_source` is the current location of the frozen ViT of a checkpoint, or
    of an export that only names its ViT; `device` defaults to the configured one. A frozen ViT is stored for autocast
    (see `store_for_autocast`), unless the model is `for_export`. Raises ConfigError when something is missing or does
    not fit.
    """
    opened = open_checkpoint(source) if isinstance(source, str | Path) else source
    if isinstance(opened, Checkpoint):
        config = override_config(opened.run_config, overrides)
        model = restore_model(opened, backbone_source or config.backbone.source, config.eval.weights)
        return Pretrained(model=_placed(model, config, device or pick_device(config.device), for_export),
                          config=config, classes=opened.class_infos, step=opened.step,
                          weights=None if opened.averaged is None else config.eval.weights)
    if not opened.is_self_contained:
        raise ConfigError(f"{opened.path} contains only weights, without settings and classes; convert it with "
                          "trainer/export.py --config ... --classes ..., then load the result")
    config, classes = _exported_settings(opened)
    config = override_config(config, overrides)
    if backbone_source is not None and not opened.vit:
        config = replace(config, backbone=replace(config.backbone, source=backbone_source))
    return from_external_weights(opened, config, classes, device or pick_device(config.device), for_export=for_export)


def from_external_weights(weights: WeightsFile, config: RunConfig, classes: Sequence[ClassInfo],
                          device: torch.device, *, for_export: bool = False) -> Pretrained:
    """A model from another program's weights, with the settings and classes given; `for_export` as in
    `load_pretrained`. Raises ConfigError."""
    model = model_from_weights(weights, config, len(classes))
    return Pretrained(model=_placed(model, config, device, for_export), config=config, classes=list(classes))


def restore_model(checkpoint: Checkpoint, backbone_source: str | None, weights: str = "averaged") -> Segmenter:
    """The trained network of a checkpoint, in eval mode, float32 on the CPU. `backbone_source` is the ViT's current
    location; `weights` as `eval.weights`.

    Raises ConfigError when the ViT there is not the one that the head was trained on.
    """
    config = checkpoint.run_config
    if backbone_source is not None:
        backbone = replace(config.backbone, source=backbone_source, random=RandomBackboneConfig())
        config = replace(config, backbone=backbone)
    model = build_model(config, len(checkpoint.classes))
    sha256 = model.backbone.weights_sha256()
    if sha256 != checkpoint.backbone_sha256 and not config.backbone.trainable:  # a trained ViT is in the checkpoint
        raise ConfigError(
            f"the backbone's weights have sha256 {sha256[:16]}, but the head was trained on "
            f"{checkpoint.backbone_sha256[:16]}; set backbone.source to the ViT used in training "
            "(random backbones also depend on the torch version)"
        )
    model.load_trainable_state_dict(checkpoint.weights(weights))
    return model.eval()


def model_from_weights(weights: WeightsFile, config: RunConfig, num_classes: int) -> Segmenter:
    """The configured network with weights of another program, in eval mode, float32 on the CPU.

    Raises ConfigError when they do not fit; `load.ignore` is not applied: every weight must load.
    """
    model = build_model(config, num_classes)
    model.load_weights(weights, base_sha256=config.load.base_sha256)
    return model.eval()


def _placed(model: Segmenter, config: RunConfig, device: torch.device, for_export: bool) -> Segmenter:
    """On the device; a ViT stored for autocast is rounded before it takes room there."""
    if not for_export:
        store_for_autocast(model, config, device)
        if config.train.triton and device.type == "cuda":  # elsewhere the model works without
            sample_by_triton(model, device)
    return model.to(device)


def export_config(pretrained: Pretrained, backbone_source: str | None = None) -> dict[str, Any]:
    """The content of an export's config.json, without any path of this machine.

    `backbone_source`: hub id of the ViT, for an export that does not contain it.
    """
    config = replace(pretrained.config, load=LoadConfig(), device="auto")  # load.ignore goes with load.weights
    config = without_places(replace(config, backbone=replace(config.backbone, random=RandomBackboneConfig())))
    named = {"source": backbone_source, "sha256": pretrained.model.backbone.weights_sha256()}
    return sealed_config({
        **({} if backbone_source is None else {"backbone": named}),
        "model_type": EXPORT_MODEL_TYPE, "format": EXPORT_FORMAT,
        "layer_norm_eps": pretrained.model.backbone.layer_norm_eps,
        "num_attention_heads": pretrained.model.backbone.num_heads,
        "classes": class_table(pretrained.classes),
        "settings": config_to_dict(config),
    })  # fmt: skip


def _exported_settings(weights: WeightsFile) -> tuple[RunConfig, list[ClassInfo]]:
    """Inverse of `export_config`, with the ViT from the same directory, or the one that it names. Raises ConfigError
    for malformed content."""
    content = weights.config
    if content.get("format") != EXPORT_FORMAT:
        raise ConfigError(f"{weights.path}/config.json: format is {content.get('format')!r}, legal: {EXPORT_FORMAT}; "
                          "use the version of MaskStream that wrote it")
    try:
        classes = classes_from_table(content["classes"])
        settings = run_config_from_dict(content["settings"])
    except ConfigError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{weights.path}/config.json is incomplete: {error!r}") from error
    source, _ = declared_backbone(content, weights.path / "config.json") or (str(weights.path), None)
    backbone = BackboneConfig(**{**vars(settings.backbone), "source": source})
    return replace(settings, backbone=backbone), classes
