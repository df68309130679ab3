"""Settings of the sharding stage: default, meaning and unit."""

from __future__ import annotations

from dataclasses import dataclass

from shards.cli.settings import setting
from shards.crops.drawing import CropRules
from shards.errors import ConfigError
from shards.rle import MAX_CLASSES

KINDS = ("ade20k", "ade20k-full", "camvid", "cityscapes", "cityscapes-trainids", "coco-instances", "coco-panoptic",
         "coco-stuff", "loveda", "mapillary-v1.2", "mapillary-v2.0", "pascal-context", "voc", "folder", "labelme",
         "yolo", "huggingface")  # the layouts in preprocess/layouts/registry.py
WITH_TEMPLATES = ("folder", "labelme", "yolo", "huggingface")  # which have no official folders


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """Location of the images and label maps, and the meaning of label values."""

    kind: str = setting("ade20k", "dataset layout (see docs/your-data.md)", choices=KINDS)
    root: str | None = setting(None, "dataset folder, or a .zip of it, read without unpacking; for huggingface "
                                "also the id of a dataset on the hub", may_be_empty=False)
    splits: dict[str, str] = setting({}, "split name -> source folder, e.g. {train: training}; empty: the layout's "
                                     "default splits")
    images: str | None = setting(None, "for kind=folder, labelme or yolo: file-name template of the images below root, "
                                 "such as leftImg8bit/{split}/{stem}_leftImg8bit.png; for huggingface: name of the "
                                 "column of images; null: the layout's, such as images/{split}/{stem}",
                                 may_be_empty=False)
    labels: str | None = setting(None, "template of the label files, with the same fields as images, or "
                                 "column of label images; null: the layout's", may_be_empty=False)
    class_file: str | None = setting(None, "text file with one class per line in id order, optionally followed by a "
                                     "tab and #rrggbb; or a YAML class table, which also says which stored ids, names "
                                     "or colours mean each class; null: the layout's own classes (for kind=folder, "
                                     "<root>/classes.txt)", may_be_empty=False)
    reduce_zero_label: bool | None = setting(None, "treat stored label 0 as ignored and label k as class k-1; null: "
                                             "the layout's default (true for ade20k and loveda, else false)")
    ignore_labels: list[int] = setting([], "stored label values to ignore; empty: the layout's default (11 for camvid, "
                                       "else 255, or 65535 with more than 255 classes)", minimum=0, maximum=MAX_CLASSES)
    exif_orientation: str = setting("refuse", "what to do with a rotated image (EXIF orientation): refuse it with an "
                                    "error; apply the rotation, if labels were drawn on the upright view; or ignore "
                                    "the tag, if they were drawn on the pixels as stored",
                                    choices=("refuse", "apply", "ignore"))
    image_range: list[float] = setting([], "for images of more than 8 bits: the two stored values that become 0 and "
                                       "255, such as [0, 4095]; empty: refuse such images")
    image_bands: list[int] = setting([], "for images with other bands than grey or RGB: the bands, counted from 1, to "
                                     "use as red, green and blue, or one as grey; empty: refuse such images",
                                     minimum=1, maximum=65535)
    val_fraction: float = setting(0.0, "for sources without split folders: fraction of the images to move to 'val'",
                                  minimum=0, maximum=0.9)
    limit: int | None = setting(None, "use only the first N pairs of each split; null: all", minimum=1)

    def __post_init__(self) -> None:
        for name in ("images", "labels"):
            if getattr(self, name) == "":
                raise ConfigError(f"dataset.{name} is empty, legal: a template, or null for the layout's")
        if (self.images is None) != (self.labels is None) or (
                self.images is not None and self.kind not in WITH_TEMPLATES):
            raise ConfigError(f"dataset.images is {self.images!r}, dataset.labels {self.labels!r} and dataset.kind "
                              f"{self.kind}, legal: both, with kind {', '.join(WITH_TEMPLATES)}, or none")
        if self.image_range and not (len(self.image_range) == 2 and self.image_range[0] < self.image_range[1]):
            raise ConfigError(f"dataset.image_range is {self.image_range}, legal: [low, high] with low < high")
        if self.image_bands and not (len(self.image_bands) in (1, 3) and min(self.image_bands) >= 1):
            raise ConfigError(f"dataset.image_bands is {self.image_bands}, legal: three bands, or one, counted from 1")


@dataclass(frozen=True, kw_only=True)
class CropConfig:
    """Training crops: random scale, random position, fixed size (the reference's training transform)."""

    splits: list[str] = setting(["train"], "splits to cut into crops; all others keep whole images, byte for byte")
    size: int = setting(512, "training crop size in pixels; one side of the image (see scaled_side) is resized to size "
                        "x U(min_scale, max_scale)", minimum=32, maximum=16384)
    scaled_side: str = setting("short", "which side is resized: short, as in DINOv3's recipes; long, as in EoMT's, "
                               "which fits the image inside the square", choices=("short", "long"))
    stored_size: int | None = setting(None, "side in pixels of the stored crop; make it larger than size to let the "
                                      "trainer crop again at random (data.crop_size); null: size", minimum=32,
                                      maximum=16384)
    per_image: int = setting(4, "crops per image", minimum=1, maximum=1000)
    min_scale: float = setting(0.5, "smallest resized side, as a multiple of size", minimum=0.05, maximum=20)
    max_scale: float = setting(2.0, "largest resized side, as a multiple of size", minimum=0.05, maximum=20)
    cat_max_ratio: float | None = setting(0.75, "redraw a crop while one class covers at least this fraction of its "
                                          "labelled pixels; null: only while it has no labelled pixel", minimum=0,
                                          maximum=1)
    tries: int = setting(10, "redraws before the last crop is kept", minimum=1, maximum=1000)
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

    @property
    def rules(self) -> CropRules:
        """How crops are drawn."""
        return CropRules(window=self.window, size=self.size, scaled_side=self.scaled_side, min_scale=self.min_scale,
                         max_scale=self.max_scale, cat_max_ratio=self.cat_max_ratio, tries=self.tries)


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig:
    """One sharding job: the root of the configuration."""

    output: str | None = setting(None, "shard set to write: a folder, or an s3://, gs:// or az:// URL")
    staging: str = setting(".staging", "local folder for building the set before upload, when output is a URL")
    dataset: DatasetConfig = setting(DatasetConfig, "")
    crops: CropConfig = setting(CropConfig, "")
    images_per_shard: int = setting(500, "source images per block; a block becomes crops.per_image shards, one per "
                                    "crop number (one shard for whole images)", minimum=1, maximum=1_000_000)
    seed: int = setting(0, "random seed of the crops", minimum=0, maximum=2**62)
    workers: int | None = setting(None, "worker processes; null: one per CPU; 0: none, this process does all (the "
                                  "output does not depend on it)", minimum=0, maximum=4096)
    executor: str = setting("local", "who runs the workers: local, processes of this machine; ray, a Ray cluster (the "
                            "extra 'ray')", choices=("local", "ray"))
    ray_address: str | None = setting(None, "for executor=ray: address of the cluster, such as auto or "
                                      "ray://host:10001; null: start one on this machine", may_be_empty=False)
    warn_ignored: float = setting(0.5, "warn when more than this fraction of a split's pixels is ignored (crop padding "
                                  "counts)", minimum=0, maximum=1)
    on_error: str = setting("fail", "on an unusable source image: fail, or skip it and record it in the manifest",
                            choices=("fail", "skip"))
