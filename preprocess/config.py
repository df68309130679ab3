"""Everything the sharding stage can be told, with its default, meaning and unit."""

from __future__ import annotations

from dataclasses import dataclass

from shards.cli.settings import setting
from shards.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """Where the images and label maps are and what their values mean."""

    kind: str = setting("ade20k", "layout of the source (README, 'Your own data')",
                        choices=("ade20k", "camvid", "folder"))
    root: str | None = setting(None, "folder of the dataset; for ade20k also the original .zip, read without "
                               "unpacking")
    splits: dict[str, str] = setting({}, "our split -> source folder, e.g. {train: training}; empty: the layout's own")
    class_file: str | None = setting(None, "folder: text file, one class per line in id order, optionally followed by "
                                     "a tab and #rrggbb; default <root>/classes.txt")
    reduce_zero_label: bool | None = setting(None, "stored label 0 means 'ignored' and k means class k-1; null: as the "
                                             "layout has it (ade20k yes, others no)")
    ignore_labels: list[int] = setting([], "stored label values that mean 'ignored'; empty: as the layout has it "
                                       "(camvid 11, others 255; with more than 255 classes 65535)")
    exif_orientation: str = setting("refuse", "an image whose EXIF wants it turned: is an error; is turned, as its "
                                    "labels were drawn on the upright view; or stays as stored, as its labels were",
                                    choices=("refuse", "apply", "ignore"))
    val_fraction: float = setting(0.0, "folder without train/val sub-folders: share of images that become 'val'",
                                  minimum=0, maximum=0.9)
    limit: int | None = setting(None, "take only the first so many pairs of each split; null: all", minimum=1)


@dataclass(frozen=True, kw_only=True)
class CropConfig:
    """Training crops: random scale, random place, fixed size (the reference's training transform)."""

    splits: list[str] = setting(["train"], "splits cut into crops; all others keep whole images and their bytes")
    size: int = setting(512, "training crop side in pixels; a side of the image is scaled to size x U(min_scale, "
                        "max_scale)", minimum=32, maximum=16384)
    scaled_side: str = setting("short", "which side that is: short, as in DINOv3's recipes; long, as in EoMT's, which "
                               "fits the image inside of the square", choices=("short", "long"))
    stored_size: int | None = setting(None, "side in pixels of the stored window; larger than size lets the trainer "
                                      "crop again at random (data.crop_size); null: size", minimum=32, maximum=16384)
    per_image: int = setting(4, "crops drawn from each image", minimum=1, maximum=1000)
    min_scale: float = setting(0.5, "smallest scaled side, as a multiple of size", minimum=0.05, maximum=20)
    max_scale: float = setting(2.0, "largest scaled side, as a multiple of size", minimum=0.05, maximum=20)
    cat_max_ratio: float | None = setting(0.75, "a crop is redrawn while one class fills this share of its labelled "
                                          "pixels; null: only while it has none", minimum=0, maximum=1)
    tries: int = setting(10, "redraws before the last crop is kept", minimum=1)
    jpeg_quality: int = setting(95, "JPEG quality of stored crops", minimum=1, maximum=100)

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

    output: str | None = setting(None, "folder of the shard set to write, or its s3://, gs:// or az:// URL")
    staging: str = setting(".staging", "output is a URL: folder in which the set is made before it is uploaded")
    dataset: DatasetConfig = setting(DatasetConfig, "")
    crops: CropConfig = setting(CropConfig, "")
    images_per_shard: int = setting(500, "source images per block; a block yields one shard per crop number",
                                    minimum=1)
    seed: int = setting(0, "seed of the crops", minimum=0, maximum=2**62)
    workers: int | None = setting(None, "processes; null: one per CPU (never changes the result)", minimum=1)
    warn_ignored: float = setting(0.5, "warn when more than this share of a split's pixels is ignored (padding of "
                                  "crops included)", minimum=0, maximum=1)
    on_error: str = setting("fail", "an unusable source image stops the job, or is recorded in the manifest and "
                            "skipped", choices=("fail", "skip"))
