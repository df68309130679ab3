"""Settings of the training samples: where they are read from, and how they are drawn and augmented."""

from __future__ import annotations

from dataclasses import dataclass

from shards.cli.settings import place, setting
from shards.crops.drawing import SCALED_SIDES, CropRules
from shards.errors import ConfigError
from shards.sampling import SAMPLINGS


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """A set to train on, beside others."""

    root: str | None = place("folder or URL of the shard set; null: data.root", may_be_empty=False)
    split: str | None = setting(None, "split of it to train on; null: data.train_split", may_be_empty=False)
    weight: float = setting(1.0, "weights of all sources are in the proportion of their training samples", minimum=1e-6,
                            maximum=1e6)
    classes: dict[str, str | None] = setting({}, "its class: class of data.root that its pixels are given, or null: "
                                             "they are ignored. Classes of the same name need no entry")
    unmatched: str = setting("error", "classes of it that data.root lacks and that classes does not list: error; or "
                             "ignore their pixels", choices=("error", "ignore"))


@dataclass(frozen=True, kw_only=True)
class OnlineConfig:
    """Training crops drawn anew in each epoch, at a random scale and place."""

    scaled_side: str | None = setting(None, "null: off. short, for whole images: a crop is drawn as make_shards does, "
                                      "with the short side resized to data.crop_size x U(min_scale, max_scale), as in "
                                      "DINOv3's recipes; long: the long side, as in EoMT's; stored, for stored crops "
                                      "larger than data.crop_size: their pixels are resized by U(min_scale, max_scale)",
                                      choices=SCALED_SIDES)
    min_scale: float = setting(0.5, "smallest scale; for scaled_side stored at least data.crop_size / stored size, "
                               "or crops are padded", minimum=0.05, maximum=20)
    max_scale: float = setting(2.0, "largest scale", minimum=0.05, maximum=20)
    cat_max_ratio: float | None = setting(0.75, "redraw a crop while one class covers at least this fraction of its "
                                          "labelled pixels; null: only while it has no labelled pixel", minimum=0,
                                          maximum=1)
    tries: int = setting(10, "redraws before the last crop is kept", minimum=1, maximum=1000)
    reduced_decoding: bool = setting(False, "decode a JPEG at a half, quarter or eighth of its size where a crop needs "
                                     "no more: faster with large photographs, slightly different pixels")
    resample_on: str = setting("worker", "where pixels are resized to the crop: on the loader's workers; or on the "
                               "training device, to the same pixels; workers then send those of the source",
                               choices=("worker", "device"))

    def __post_init__(self) -> None:
        if self.min_scale > self.max_scale:
            raise ConfigError(f"data.online.min_scale is {self.min_scale}, legal: at most data.online.max_scale "
                              f"({self.max_scale})")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the shards are, and how a worker turns a stored crop into a training sample."""

    root: str | None = place("folder of the shard set (the one that holds manifest.json), or its s3://, gs://, az:// "
                             "or https:// URL")
    train_split: str = setting("train", "split of the shard set to train on")
    val_split: str = setting("val", "split of the shard set to evaluate on")
    sources: list[SourceConfig] = setting([], "sets to train on, mixed by weight; data.root stays the one whose "
                                          "classes are learned, and which is evaluated. Empty: data.root alone")
    workers: int = setting(4, "loader processes per rank; 0: decode in the training process", minimum=0)
    prefetch_batches: int = setting(4, "micro-batches prefetched by each worker", minimum=1)
    targets: str = setting("segment_map", "format in which workers send targets: packed uint8 segment maps, or dense "
                           "{masks, labels} (same results, 10 to 40 times the bytes)",
                           choices=("segment_map", "dense"))
    crop_size: int | None = setting(None, "side in pixels of a random crop taken from each stored sample; null: train "
                                    "on stored crops as they are", minimum=32, maximum=16384)
    online: OnlineConfig = setting(OnlineConfig, "")
    hflip: float = setting(0.5, "probability of flipping a training crop horizontally", minimum=0, maximum=1)
    vflip: float = setting(0.0, "probability of flipping a training crop vertically, for images without an up and a "
                           "down", minimum=0, maximum=1)
    quarter_turns: float = setting(0.0, "probability of turning a training crop by 90, 180 or 270 degrees", minimum=0,
                                   maximum=1)
    rotate: float = setting(0.0, "probability of rotating a training crop by up to rotate_degrees either way; pixels "
                            "from outside it are ignored", minimum=0, maximum=1)
    rotate_degrees: float = setting(15.0, "rotate: largest angle in degrees", minimum=0, maximum=180)
    erase: float = setting(0.0, "probability of hiding a rectangle of a training crop from the network; labels stay",
                           minimum=0, maximum=1)
    erase_area: float = setting(0.33, "erase: largest part of the crop that is hidden; the smallest is 0.02",
                                minimum=0.02, maximum=1)
    transform: str | None = place("your own augmentation, package.module:function (see docs/training.md), of images "
                                  "and segment maps on the training device; null: none", may_be_empty=False)
    photometric: bool = setting(True, "random brightness, contrast, saturation and hue (on the training device)")
    hue_degrees: float = setting(180.0, "photometric: maximum hue shift in degrees, either way; 180, as in DINOv3's "
                                 "linear recipe, allows any hue; EoMT's recipe uses 18", minimum=0, maximum=180)
    lanes: int = setting(128, "sections of an epoch from which batches draw their samples in turn; each span is read "
                         "by a single worker only if micro_batch_size x ranks x workers divides this number",
                         minimum=1)
    span_samples: int = setting(16, "consecutive samples that are fetched in one read", minimum=1)
    sampling: str = setting("none", "repeat samples of rare classes within an epoch: repeat_factor, as for LVIS; "
                            "class_balanced: all classes equally often, in an epoch of the same length; none: every "
                            "sample once", choices=SAMPLINGS)
    sampling_threshold: float = setting(0.001, "sampling repeat_factor: share of samples below which a class is rare",
                                        minimum=0, maximum=1)
    read_ahead_mb: int = setting(256, "object storage: read-ahead buffer of each worker, in MiB; it should hold lanes "
                                 "/ (ranks x workers) spans", minimum=1)
    cache_dir: str | None = place("object storage: folder on the node's local disk in which downloaded bytes are "
                                  "cached; null: no cache")
    cache_gb: float = setting(100.0, "size limit of cache_dir, in GB", minimum=0.001)
    tries: int = setting(8, "object storage: attempts before a read fails, with growing pauses in between", minimum=1)
    timeout: float = setting(30.0, "object storage: seconds after which a request times out and is retried",
                             minimum=0.1)
    on_corrupt: str = setting("fail", "what to do with a corrupt training sample: fail, or skip it and use the next "
                              "sample of its global batch instead", choices=("fail", "skip"))
    corrupt_budget: int = setting(10, "on_corrupt skip: samples that each rank may skip before the run fails; a "
                                  "resumed run starts counting from 0", minimum=1)

    def __post_init__(self) -> None:
        if self.online.scaled_side is not None and self.crop_size is None:
            raise ConfigError("data.crop_size is not set, but data.online.scaled_side is "
                              f"{self.online.scaled_side}; set it to the side of the crops to train on, such as 512")
        if self.transform is not None and self.targets != "segment_map":
            raise ConfigError(f"data.targets is {self.targets}, legal with data.transform: segment_map")

    @property
    def crop_rules(self) -> CropRules | None:
        """How crops are drawn in each epoch; None if stored samples are trained on without rescaling."""
        online = self.online
        if online.scaled_side is None or self.crop_size is None:
            return None
        return CropRules(window=self.crop_size, size=self.crop_size, scaled_side=online.scaled_side,
                         min_scale=online.min_scale, max_scale=online.max_scale, cat_max_ratio=online.cat_max_ratio,
                         tries=online.tries)
