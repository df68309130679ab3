"""Everything the sharding stage can be told, with its default, meaning and unit."""

from __future__ import annotations

from dataclasses import dataclass

from shards.errors import ConfigError
from shards.settings import knob


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """Where the images and label maps are and what their values mean."""

    kind: str = knob("ade20k", "layout of the source (README, 'Your own data')", choices=("ade20k", "camvid", "folder"))
    root: str | None = knob(None, "folder of the dataset; for ade20k also the original .zip, read without unpacking")
    splits: dict[str, str] = knob({}, "our split -> source folder, e.g. {train: training}; empty: the layout's own")
    class_file: str | None = knob(None, "folder: text file, one class per line in id order, optionally followed by a "
                                  "tab and #rrggbb; default <root>/classes.txt")
    reduce_zero_label: bool | None = knob(None, "stored label 0 means 'ignored' and k means class k-1; "
                                          "null: as the layout has it (ade20k yes, others no)")
    ignore_labels: list[int] = knob([], "stored label values that mean 'ignored'; empty: as the layout has it "
                                    "(camvid 11, others 255; with more than 255 classes 65535)")
    exif_orientation: str = knob("refuse", "an image whose EXIF wants it turned: is an error; is turned, as its labels "
                                 "were drawn on the upright view; or stays as stored, as its labels were",
                                 choices=("refuse", "apply", "ignore"))
    val_fraction: float = knob(0.0, "folder without train/val sub-folders: share of images that become 'val'",
                               minimum=0, maximum=0.9)
    limit: int | None = knob(None, "take only the first so many pairs of each split; null: all", minimum=1)


@dataclass(frozen=True, kw_only=True)
class CropConfig:
    """Training crops: random scale, random place, fixed size (the reference's training transform)."""

    splits: list[str] = knob(["train"], "splits cut into crops; all others keep whole images and their bytes")
    size: int = knob(512, "training crop side in pixels; a side of the image is scaled to size x U(min_scale, "
                     "max_scale)", minimum=32, maximum=16384)
    scaled_side: str = knob("short", "which side that is: short, as in DINOv3's recipes; long, as in EoMT's, which "
                            "fits the image inside of the square", choices=("short", "long"))
    stored_size: int | None = knob(None, "side in pixels of the stored window; larger than size lets the trainer crop "
                                   "again at random (data.crop_size); null: size", minimum=32, maximum=16384)
    per_image: int = knob(4, "crops drawn from each image", minimum=1, maximum=1000)
    min_scale: float = knob(0.5, "smallest scaled side, as a multiple of size", minimum=0.05, maximum=20)
    max_scale: float = knob(2.0, "largest scaled side, as a multiple of size", minimum=0.05, maximum=20)
    cat_max_ratio: float | None = knob(0.75, "a crop is redrawn while one class fills this share of its labelled "
                                       "pixels; null: only while it has none", minimum=0, maximum=1)
    tries: int = knob(10, "redraws before the last crop is kept", minimum=1)
    jpeg_quality: int = knob(95, "JPEG quality of stored crops", minimum=1, maximum=100)

    def __post_init__(self) -> None:
        if self.min_scale > self.max_scale:
            raise ConfigError(f"crops.min_scale is {self.min_scale}, legal: at most crops.max_scale ({self.max_scale})")
        if self.window < self.size:
            raise ConfigError(f"crops.stored_size is {self.stored_size}, legal: at least crops.size ({self.size})")

    @property
    def window(self) -> int:
        """Side of the stored crop in pixels."""
        return self.stored_size if self.stored_size is not None else self.size


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """One sharding job: the root of the configuration."""

    output: str | None = knob(None, "folder of the shard set to write, or its s3://, gs:// or az:// URL")
    staging: str = knob(".staging", "output is a URL: folder in which the set is made before it is uploaded")
    dataset: DatasetConfig = knob(DatasetConfig, "")
    crops: CropConfig = knob(CropConfig, "")
    images_per_shard: int = knob(500, "source images per block; a block yields one shard per crop number", minimum=1)
    seed: int = knob(0, "seed of the crops", minimum=0, maximum=2**62)
    workers: int | None = knob(None, "processes; null: one per CPU (never changes the result)", minimum=1)
    warn_ignored: float = knob(0.5, "warn when more than this share of a split's pixels is ignored (padding of crops "
                               "included)", minimum=0, maximum=1)
    on_error: str = knob("fail", "an unusable source image stops the job, or is recorded in the manifest and skipped",
                         choices=("fail", "skip"))
