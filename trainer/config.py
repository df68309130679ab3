"""Everything a training, evaluation or prediction run can be told, with its default, meaning and unit."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.config_file import config_from_dict, load_config
from shards.errors import ConfigError
from shards.settings import knob, place

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MOST_HEAD_PARAMETERS = 4_000_000_000  # four times the head of the largest published ViT


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the shards are and how a worker turns a stored crop into a training sample."""

    root: str | None = place("folder of the shard set (the one that holds manifest.json), or its s3://, gs://, "
                            "az:// or https:// URL")
    train_split: str = knob("train", "split of the shard set to train on")
    val_split: str = knob("val", "split of the shard set to evaluate on")
    workers: int = knob(4, "loader processes per rank; 0 decodes in the training process", minimum=0)
    prefetch_batches: int = knob(4, "micro-batches each worker prepares ahead", minimum=1)
    targets: str = knob("segment_map", "what workers hand over: packed uint8 maps, or dense {masks, labels} "
                        "(equal results, 10 to 40 times the bytes)", choices=("segment_map", "dense"))
    crop_size: int | None = knob(None, "side in pixels of a random crop out of the stored crop; "
                                 "null trains on stored crops as they are", minimum=32, maximum=16384)
    hflip: float = knob(0.5, "probability of mirroring a training crop", minimum=0, maximum=1)
    photometric: bool = knob(True, "random brightness, contrast, saturation and hue (on the training device)")
    hue_degrees: float = knob(180.0, "photometric: the hue turns by up to so many degrees either way; 180, as in "
                              "DINOv3's linear recipe, is any colour at all, EoMT's takes 18", minimum=0, maximum=180)
    lanes: int = knob(128, "sections of an epoch that a run of micro-batches takes its samples from in turn; each span "
                      "is read by one worker only when micro_batch_size x ranks x workers divides it", minimum=1)
    span_samples: int = knob(16, "neighbouring samples that are read in one piece", minimum=1)
    read_ahead_mb: int = knob(256, "object storage: bytes that a worker holds before they are needed, in MiB; enough "
                              "for lanes / (ranks x workers) spans", minimum=1)
    cache_dir: str | None = place("object storage: folder on the node's own disk in which read bytes are kept; "
                                 "null: no cache")
    cache_gb: float = knob(100.0, "size limit of cache_dir, in GB", minimum=0.001)
    tries: int = knob(8, "object storage: tries before a read fails, with growing pauses between", minimum=1)
    timeout: float = knob(30.0, "object storage: seconds after which a request is given up and tried again",
                          minimum=0.1)
    on_corrupt: str = knob("fail", "what a training sample whose bytes are damaged does: fail, or skip: the next one "
                           "of its global batch takes its place", choices=("fail", "skip"))
    corrupt_budget: int = knob(10, "on_corrupt skip: samples that a rank may skip in one start of the run",
                               minimum=1)


