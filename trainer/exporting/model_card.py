"""The model card, README.md of an upload: what a reader of the hub's page needs to use and judge the model.

Everything in it comes from the run: settings and classes from the checkpoint, numbers of images from the shard set if
it is in a folder, metrics, with the settings by which they were measured, from the run's evaluation/metrics.json if
they are of these weights. The licence is the user's to choose.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from shards.errors import ShardError
from shards.manifest import ClassInfo, load_manifest
from shards.shown_text import shown
from trainer.config import EvalConfig
from trainer.data.sources import configured_shares
from trainer.data_config import DataConfig
from trainer.evaluation.record import Measured
from trainer.pretrained import Pretrained

CARD_NAME = "README.md"
LICENSES = "https://huggingface.co/docs/hub/repositories-licenses"
_HUB_NAMES = {"mIoU": "mean_iou", "aAcc": "accuracy", "mAcc": "mean_accuracy"}  # the hub's types of PUBLISHED


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a card says besides the model's own settings."""

    repo_id: str
    formats: Sequence[str]
    contains_backbone: bool
    dataset: str | None = None  # name of the training data
    dataset_id: str | None = None  # on the hub
    images: Mapping[str, int] = field(default_factory=dict)  # of each split, if known
    measured: Measured | None = None
    license: str | None = None
    backbone_id: str | None = None  # hub id, if known


def model_card(pretrained: Pretrained, facts: CardFacts) -> str:
    """The card's text: YAML for the hub's search and tables, then Markdown."""
    card = ModelCard(f"---\n{_card_data(pretrained, facts).to_yaml()}\n---\n\n" + "\n".join(_body(pretrained, facts)))
    return str(card)


def found_data(pretrained: Pretrained) -> tuple[str | None, dict[str, int]]:
    """Name of the shard set that the run was trained on, and images per split; what is unknown is left out."""
    root = pretrained.config.data.root
    if root is None:
        return None, {}
    name = _name_of(root)
    if not Path(root).is_dir():
        return name, {}
    try:
        manifest = load_manifest(root)
    except ShardError:
        return name, {}
    if list(manifest.classes) != pretrained.classes:  # another set is there now
        return name, {}
    images = {split: info.images for split, info in manifest.splits.items()}
    return name if manifest.dataset == "folder" else manifest.dataset, images


def _name_of(root: str) -> str | None:
    """The last part of a path or URL: no other folders, no credentials."""
    return re.split(r"[?#]", root)[0].rstrip("/").rpartition("/")[2] or None


def _trained_on(data: DataConfig) -> dict[str, str]:
    """The row for `data.sources`, if the run had any."""
    parts = [f"{_escaped(_name_of(source.root or '') or 'unknown')} ({share:.2%})"
             for source, share in configured_shares(data)]
    return {"trained on": ", ".join(parts)} if parts else {}


def _card_data(pretrained: Pretrained, facts: CardFacts) -> ModelCardData:
    found = facts.measured
    results = [] if found is None else [
        EvalResult(task_type="image-segmentation", dataset_type=facts.dataset_id or "unknown",
                   dataset_name=shown(facts.dataset or "validation data"), dataset_split=shown(found.split),
                   metric_type=_HUB_NAMES[name], metric_name=name, metric_value=round(value, 4))
        for name, value in found.metrics.items()]
    return ModelCardData(
        license=facts.license,
        library_name="maskstream",
        pipeline_tag="image-segmentation",
        tags=["semantic-segmentation", pretrained.config.decoder_head.type, pretrained.model.backbone.family.lower()],
        datasets=[facts.dataset_id] if facts.dataset_id else None,
        metrics=["mean_iou"] if results else None,
        base_model=facts.backbone_id,
        model_name=facts.repo_id.rpartition("/")[2] if results else None,
        eval_results=results or None,
    )


