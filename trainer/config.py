"""Settings of training, evaluation and prediction, each with its default, meaning and unit."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shards.cli.config_file import config_from_dict, load_config
from shards.cli.settings import place, setting
from shards.errors import ConfigError
from shards.files.storage import REMOTE_SCHEMES, local_path
from trainer.data_config import DataConfig
from trainer.model_config import SIZE_DIVISORS, AdapterConfig, BackboneConfig, DecoderHeadConfig

STOPPING_METRICS = ("mIoU", "mAcc", "aAcc", "fwIoU", "mDice", "mBoundaryIoU")  # all of them: higher is better


@dataclass(frozen=True, kw_only=True)
class LoadConfig:
    """Weights that a new run starts from (fine-tuning). A resumed run loads its own checkpoint instead."""

    weights: str | None = place("file with a trained head: a MaskStream checkpoint, Meta's head (.pth), a full model, "
                                "or an EoMT or PMT as published; null: start from random weights")
    ignore: list[str] = setting([], "patterns of keys that are not loaded and may be missing, unexpected or of a "
                                "different shape, e.g. ['*class_embed.*'] for other classes; any other mismatch is an "
                                "error")
    base_sha256: str | None = setting(None, "weights published as differences to a ViT: first digits (at least 16) of "
                                      "that ViT's sha256; null: the rounding of the sums must prove that it is "
                                      "backbone.source")

    def __post_init__(self) -> None:
        if self.base_sha256 is not None and not re.fullmatch("[0-9a-fA-F]{16,64}", self.base_sha256):
            raise ConfigError(f"load.base_sha256 is {self.base_sha256!r}, legal: 16 to 64 hexadecimal digits")
        if self.ignore and self.weights is None:
            raise ConfigError(f"load.ignore is {list(self.ignore)} but load.weights is not set; set both or neither")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Mask classification loss (m2f, eomt, pmt). The linear head uses per-pixel cross-entropy, and of these settings
    only class_weights and its beta."""

    num_points: int = setting(12544, "points sampled per mask", minimum=1, maximum=10000000)
    oversample_ratio: float = setting(3.0, "candidate points drawn for each point kept", minimum=1, maximum=100)
    importance_sample_ratio: float = setting(0.75, "fraction of points taken where the mask is most uncertain; the "
                                             "rest are uniform", minimum=0, maximum=1)
    mask_coefficient: float = setting(5.0, "weight of the mask cross-entropy", minimum=0)
    dice_coefficient: float = setting(5.0, "weight of the dice loss", minimum=0)
    class_coefficient: float = setting(2.0, "weight of the class cross-entropy", minimum=0)
    no_object_coefficient: float = setting(0.1, "weight of the 'no object' class in the class cross-entropy",
                                           minimum=0)
    ignore: str = setting("background", "how unlabelled pixels are treated: background of every mask, as in the "
                          "reference; or exclude: left out of matching and losses", choices=("background", "exclude"))
    num_masks_counts: str = setting("matched", "divisor of mask and dice losses where an image has more classes than "
                                    "decoder_head.num_queries: matched masks, as in EoMT's loss, or all targets, as in "
                                    "transformers'", choices=("matched", "all"))
    matched_gradients: bool = setting(True, "backpropagate only through the masks of matched queries: the same "
                                      "gradients in less memory and time")
    class_weights: str | list[float] | None = setting(
        None, "weights of the classes in the class cross-entropy, or the linear head's pixel cross-entropy: a list of "
        "one per class; inverse_log (ENet) or effective_number, of the training split's counts; null: all 1",
        choices=("inverse_log", "effective_number"), minimum=0)
    class_weights_beta: float = setting(0.9999, "class_weights effective_number: beta; the nearer to 1, the more rare "
                                        "classes gain", minimum=0, maximum=0.999999999)

    def __post_init__(self) -> None:
        if isinstance(self.class_weights, list) and not any(self.class_weights):
            raise ConfigError(f"loss.class_weights is {self.class_weights}, legal: one number per class, at least one "
                              "of them above 0")
        if not any((self.mask_coefficient, self.dice_coefficient, self.class_coefficient)):
            raise ConfigError("loss.mask_coefficient, loss.dice_coefficient and loss.class_coefficient are all 0, "
                              "legal: at least one above 0, or there is nothing to match by and train on")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, its schedule and gradient clipping."""

    lr: float = setting(1e-4, "peak learning rate", minimum=0)
    betas: list[float] = setting([0.9, 0.999], "AdamW's beta1 and beta2", minimum=0, maximum=1)
    weight_decay: float = setting(0.05, "weight decay of matrices; norms, biases and embeddings are exempt", minimum=0)
    decay_all: bool = setting(False, "apply weight decay to every parameter, as in the reference's linear recipe")
    clip_grad_norm: float | None = setting(0.01, "maximum gradient norm over all parameters; null: no clipping",
                                           minimum=0)
    schedule: str = setting("poly", "poly: (1 - step/total)^power from the first step, times a linear warm-up; "
                            "poly_after_warmup: the decay starts when the warm-up ends, as in EoMT's recipes; "
                            "one_cycle: the reference's linear recipe",
                            choices=("poly", "poly_after_warmup", "one_cycle"))
    power: float = setting(0.9, "poly schedules: exponent of the decay", minimum=0)
    warmup_steps: int = setting(1500, "length of the linear warm-up, in steps", minimum=0)
    backbone_warmup_steps: int = setting(0, "poly schedules, trainable backbone: keep the ViT fixed for warmup_steps, "
                                         "then warm it up over this many steps; 0: together with the head", minimum=0)
    layer_decay: float = setting(1.0, "trainable backbone: learning rate of each ViT block as a fraction of that of "
                                 "the block after it; 1: the same for all", minimum=0.01, maximum=1)

    def __post_init__(self) -> None:
        if len(self.betas) != 2 or max(self.betas) >= 1:
            raise ConfigError(f"optimizer.betas is {self.betas}, legal: two numbers from 0 to below 1")
        if self.backbone_warmup_steps and self.schedule == "one_cycle":
            raise ConfigError(f"optimizer.backbone_warmup_steps is {self.backbone_warmup_steps}, legal with schedule "
                              f"{self.schedule}: 0")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training loop. A step is one optimiser update on `global_batch_size` crops, for any number of ranks."""

    total_steps: int = setting(40000, "optimiser steps in the whole run", minimum=1)
    global_batch_size: int = setting(16, "crops per optimiser step, over all ranks and accumulated micro-batches",
                                     minimum=1)
    micro_batch_size: int = setting(2, "crops per forward pass on one device; gradient accumulation follows from it",
                                    minimum=1)
    precision: str = setting("auto", "auto: bf16 autocast on CUDA devices that support it, otherwise float32; fp16: "
                             "with loss scaling, for GPUs without bf16", choices=("auto", "bf16", "fp16", "fp32"))
    ema_decay: float | None = setting(None, "also keep an exponential moving average of the trained weights, with this "
                                      "decay per step, e.g. 0.999; see eval.weights. null: none", minimum=0,
                                      maximum=0.999999)
    ema_warmup: bool = setting(True, "ema_decay: lower decay at first, min(ema_decay, (1 + n) / (10 + n)) at the n-th "
                               "step, so that the initial weights are soon forgotten")
    gradient_checkpointing: bool = setting(False, "recompute activations in the backward pass instead of storing them: "
                                           "less memory, about a third more time")
    compile: bool = setting(False, "run the head through torch.compile: faster steps after a minute or more of "
                            "compilation; needs a C++ compiler")
    triton: bool = setting(False, "m2f on CUDA: deformable attention by Triton kernels, which do not write samples to "
                           "memory; same results up to float rounding")
    deterministic: bool = setting(False, "the same bits in every run on GPUs too, as always on CPUs; slower, and "
                                  "more memory than --dry-run estimates")
    fsdp: bool = setting(False, "trainable backbone, several GPUs: each keeps only its share of weights, gradients and "
                         "moments (FSDP2), so that larger ViTs fit; checkpoints stay the same")
    log_every: int = setting(50, "steps between log lines", minimum=1)
    checkpoint_every: int = setting(1000, "steps between checkpoints", minimum=1)
    checkpoint_dir: str | None = place("folder or s3://, gs://, az:// URL for this run's checkpoints; null: "
                                       "output_dir/checkpoints")
    keep_checkpoints: int = setting(2, "most recent checkpoints to keep, in addition to the best one", minimum=1)
    keep_every: int | None = setting(None, "also keep every checkpoint whose step is a multiple of this; null: none",
                                     minimum=1)
    on_non_finite: str = setting("stop", "what to do when a loss or gradient is NaN or infinite, once it is recorded "
                                 "in output_dir/non-finite: stop; skip the step; rollback to the last checkpoint and "
                                 "continue without the step", choices=("stop", "skip", "rollback"))
    non_finite_budget: int = setting(3, "on_non_finite skip and rollback: steps that may be skipped before the run "
                                     "stops", minimum=1)
    hang_timeout: float = setting(600.0, "seconds without progress on any rank after which the run counts as hung and "
                                  "is terminated", minimum=1)
    eval_every: int = setting(5000, "steps between evaluations; the last step is always evaluated, once", minimum=1)
    early_stopping: str | None = setting(None, "end the run when this metric of its evaluations no longer rises; null: "
                                         "train for total_steps", choices=STOPPING_METRICS)
    patience: int = setting(5, "early_stopping: evaluations in a row without a rise after which the run ends",
                            minimum=1)
    min_delta: float = setting(0.0, "early_stopping: a rise is more than this above the best so far", minimum=0)
    max_hours: float | None = setting(None, "hours after the start of the command at which the run stops as on a "
                                      "signal, to be resumed by the same command; null: no limit", minimum=0.01)
    wandb_project: str | None = place("Weights & Biases project that also receives scalars and pictures (needs the "
                                      "wandb extra; WANDB_MODE=offline is honoured); null: none")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation and prediction: sliding window and test-time augmentation."""

    mode: str = setting("slide", "slide: overlapping windows; whole: one forward pass per image, which keeps its "
                        "aspect ratio (the DINOv3 reference squashes it to a square)", choices=("slide", "whole"))
    resize_short_side: int | None = setting(None, "pixels to which the image's short side is resized first; null: not "
                                            "resized", minimum=32, maximum=16384)
    crop_size: int = setting(512, "slide: window side in pixels, a multiple of 32 for m2f and of 16 for linear and "
                             "eomt", minimum=64, maximum=16384)
    stride: int = setting(341, "slide: distance between windows in pixels", minimum=1)
    tta_ratios: list[float] = setting([], "test-time augmentation: scales of resize_short_side to average over, e.g. "
                                      "[0.9, 1.0, 1.1]; empty: a single scale", minimum=0.1, maximum=10)
    tta_flip: bool = setting(False, "test-time augmentation: also average over the mirrored image")
    reference: str | None = setting(None, "reproduce a published evaluation: dinov3 (uint8 images resized by Pillow, "
                                    "windows inside the image, bfloat16 scores), eomt (one view that covers crop_size, "
                                    "evenly spread windows, absent classes count as 0 in the mIoU); null: images "
                                    "resized as floats, windows padded to a legal size, float32 scores",
                                    choices=("dinov3", "eomt"))
    window_batch: int = setting(4, "windows per forward pass, of all views and of as many images at a time as windows",
                                minimum=1, maximum=1024)
    memory_gb: float = setting(4.0, "memory for scores, in GB, beside the network's own: they are computed for as many "
                               "rows of an image at a time as fit", minimum=0.01)
    half_scores: bool = setting(False, "keep the network's outputs and multiply classes and masks in bfloat16: half "
                                "the memory; sums over windows stay float32")
    max_images: int | None = setting(None, "number of images to evaluate, from the first on; null: all", minimum=1)
    panels: int = setting(4, "pictures (image, truth, prediction) saved per evaluation", minimum=0)
    weights: str = setting("averaged", "which weights of a run or checkpoint with train.ema_decay count, for best.pt, "
                           "and are used, for evaluation, prediction and export: averaged, or raw as trained",
                           choices=("averaged", "raw"))

    def __post_init__(self) -> None:
        if self.stride > self.crop_size and self.reference != "eomt":
            raise ConfigError(f"eval.stride is {self.stride}, legal: at most eval.crop_size ({self.crop_size}), "
                              "or windows would leave gaps between them")
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

    output_dir: str | None = place("folder for the run's config, checkpoints, metrics and pictures")
    seed: int = setting(0, "seed for initial weights, data order, augmentation and sampled points", minimum=0,
                        maximum=2**62)
    device: str = setting("auto", "device to run on; auto: CUDA if available, otherwise CPU",
                          choices=("auto", "cpu", "cuda"))
    resume: str = setting("auto", "auto: resume the run in output_dir if it has a checkpoint; never: refuse to start "
                          "if output_dir already holds a run", choices=("auto", "never"))
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
        for name, place_given in (("output_dir", self.output_dir), ("data.cache_dir", self.data.cache_dir)):
            if (place_given or "").startswith(tuple(f"{scheme}://" for scheme in REMOTE_SCHEMES)):
                local_path(str(place_given), name)  # raises ConfigError: a URL would become a folder called "s3:"
        head = self.decoder_head
        if head.type in SIZE_DIVISORS and self.eval.crop_size % head.size_divisor:
            raise ConfigError(f"eval.crop_size is {self.eval.crop_size}, legal with decoder_head.type {head.type}: a "
                              f"multiple of {head.size_divisor}")
        if not self.backbone.trainable:
            for name, value, neutral in (("layer_decay", self.optimizer.layer_decay, 1.0),
                                         ("backbone_warmup_steps", self.optimizer.backbone_warmup_steps, 0)):
                if value != neutral:
                    raise ConfigError(f"optimizer.{name} is {value} but the backbone is frozen; set "
                                      f"backbone.trainable=true, or optimizer.{name}={neutral}")
        if self.train.deterministic and self.train.triton:
            raise ConfigError("train.triton is true, legal with train.deterministic: false, as its kernels add "
                              "gradients in any order")
        if self.train.fsdp:
            self._check_fsdp()

    def _check_fsdp(self) -> None:
        for name, value, legal in (("backbone.trainable", self.backbone.trainable, (True,)),
                                   ("train.compile", self.train.compile, (False,)),
                                   ("train.precision", self.train.precision, ("auto", "bf16", "fp32"))):
            if value not in legal:
                raise ConfigError(f"{name} is {str(value).lower()}, legal with train.fsdp: "
                                  f"{', '.join(str(choice).lower() for choice in legal)}")


def load_run_config(paths: str | Path | Sequence[str | Path] | None, overrides: list[str]) -> RunConfig:
    """Read a run's YAML files and apply overrides. Raises ConfigError (see `shards.cli.config_file.load_config`)."""
    return load_config(RunConfig, paths, overrides)


def run_config_from_dict(values: dict[str, Any]) -> RunConfig:
    """The configuration stored in a checkpoint, validated like one from a file; without `data.transform`, as nothing
    that is read may run code."""
    config = config_from_dict(RunConfig, values, "the checkpoint's configuration")
    return replace(config, data=replace(config.data, transform=None))