@dataclass(frozen=True, kw_only=True)
class RandomBackboneConfig:
    """A small DINOv3 ViT with random weights drawn from `seed`: for tests, demos and dry runs."""

    hidden_size: int | None = knob(None, "token width; null: no random backbone",
                                   minimum=4, maximum=16384)
    num_hidden_layers: int = knob(4, "transformer blocks", minimum=1, maximum=256)
    num_attention_heads: int = knob(2, "attention heads", minimum=1, maximum=512)
    intermediate_size: int = knob(256, "hidden width of the block MLP", minimum=1, maximum=65536)
    num_register_tokens: int = knob(4, "register tokens", minimum=0, maximum=4096)
    use_gated_mlp: bool = knob(False, "SwiGLU MLP, as in S+, H+ and 7B")
    seed: int = knob(0, "seed of the random weights", minimum=0, maximum=2**62)


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """The DINOv3 ViT."""

    source: str | None = place("Hugging Face DINOv3 or EoMT directory or hub id, e.g. "
                              "facebook/dinov3-vits16-pretrain-lvd1689m; or Meta's .pth of a DINOv3 ViT")
    random: RandomBackboneConfig = knob(RandomBackboneConfig, "random weights instead of `source`")
    layers: str = knob("FOUR_EVEN_INTERVALS", "blocks whose tokens are tapped",
                       choices=("FOUR_EVEN_INTERVALS", "FOUR_LAST", "LAST"))
    trainable: bool = knob(False, "train the ViT too (it stays in evaluation mode: no rotary jitter); checkpoints then "
                           "hold it")
    image_mean: list[float] = knob(list(IMAGENET_MEAN), "per-channel mean of the pixels, on a 0..1 scale")
    image_std: list[float] = knob(list(IMAGENET_STD), "per-channel standard deviation, on a 0..1 scale")

    def __post_init__(self) -> None:
        for name, values in (("image_mean", self.image_mean), ("image_std", self.image_std)):
            if len(values) != 3 or (name == "image_std" and min(values) <= 0):
                raise ConfigError(f"backbone.{name} is {values}, legal: three numbers"
                                  f"{' above 0' if name == 'image_std' else ''}, one per channel")
        if self.source is not None and self.random.hidden_size is not None:
            raise ConfigError("backbone.source and backbone.random.hidden_size are both set; give one of them")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """DINOv3_Adapter (ViT-Adapter without injectors); the defaults are the reference's."""

    conv_inplane: int = knob(64, "channels of the convolution stem", minimum=1, maximum=1024)
    n_points: int = knob(4, "sampling points per head of deformable attention", minimum=1, maximum=64)
    deform_num_heads: int = knob(16, "heads of deformable attention", minimum=1, maximum=512)
    drop_path: float = knob(0.3, "stochastic depth rate of the extractors", minimum=0, maximum=0.99)
    cffn_ratio: float = knob(0.25, "width of the convolutional FFN, as a fraction of the token width", minimum=0.01,
                             maximum=16)
    deform_ratio: float = knob(0.5, "value width of deformable attention, as a fraction of the token "
                               "width; the result must be a multiple of deform_num_heads", minimum=0.01, maximum=16)


SIZE_DIVISORS = {"m2f": 32, "linear": 16, "eomt": 16}
"""What the sides of images must be multiples of: the adapter's coarsest map, or the ViT's grid of tokens."""