def _body(pretrained: Pretrained, facts: CardFacts) -> Iterator[str]:
    config, classes = pretrained.config, pretrained.classes
    yield f"# {facts.repo_id.rpartition('/')[2]}\n"
    yield (f"Semantic segmentation into {len(classes)} classes: a head of type `{config.decoder_head.type}` on a "
           f"{pretrained.model.backbone.family} ViT, trained with MaskStream {metadata.version('maskstream')}.\n")
    yield "## Use\n"
    yield "```python\nfrom trainer.pretrained import load_pretrained  # of MaskStream"
    yield f'model = load_pretrained("{facts.repo_id}")'
    yield 'prediction = model.predict("photo.jpg")  # .label_map: class ids [H, W]; .areas(): the classes found\n```\n'
    if "onnx" in facts.formats:
        yield "`model.onnx` runs in onnxruntime, without torch; its metadata say what it takes and returns.\n"
    yield f"## Classes\n\n<details><summary>{len(classes)} classes</summary>\n"
    yield "\n".join(f"{number}. {_plain(info)}" for number, info in enumerate(classes)) + "\n\n</details>\n"
    yield "## Training\n\n| | |\n|---|---|"
    yield from (f"| {name} | {value} |" for name, value in _recipe(pretrained, facts).items())
    yield "\n`config.json` holds all settings.\n"
    yield "## Evaluation\n"
    if found := facts.measured:
        yield (f"{found.images} images of the split {_escaped(found.split)}, {_protocol(found.settings)}.\n\n"
               "| metric | value |\n|---|---|")
        yield from (f"| {name} | {value:.4f} |" for name, value in found.metrics.items())
    else:
        yield "There was no evaluation by `trainer/eval.py` of these weights when this card was written."
    yield "\n## Licence\n"
    yield from _licence(pretrained, facts)


def _crops(data: DataConfig) -> str:
    if data.crop_size is None:
        return "as stored"
    drawn = "" if data.online.scaled_side is None else ", scaled and drawn anew in each epoch"
    return f"{data.crop_size} pixels{drawn}"


def _recipe(pretrained: Pretrained, facts: CardFacts) -> dict[str, str]:
    config, backbone = pretrained.config, pretrained.model.backbone
    known = ", ".join(f"{count} images in {split}" for split, count in facts.images.items())
    steps = f"{config.train.total_steps}" if pretrained.step is None else (
        f"{pretrained.step} of {config.train.total_steps}")
    head = config.decoder_head
    return {
        "data": f"{_escaped(facts.dataset or 'unknown')}, {len(pretrained.classes)} classes" + (
            f", {known}" if known else ""),
        **_trained_on(config.data),
        "head": f"{head.type}" + ("" if head.type == "linear" else f", {head.num_queries} queries"),
        "ViT": f"{backbone.family}, width {backbone.embed_dim}, {backbone.depth} blocks, "
               f"{'trained' if config.backbone.trainable else 'frozen'}" + (
                   f", [{facts.backbone_id}](https://huggingface.co/{facts.backbone_id})" if facts.backbone_id else ""),
        "parameters": f"{sum(parameter.numel() for parameter in pretrained.model.parameters()) / 1e6:.1f} million",
        "steps": steps,
        "images per step": f"{config.train.global_batch_size}",
        "crops": _crops(config.data),
        "learning rate": f"{config.optimizer.lr:g}, {config.optimizer.schedule}, {config.optimizer.warmup_steps} steps "
                         "of warm-up",
        "weight decay": f"{config.optimizer.weight_decay:g}",
        "seed": f"{config.seed}",
        **({"weights": f"exponential moving average, decay {config.train.ema_decay}"}
           if pretrained.weights == "averaged" else {}),
    }


def _protocol(settings: EvalConfig) -> str:
    windows = "whole images" if settings.mode == "whole" else (
        f"windows of {settings.crop_size} pixels, {settings.stride} apart")
    views = ", flipped as well" if settings.tta_flip else ""
    scales = f", scales {', '.join(map(str, settings.tta_ratios))}" if settings.tta_ratios else ""
    rules = f", by the rules of {settings.reference}" if settings.reference else ""
    return windows + views + scales + rules


def _licence(pretrained: Pretrained, facts: CardFacts) -> Iterator[str]:
    backbone, config = pretrained.model.backbone, pretrained.config.backbone
    if facts.license is None:
        yield f"**Not chosen yet.** Set `license:` at the top of this file to one of [these]({LICENSES}).\n"
    else:
        yield f"`{facts.license}`, chosen by who published this model.\n"
    if config.random.hidden_size is not None:
        yield "The ViT's weights are random, not published ones.\n"
    elif facts.contains_backbone:
        yield (f"This repository contains weights of {backbone.family}, to which their own licence applies: "
               f"{backbone.license}. Whoever passes them on, changed or not, has to follow it"
               + (", and to enclose a copy.\n" if backbone.is_gated else ".\n"))
    else:
        yield (f"The ViT is not in this repository. Loading the model gets it from {facts.backbone_id}, where its "
               f"licence has to be accepted first: {backbone.license}.\n")
    yield "The training data has a licence of its own, which is not known here."


def _plain(info: ClassInfo) -> str:
    return _escaped(info.name)


def _escaped(text: str) -> str:
    """Text without meaning in Markdown or HTML, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>|#&!])", r"\\\1", shown(text))
