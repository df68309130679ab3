"""Everything a training, evaluation or prediction run can be told, with its default, meaning and unit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.cli.config_file import config_from_dict, load_config
from shards.cli.settings import place, setting
from shards.errors import ConfigError
from trainer.model_config import SIZE_DIVISORS, AdapterConfig, BackboneConfig, DecoderHeadConfig


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the shards are and how a worker turns a stored crop into a training sample."""

    root: str | None = place("folder of the shard set (the one that holds manifest.json), or its s3://, gs://, az:// "
                             "or https:// URL")
    train_split: str = setting("train", "split of the shard set to train on")
    val_split: str = setting("val", "split of the shard set to evaluate on")
    workers: int = setting(4, "loader processes per rank; 0 decodes in the training process", minimum=0)
    prefetch_batches: int = setting(4, "micro-batches each worker prepares ahead", minimum=1)
    targets: str = setting("segment_map", "what workers hand over: packed uint8 maps, or dense {masks, labels} (equal "
                           "results, 10 to 40 times the bytes)", choices=("segment_map", "dense"))
    crop_size: int | None = setting(None, "side in pixels of a random crop out of the stored crop; null trains on "
                                    "stored crops as they are", minimum=32, maximum=16384)
    hflip: float = setting(0.5, "probability of mirroring a training crop", minimum=0, maximum=1)
    photometric: bool = setting(True, "random brightness, contrast, saturation and hue (on the training device)")
    hue_degrees: float = setting(180.0, "photometric: the hue turns by up to so many degrees either way; 180, as in "
                                 "DINOv3's linear recipe, is any colour at all, EoMT's takes 18", minimum=0,
                                 maximum=180)
    lanes: int = setting(128, "sections of an epoch that a run of micro-batches takes its samples from in turn; each "
                         "span is read by one worker only when micro_batch_size x ranks x workers divides it",
                         minimum=1)
    span_samples: int = setting(16, "neighbouring samples that are read in one piece", minimum=1)
    read_ahead_mb: int = setting(256, "object storage: bytes that a worker holds before they are needed, in MiB; "
                                 "enough for lanes / (ranks x workers) spans", minimum=1)
    cache_dir: str | None = place("object storage: folder on the node's own disk in which read bytes are kept; null: "
                                  "no cache")
    cache_gb: float = setting(100.0, "size limit of cache_dir, in GB", minimum=0.001)
    tries: int = setting(8, "object storage: tries before a read fails, with growing pauses between", minimum=1)
    timeout: float = setting(30.0, "object storage: seconds after which a request is given up and tried again",
                             minimum=0.1)
    on_corrupt: str = setting("fail", "what a training sample whose bytes are damaged does: fail, or skip: the next "
                              "one of its global batch takes its place", choices=("fail", "skip"))
    corrupt_budget: int = setting(10, "on_corrupt skip: samples that a rank may skip in one start of the run",
                                  minimum=1)