@dataclass(frozen=True, kw_only=True)
class DecoderHeadConfig:
    """The segmentation head; `type` routes in `trainer.build`, nowhere else."""

    type: str = knob("m2f", "head kind", choices=("m2f", "linear", "eomt"))
    num_queries: int = knob(100, "mask queries", minimum=1, maximum=65536, only_for=("m2f", "eomt"))
    # Mask2Former
    hidden_dim: int = knob(256, "width of pixel decoder, queries and mask features (multiple of 32)", minimum=32,
                           maximum=4096, only_for=("m2f",))
    nheads: int = knob(16, "attention heads (must divide hidden_dim)", minimum=1, maximum=512, only_for=("m2f",))
    enc_layers: int = knob(6, "deformable encoder layers of the pixel decoder", minimum=1, maximum=64,
                           only_for=("m2f",))
    enc_ffn: int = knob(4096, "FFN width of the pixel decoder's encoder", minimum=1, maximum=65536, only_for=("m2f",))
    dec_layers: int = knob(9, "masked-attention decoder layers (dec_layers + 1 predictions)", minimum=1, maximum=64,
                           only_for=("m2f",))
    dec_ffn: int = knob(4096, "FFN width of the mask decoder", minimum=1, maximum=65536, only_for=("m2f",))
    # linear
    dropout: float = knob(0.1, "probability of dropping a feature channel", minimum=0, maximum=0.99,
                          only_for=("linear",))
    use_batchnorm: bool = knob(True, "batch norm on the features", only_for=("linear",))
    use_cls_token: bool = knob(False, "concatenate the class token to every patch feature", only_for=("linear",))
    use_backbone_norm: bool = knob(True, "pass the tapped tokens through the ViT's final norm", only_for=("linear",))
    # EoMT
    num_blocks: int = knob(4, "last blocks of the ViT that the queries run through (num_blocks + 1 predictions)",
                           minimum=1, maximum=256, only_for=("eomt",))
    num_upscale_blocks: int = knob(2, "doublings of the patch grid; 2 give masks at stride 4", minimum=0, maximum=4,
                                   only_for=("eomt",))
    mask_annealing: list[float] = knob([0.125, 0.8125], "part of the run in which masked attention fades out, as two "
                                       "fractions of train.total_steps", minimum=0, maximum=1, only_for=("eomt",))
    mask_annealing_starts: list[int] = knob([], "steps at which masked attention begins to fade out, one for each of "
                                            "num_blocks blocks; empty: as mask_annealing says", minimum=0,
                                            only_for=("eomt",))
    mask_annealing_ends: list[int] = knob([], "steps at which it has faded out, one for each block", minimum=1,
                                          only_for=("eomt",))

    @property
    def size_divisor(self) -> int:
        """What height and width of the network's images must be multiples of."""
        return SIZE_DIVISORS[self.type]

    def __post_init__(self) -> None:
        if self.type == "m2f" and self.nheads > 0 and (self.hidden_dim % 32 or self.hidden_dim % self.nheads):
            raise ConfigError(f"decoder_head.hidden_dim is {self.hidden_dim}, legal: a multiple of 32 and of "
                              f"decoder_head.nheads ({self.nheads})")
        self._check_size()
        if len(self.mask_annealing) != 2 or self.mask_annealing[0] >= self.mask_annealing[1]:
            raise ConfigError(f"decoder_head.mask_annealing is {self.mask_annealing}, legal: two fractions from 0 to "
                              "1, the first below the second")
        starts, ends = self.mask_annealing_starts, self.mask_annealing_ends
        if starts or ends:
            blocks = self.num_blocks
            if [len(starts), len(ends)] != [blocks] * 2 or any(map(operator.ge, starts, ends)):
                raise ConfigError(f"decoder_head.mask_annealing_starts is {list(starts)} and .mask_annealing_ends "
                                  f"{list(ends)}, legal: decoder_head.num_blocks ({blocks}) steps each, every start "
                                  "below its end; or none, to use decoder_head.mask_annealing")


    def _check_size(self) -> None:
        """Of what is legal field by field, and comes from other people's files, but not together."""
        width = self.hidden_dim
        layers = self.enc_layers * (2 * self.enc_ffn + 4 * width) + self.dec_layers * (2 * self.dec_ffn + 8 * width)
        parameters = width * (layers + 2 * self.num_queries)
        if self.type == "m2f" and parameters > MOST_HEAD_PARAMETERS:
            raise ConfigError(f"decoder_head has {parameters / 1e9:.1f} G parameters, legal: at most "
                              f"{MOST_HEAD_PARAMETERS / 1e9:.0f} G; lower hidden_dim, enc_ffn, dec_ffn or the layers")


