"""`python -m shards export`: write a set in other formats."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from shards.exports.coco_files import export_coco
from shards.exports.export import Progress
from shards.exports.folder_of_pngs import export_pngs
from shards.exports.parquet import export_parquet, needs_pyarrow, split_names
from shards.exports.staging import staged_folder
from shards.files.storage import Storage, local_path, open_storage
from shards.manifest import Manifest, load_manifest

Exporter = Callable[[Storage, Manifest, list[str], Path, Progress], None]
FORMATS: dict[str, Exporter] = {"png": export_pngs, "coco": export_coco, "hf": export_parquet}

_HINTS = {
    "png": "\nback to shards, as whole images:  python preprocess/make_shards.py --dataset folder --root {quoted} "
           "--output SET crops.splits=[]",
    "coco": "",
    "hf": "\nload it:  datasets.load_dataset({text!r})",
}

DESCRIPTION = """Write a shard set in another format. Images keep their bytes (one whose EXIF data would make other
programs turn it becomes a PNG of the stored pixels). Keys become file names, in which signs that are not allowed
everywhere are replaced by %XX.

  png   images/SPLIT, annotations/SPLIT (palette PNGs of class ids; 16 bits with more than 255 classes) and classes.txt:
        the layout that make_shards.py --dataset folder reads
  coco  images/SPLIT and annotations/SPLIT.json, one run-length mask per class and image, for pycocotools. These are
        semantic masks, not instances
  hf    data/SPLIT-*.parquet, for datasets.load_dataset(DIR); needs pip install 'maskstream[hf]'

The folder appears when the export is complete: an interrupted one leaves nothing under its name."""


def add_export(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    export = commands.add_parser("export", help="write images and labels as PNG files, COCO or Parquet",
                                 description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    export.set_defaults(run=run)
    export.add_argument("root", help="folder or URL that holds manifest.json")
    export.add_argument("--format", choices=list(FORMATS), required=True, help="what to write, see above")
    export.add_argument("--output", required=True, metavar="DIR", help="a new or empty local folder")
    export.add_argument("--split", dest="splits", metavar="SPLIT", action="append", default=[],
                        help="split to export; may be repeated (default: all)")


def run(arguments: argparse.Namespace) -> int:
    """Export the splits."""
    output, storage = local_path(arguments.output, "--output"), open_storage(arguments.root)
    manifest = load_manifest(storage)
    splits = list(dict.fromkeys(arguments.splits)) or list(manifest.splits)
    total = sum(manifest.split(split).samples for split in splits)
    if arguments.format == "hf":
        needs_pyarrow()
        split_names(splits)
    with tqdm(total=total, unit="sample", desc="exporting", disable=None) as bar, staged_folder(output) as folder:
        FORMATS[arguments.format](storage, manifest, splits, folder, bar.update)
    hint = _HINTS[arguments.format].format(quoted=shlex.quote(str(output)), text=str(output))
    print(f"wrote {output}: {total} samples of {', '.join(splits)}{hint}")
    return 0
