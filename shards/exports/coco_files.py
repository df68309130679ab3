"""Export to COCO's layout: pictures, and one JSON file of run-length masks per split, which pycocotools reads.

    images/SPLIT/NAME.jpg|.png
    annotations/SPLIT.json      info, images, categories, annotations: one per class and image

COCO describes object instances; here each annotation is all pixels of one class in one image, as in COCO-Stuff.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from shards.coco import to_coco_rle
from shards.exports.export import Progress, samples_of
from shards.exports.file_names import file_name
from shards.exports.pictures import exported_image, write_new
from shards.files.atomic import naming
from shards.files.storage import Storage
from shards.files.strict_json import to_json
from shards.manifest import Manifest
from shards.sample import CropSample

MEANING = ("Semantic masks, not instances: each annotation is all pixels of one class in one image. Pixels without an "
           "annotation are ignored (unlabelled). Category ids are class ids, from 0.")


def export_coco(storage: Storage, manifest: Manifest, splits: list[str], folder: Path, progress: Progress) -> None:
    """Write the splits into an empty folder. Raises as `ShardReader.read`, and OSError."""
    (folder / "annotations").mkdir()
    for split in splits:
        (folder / "images" / split).mkdir(parents=True)
        path = folder / "annotations" / f"{split}.json"
        # Annotations go to the file and images to a second one, which is appended: nothing piles up in memory.
        with (naming(path), path.open("x", encoding="utf-8") as out,
              tempfile.TemporaryFile("w+", encoding="utf-8", dir=folder) as images):
            out.write(f'{{"info": {to_json(_info(manifest, split))},\n"licenses": [],\n"categories": [\n')
            out.write(",\n".join(to_json({"id": number, "name": info.name, "supercategory": "", "isthing": 0,
                                          "color": list(info.color)}) for number, info in enumerate(manifest.classes)))
            out.write('\n],\n"annotations": [')
            number = 0  # of annotations; ids begin with 1, as pycocotools takes 0 for "none"
            for image_id, sample in enumerate(samples_of(storage, manifest, split, progress), 1):
                image, suffix = exported_image(sample)
                name = f"{file_name(sample.key)}.{suffix}"
                write_new(folder / "images" / split / name, image)
                _append(images, {"id": image_id, "file_name": name, "width": sample.header.width,
                                 "height": sample.header.height, "key": sample.key}, image_id == 1)
                for annotation in _annotations(sample):
                    number += 1
                    _append(out, {"id": number, "image_id": image_id, **annotation}, number == 1)
            out.write('\n],\n"images": [')
            images.seek(0)
            shutil.copyfileobj(images, out)
            out.write("\n]}\n")


def _info(manifest: Manifest, split: str) -> dict[str, Any]:
    return {"description": f"{manifest.dataset}, split {split}, exported by MaskStream. {MEANING}",
            "version": manifest.sha256, "semantic": True}


def _annotations(sample: CropSample) -> Iterator[dict[str, Any]]:
    segments = sample.segment_map
    for index, rle in enumerate(to_coco_rle(sample.record)):
        mask = segments == index
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        top, left = int(rows[0]), int(columns[0])
        yield {"category_id": rle["category_id"], "iscrowd": 0, "area": int(mask.sum()),
               "bbox": [left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1],
               "segmentation": {"size": rle["size"], "counts": rle["counts"].decode("ascii")}}


def _append(file: IO[str], item: dict[str, Any], is_first: bool) -> None:
    file.write(f"{'' if is_first else ','}\n{to_json(item)}")