@dataclass(frozen=True, kw_only=True)
class LoadConfig:
    """Weights that a new run starts from (fine-tuning). A run that is continued reads its own checkpoint instead."""

    weights: str | None = place("file with a trained head: one of our checkpoints, Meta's head (.pth), or a full "
                               "model; null: start from random weights")
    ignore: list[str] = knob([], "patterns of keys that are not loaded and may be missing, unexpected or of another "
                             "shape, e.g. ['*class_embed.*'] for other classes; any other difference is an error")

    def __post_init__(self) -> None:
        if self.ignore and self.weights is None:
            raise ConfigError(f"load.ignore is {list(self.ignore)} and load.weights is not set")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Mask classification loss (m2f). The linear head uses per-pixel cross-entropy and reads none of this."""

    num_points: int = knob(12544, "points sampled per mask", minimum=1, maximum=10000000)
    oversample_ratio: float = knob(3.0, "candidates drawn per kept point", minimum=1, maximum=100)
    importance_sample_ratio: float = knob(0.75, "share of points taken where the mask is most uncertain",
                                          minimum=0, maximum=1)
    mask_coefficient: float = knob(5.0, "weight of the mask cross-entropy", minimum=0)
    dice_coefficient: float = knob(5.0, "weight of the dice loss", minimum=0)
    class_coefficient: float = knob(2.0, "weight of the class cross-entropy", minimum=0)
    no_object_coefficient: float = knob(0.1, "class weight of 'no object'", minimum=0)
    ignore: str = knob("background", "pixels without a label: background of every mask, as in the reference; or "
                       "exclude: left out of matching and losses", choices=("background", "exclude"))
    num_masks_counts: str = knob("matched", "what mask and dice losses are divided by where an image has more classes "
                                 "than decoder_head.num_queries: matched masks, as EoMT's loss; all targets, as "
                                 "transformers'", choices=("matched", "all"))
    matched_gradients: bool = knob(True, "let only matched queries carry gradients through masks: the same gradients, "
                                   "with less memory and time")

    def __post_init__(self) -> None:
        if not any((self.mask_coefficient, self.dice_coefficient, self.class_coefficient)):
            raise ConfigError("loss.mask_coefficient, loss.dice_coefficient and loss.class_coefficient are all 0, "
                              "legal: at least one above 0, or nothing is left to match and train by")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, its schedule and gradient clipping."""

    lr: float = knob(1e-4, "peak learning rate", minimum=0)
    betas: list[float] = knob([0.9, 0.999], "AdamW moment decay rates", minimum=0, maximum=1)
    weight_decay: float = knob(0.05, "weight decay of matrices; norms, biases and embeddings get none", minimum=0)
    decay_all: bool = knob(False, "apply weight decay to every parameter, as the reference's linear recipe does")
    clip_grad_norm: float | None = knob(0.01, "largest gradient norm over all parameters; null: no clipping", minimum=0)
    schedule: str = knob("poly", "poly: (1 - step/total)^power from the first step, times a linear warm-up; "
                         "poly_after_warmup: the decay begins where the warm-up ends, as in EoMT's recipes; one_cycle: "
                         "the reference's linear recipe", choices=("poly", "poly_after_warmup", "one_cycle"))
    power: float = knob(0.9, "poly: exponent", minimum=0)
    warmup_steps: int = knob(1500, "steps of linear warm-up", minimum=0)
    backbone_warmup_steps: int = knob(0, "poly schedules, trainable backbone: hold the ViT for warmup_steps, then "
                                      "warm it up in so many; 0: together with the head", minimum=0)
    layer_decay: float = knob(1.0, "trainable backbone: learning rate of each ViT block as a fraction of the next "
                              "block's; 1: all alike", minimum=0.01, maximum=1)

    def __post_init__(self) -> None:
        if len(self.betas) != 2 or max(self.betas) >= 1:
            raise ConfigError(f"optimizer.betas is {self.betas}, legal: two numbers from 0 to below 1")
        if self.backbone_warmup_steps and self.schedule == "one_cycle":
            raise ConfigError(f"optimizer.backbone_warmup_steps is {self.backbone_warmup_steps}, legal with schedule "
                              f"{self.schedule}: 0")