@dataclass(frozen=True, kw_only=True)
class LoadConfig:
    """Weights that a new run starts from (fine-tuning). A run that is continued reads its own checkpoint instead."""

    weights: str | None = place("file with a trained head: one of our checkpoints, Meta's head (.pth), or a full "
                                "model; null: start from random weights")
    ignore: list[str] = setting([], "patterns of keys that are not loaded and may be missing, unexpected or of another "
                                "shape, e.g. ['*class_embed.*'] for other classes; any other difference is an error")

    def __post_init__(self) -> None:
        if self.ignore and self.weights is None:
            raise ConfigError(f"load.ignore is {list(self.ignore)} and load.weights is not set")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Mask classification loss (m2f). The linear head uses per-pixel cross-entropy and reads none of this."""

    num_points: int = setting(12544, "points sampled per mask", minimum=1, maximum=10000000)
    oversample_ratio: float = setting(3.0, "candidates drawn per kept point", minimum=1, maximum=100)
    importance_sample_ratio: float = setting(0.75, "share of points taken where the mask is most uncertain", minimum=0,
                                             maximum=1)
    mask_coefficient: float = setting(5.0, "weight of the mask cross-entropy", minimum=0)
    dice_coefficient: float = setting(5.0, "weight of the dice loss", minimum=0)
    class_coefficient: float = setting(2.0, "weight of the class cross-entropy", minimum=0)
    no_object_coefficient: float = setting(0.1, "class weight of 'no object'", minimum=0)
    ignore: str = setting("background", "pixels without a label: background of every mask, as in the reference; or "
                          "exclude: left out of matching and losses", choices=("background", "exclude"))
    num_masks_counts: str = setting("matched", "what mask and dice losses are divided by where an image has more "
                                    "classes than decoder_head.num_queries: matched masks, as EoMT's loss; all "
                                    "targets, as transformers'", choices=("matched", "all"))
    matched_gradients: bool = setting(True, "let only matched queries carry gradients through masks: the same "
                                      "gradients, with less memory and time")

    def __post_init__(self) -> None:
        if not any((self.mask_coefficient, self.dice_coefficient, self.class_coefficient)):
            raise ConfigError("loss.mask_coefficient, loss.dice_coefficient and loss.class_coefficient are all 0, "
                              "legal: at least one above 0, or nothing is left to match and train by")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, its schedule and gradient clipping."""

    lr: float = setting(1e-4, "peak learning rate", minimum=0)
    betas: list[float] = setting([0.9, 0.999], "AdamW moment decay rates", minimum=0, maximum=1)
    weight_decay: float = setting(0.05, "weight decay of matrices; norms, biases and embeddings get none", minimum=0)
    decay_all: bool = setting(False, "apply weight decay to every parameter, as the reference's linear recipe does")
    clip_grad_norm: float | None = setting(0.01, "largest gradient norm over all parameters; null: no clipping",
                                           minimum=0)
    schedule: str = setting("poly", "poly: (1 - step/total)^power from the first step, times a linear warm-up; "
                            "poly_after_warmup: the decay begins where the warm-up ends, as in EoMT's recipes; "
                            "one_cycle: the reference's linear recipe",
                            choices=("poly", "poly_after_warmup", "one_cycle"))
    power: float = setting(0.9, "poly: exponent", minimum=0)
    warmup_steps: int = setting(1500, "steps of linear warm-up", minimum=0)
    backbone_warmup_steps: int = setting(0, "poly schedules, trainable backbone: hold the ViT for warmup_steps, then "
                                         "warm it up in so many; 0: together with the head", minimum=0)
    layer_decay: float = setting(1.0, "trainable backbone: learning rate of each ViT block as a fraction of the next "
                                 "block's; 1: all alike", minimum=0.01, maximum=1)

    def __post_init__(self) -> None:
        if len(self.betas) != 2 or max(self.betas) >= 1:
            raise ConfigError(f"optimizer.betas is {self.betas}, legal: two numbers from 0 to below 1")
        if self.backbone_warmup_steps and self.schedule == "one_cycle":
            raise ConfigError(f"optimizer.backbone_warmup_steps is {self.backbone_warmup_steps}, legal with schedule "
                              f"{self.schedule}: 0")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop. A step is one optimiser update on `global_batch_size` crops, whatever the number of ranks."""

    total_steps: int = setting(40000, "optimiser steps of the whole run", minimum=1)
    global_batch_size: int = setting(16, "crops per optimiser step over all ranks and accumulation", minimum=1)
    micro_batch_size: int = setting(2, "crops per forward pass on one device; accumulation follows from it", minimum=1)
    precision: str = setting("auto", "auto: bf16 autocast on CUDA devices that have it, else float32",
                             choices=("auto", "bf16", "fp32"))
    gradient_checkpointing: bool = setting(False, "compute layers again in the backward pass instead of keeping their "
                                           "activations: less memory, about a third more time")
    compile: bool = setting(False, "run the head through torch.compile: faster steps after a minute or more of "
                            "compiling at the start; needs a C++ compiler")
    log_every: int = setting(50, "steps between log lines", minimum=1)
    checkpoint_every: int = setting(1000, "steps between checkpoints", minimum=1)
    checkpoint_dir: str | None = place("folder or s3://, gs://, az:// URL of this run's checkpoints; null: "
                                       "output_dir/checkpoints")
    keep_checkpoints: int = setting(2, "newest checkpoints kept (the best one is kept besides)", minimum=1)
    keep_every: int | None = setting(None, "checkpoints of steps that are multiples of it are kept for good; null: "
                                     "none", minimum=1)
    on_non_finite: str = setting("stop", "what a step whose loss or gradient is NaN or infinite does, besides leaving "
                                 "a record in output_dir/non-finite: stop; skip that step; rollback to the last "
                                 "checkpoint and go on without that step", choices=("stop", "skip", "rollback"))
    non_finite_budget: int = setting(3, "on_non_finite skip and rollback: steps that may be left out before the run "
                                     "stops", minimum=1)
    hang_timeout: float = setting(600.0, "seconds without progress of any rank after which a run is taken to hang, and "
                                  "ends", minimum=1)
    eval_every: int = setting(5000, "steps between evaluations; the end is always evaluated, once", minimum=1)
    wandb_project: str | None = place("Weights & Biases project that scalars and pictures go to besides (needs the "
                                      "extra wandb; WANDB_MODE=offline is honoured); null: none")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation and prediction: sliding window and test-time augmentation."""

    mode: str = setting("slide", "slide: overlapping windows; whole: one forward pass per image, its aspect ratio kept "
                        "(the DINOv3 reference squashes it to a square)", choices=("slide", "whole"))
    resize_short_side: int | None = setting(None, "short side in pixels the image is resized to first; null: as it is",
                                            minimum=32, maximum=16384)
    crop_size: int = setting(512, "slide: window side in pixels, a multiple of what the head takes (m2f: 32, linear "
                             "and eomt: 16)", minimum=64, maximum=16384)
    stride: int = setting(341, "slide: step between windows in pixels", minimum=1)
    tta_ratios: list[float] = setting([], "scales of resize_short_side to average over, e.g. [0.9, 1.0, 1.1]; empty: "
                                      "one", minimum=0.1, maximum=10)
    tta_flip: bool = setting(False, "average with the mirrored image too")
    reference: str | None = setting(None, "evaluate as published: dinov3 (uint8 images resized by Pillow, windows "
                                    "inside the image, bfloat16 scores), eomt (one view that covers crop_size, windows "
                                    "spread evenly, absent classes count as 0 in the mIoU); null: floats, windows "
                                    "padded to a legal size, float32 scores", choices=("dinov3", "eomt"))
    max_images: int | None = setting(None, "evaluate only the first so many images; null: all", minimum=1)
    panels: int = setting(4, "pictures (image, truth, prediction) written per evaluation", minimum=0)

    def __post_init__(self) -> None:
        if self.stride > self.crop_size and self.reference != "eomt":
            raise ConfigError(f"eval.stride is {self.stride}, legal: at most eval.crop_size ({self.crop_size}), "
                              "or pixels between windows would never be seen")
        self._check_reference()

    def _check_reference(self) -> None:
        if self.reference is None:
            return
        legal: dict[str, tuple[Any, ...]] = {"mode": ("slide",)}
        if self.reference == "eomt":
            legal |= {"tta_ratios": ([],), "tta_flip": (False,), "resize_short_side": (None, self.crop_size)}
        for name, values in legal.items():
            if getattr(self, name) not in values:
                raise ConfigError(f"eval.{name} is {getattr(self, name)}, legal with eval.reference={self.reference}: "
                                  f"{' or '.join(map(str, values))}")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run: the root of the configuration."""

    output_dir: str | None = place("folder of the run: config, checkpoints, metrics, pictures")
    seed: int = setting(0, "seed of initial weights, data order, augmentation and sampled points", minimum=0,
                        maximum=2**62)
    device: str = setting("auto", "where to run: auto takes CUDA when present", choices=("auto", "cpu", "cuda"))
    resume: str = setting("auto", "auto: continue the run in output_dir if it has a checkpoint; never: refuse to touch "
                          "an existing run", choices=("auto", "never"))
    data: DataConfig = setting(DataConfig, "")
    backbone: BackboneConfig = setting(BackboneConfig, "")
    adapter: AdapterConfig = setting(AdapterConfig, "")
    decoder_head: DecoderHeadConfig = setting(DecoderHeadConfig, "")
    load: LoadConfig = setting(LoadConfig, "")
    loss: LossConfig = setting(LossConfig, "")
    optimizer: OptimizerConfig = setting(OptimizerConfig, "")
    train: TrainConfig = setting(TrainConfig, "")
    eval: EvalConfig = setting(EvalConfig, "")

    def __post_init__(self) -> None:
        head = self.decoder_head
        if head.type in SIZE_DIVISORS and self.eval.crop_size % head.size_divisor:
            raise ConfigError(f"eval.crop_size is {self.eval.crop_size}, legal with decoder_head.type {head.type}: a "
                              f"multiple of {head.size_divisor}")
        if not self.backbone.trainable:
            for name, value, neutral in (("layer_decay", self.optimizer.layer_decay, 1.0),
                                         ("backbone_warmup_steps", self.optimizer.backbone_warmup_steps, 0)):
                if value != neutral:
                    raise ConfigError(f"optimizer.{name} is {value} and the backbone is frozen; set "
                                      f"backbone.trainable=true, or optimizer.{name}={neutral}")


def load_run_config(paths: str | Path | Sequence[str | Path] | None, overrides: list[str]) -> RunConfig:
    """Read a run's YAML files with overrides. Raises ConfigError (see `shards.cli.config_file.load_config`)."""
    return load_config(RunConfig, paths, overrides)


def run_config_from_dict(values: dict[str, Any]) -> RunConfig:
    """The configuration stored in a checkpoint, checked like one from a file."""
    return config_from_dict(RunConfig, values, "the checkpoint's configuration")
