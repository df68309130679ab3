"""Export to the `folder` layout, which preprocess/make_shards.py reads back.

    classes.txt                   name<tab>#rrggbb, in id order
    images/SPLIT/NAME.jpg|.png    the stored images
    annotations/SPLIT/NAME.png    class ids in the class colours (`label_png`)
"""

from __future__ import annotations

from pathlib import Path

from shards.exports.export import Progress, samples_of
from shards.exports.file_names import file_name
from shards.exports.pictures import exported_image, label_png, write_new
from shards.files.storage import Storage
from shards.manifest import Manifest


def export_pngs(storage: Storage, manifest: Manifest, splits: list[str], folder: Path, progress: Progress) -> None:
    """Write the splits into an empty folder. Raises as `ShardReader.read`, and OSError."""
    for split in splits:
        for top in ("images", "annotations"):
            (folder / top / split).mkdir(parents=True)
        for sample in samples_of(storage, manifest, split, progress):
            name = file_name(sample.key)
            image, suffix = exported_image(sample)
            write_new(folder / "images" / split / f"{name}.{suffix}", image)
            write_new(folder / "annotations" / split / f"{name}.png", label_png(sample.label_map(), manifest.classes))
    lines = [f"{info.name}\t#{bytes(info.color).hex()}\n" for info in manifest.classes]
    write_new(folder / "classes.txt", "".join(lines).encode())