@dataclass(frozen=True, kw_only=True)
class TrainSection:
    """The loop. A step is one optimiser update on `global_batch_size` crops, whatever the number of ranks."""

    total_steps: int = knob(40000, "optimiser steps of the whole run", minimum=1)
    global_batch_size: int = knob(16, "crops per optimiser step over all ranks and accumulation", minimum=1)
    micro_batch_size: int = knob(2, "crops per forward pass on one device; accumulation follows from it", minimum=1)
    precision: str = knob("auto", "auto: bf16 autocast on CUDA devices that have it, else float32",
                          choices=("auto", "bf16", "fp32"))
    gradient_checkpointing: bool = knob(False, "compute layers again in the backward pass instead of keeping their "
                                        "activations: less memory, about a third more time")
    compile: bool = knob(False, "run the head through torch.compile: faster steps after a minute or more of compiling "
                         "at the start; needs a C++ compiler")
    log_every: int = knob(50, "steps between log lines", minimum=1)
    checkpoint_every: int = knob(1000, "steps between checkpoints", minimum=1)
    checkpoint_dir: str | None = place("folder or s3://, gs://, az:// URL of this run's checkpoints; null: "
                                      "output_dir/checkpoints")
    keep_checkpoints: int = knob(2, "newest checkpoints kept (the best one is kept besides)", minimum=1)
    keep_every: int | None = knob(None, "checkpoints of steps that are multiples of it are kept for good; null: none",
                                  minimum=1)
    on_non_finite: str = knob("stop", "what a step whose loss or gradient is NaN or infinite does, besides leaving a "
                              "record in output_dir/non-finite: stop; skip that step; rollback to the last checkpoint "
                              "and go on without that step", choices=("stop", "skip", "rollback"))
    non_finite_budget: int = knob(3, "on_non_finite skip and rollback: steps that may be left out before the run stops",
                                  minimum=1)
    hang_timeout: float = knob(600.0, "seconds without progress of any rank after which a run is taken to hang, and "
                               "ends", minimum=1)
    eval_every: int = knob(5000, "steps between evaluations; the end is always evaluated, once", minimum=1)
    wandb_project: str | None = place("Weights & Biases project that scalars and pictures go to besides (needs "
                                     "the extra wandb; WANDB_MODE=offline is honoured); null: none")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation and prediction: sliding window and test-time augmentation."""

    mode: str = knob("slide", "slide: overlapping windows; whole: one forward pass per image, its aspect ratio "
                     "kept (the DINOv3 reference squashes it to a square)",
                     choices=("slide", "whole"))
    resize_short_side: int | None = knob(None, "short side in pixels the image is resized to first; null: as it is",
                                         minimum=32, maximum=16384)
    crop_size: int = knob(512, "slide: window side in pixels, a multiple of what the head takes (m2f: 32, linear "
                          "and eomt: 16)", minimum=64, maximum=16384)
    stride: int = knob(341, "slide: step between windows in pixels", minimum=1)
    tta_ratios: list[float] = knob([], "scales of resize_short_side to average over, e.g. [0.9, 1.0, 1.1]; empty: one",
                                   minimum=0.1, maximum=10)
    tta_flip: bool = knob(False, "average with the mirrored image too")
    reference: str | None = knob(None, "evaluate as published: dinov3 (uint8 images resized by Pillow, windows inside "
                                 "the image, bfloat16 scores), eomt (one view that covers crop_size, windows spread "
                                 "evenly, absent classes count as 0 in the mIoU); null: floats, windows padded to a "
                                 "legal size, float32 scores", choices=("dinov3", "eomt"))
    max_images: int | None = knob(None, "evaluate only the first so many images; null: all", minimum=1)
    panels: int = knob(4, "pictures (image, truth, prediction) written per evaluation", minimum=0)

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
    seed: int = knob(0, "seed of initial weights, data order, augmentation and sampled points", minimum=0,
                     maximum=2**62)
    device: str = knob("auto", "where to run: auto takes CUDA when present", choices=("auto", "cpu", "cuda"))
    resume: str = knob("auto", "auto: continue the run in output_dir if it has a checkpoint; never: refuse to touch "
                       "an existing run", choices=("auto", "never"))
    data: DataConfig = knob(DataConfig, "")
    backbone: BackboneConfig = knob(BackboneConfig, "")
    adapter: AdapterConfig = knob(AdapterConfig, "")
    decoder_head: DecoderHeadConfig = knob(DecoderHeadConfig, "")
    load: LoadConfig = knob(LoadConfig, "")
    loss: LossConfig = knob(LossConfig, "")
    optimizer: OptimizerConfig = knob(OptimizerConfig, "")
    train: TrainSection = knob(TrainSection, "")
    eval: EvalConfig = knob(EvalConfig, "")

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
    """Read a run's YAML files with overrides. Raises ConfigError (see `shards.config_file.load_config`)."""
    return load_config(RunConfig, paths, overrides)


def run_config_from_dict(values: dict[str, Any]) -> RunConfig:
    """The configuration stored in a checkpoint, checked like one from a file."""
    return config_from_dict(RunConfig, values, "the checkpoint's configuration")
