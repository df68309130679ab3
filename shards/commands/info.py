"""`python -m shards info`: splits, sizes and classes, as text and as a picture."""

from __future__ import annotations

import argparse

import numpy as np

from shards.commands.arguments import picture_file
from shards.looking.histogram import MOST_CLASSES, class_histogram
from shards.manifest import Manifest, SplitInfo, load_manifest
from shards.picture import save_picture
from shards.shown_text import shown

_MOST_FREQUENT = 10


def add_info(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    info = commands.add_parser("info", help="print splits, sizes and classes; --histogram draws the classes",
                               description="Print what a set consists of. Reads the manifest only.")
    info.set_defaults(run=run)
    info.add_argument("root", help="folder or URL that holds manifest.json")
    info.add_argument("--classes", action="store_true",
                      help=f"list all classes with their ids, not only the {_MOST_FREQUENT} most frequent ones")
    info.add_argument("--histogram", metavar="FILE", default=None,
                      help="draw each class's share of pixels and samples, per split, on logarithmic scales, into a "
                      f".png or .jpg file; at most the {MOST_CLASSES} most frequent classes")


def run(arguments: argparse.Namespace) -> int:
    """Print, and draw if asked to."""
    output = None if arguments.histogram is None else picture_file("--histogram", arguments.histogram)
    manifest = load_manifest(arguments.root)
    print(f"{shown(manifest.dataset)}: {manifest.num_classes} classes, format {manifest.format_version}, "
          f"config {manifest.config_hash[:12]}, seed {manifest.seed}")
    for name, split in manifest.splits.items():
        _print_split(name, split, manifest, arguments.classes)
    if output is not None:
        save_picture(class_histogram(manifest), output)
        print(f"\nwrote {output}")
    return 0


def _print_split(name: str, split: SplitInfo, manifest: Manifest, all_classes: bool) -> None:
    megabytes = split.bytes / 1e6
    print(f"\n{name}: {split.samples} {split.kind} from {split.images} images in {split.shards} shards, "
          f"{megabytes:.1f} MB")
    for reason, count in split.skipped_crops.items():
        print(f"  skipped crops: {count} ({shown(reason)})")
    for skipped in split.skipped_images:
        print(f"  skipped image: {shown(skipped['image'])} ({shown(skipped['reason'])})")
    print(f"  ignored pixels: {split.ignored_share:.1%}")
    if split.absent_classes:
        print(f"  classes without a pixel: {len(split.absent_classes)} of {manifest.num_classes}: "
              f"{shown(manifest.names_of(split.absent_classes, 200))}")
    order = np.argsort(split.class_pixels)[::-1]
    if all_classes:
        print("  classes (share of labelled pixels, samples):")
    else:
        print("  most frequent classes (share of labelled pixels, samples):")
        order = np.array([class_id for class_id in order[:_MOST_FREQUENT] if split.class_pixels[class_id]], np.int64)
    for class_id in order.tolist():
        share = split.class_pixels[class_id] / max(1, split.labelled_pixels)
        print(f"    {class_id:5d} {shown(manifest.classes[class_id].name):30s} {share:6.1%} "
              f"{split.class_samples[class_id]:8d}")
