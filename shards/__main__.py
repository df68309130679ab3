"""`python -m shards info|verify|show|audit|copy <root>`: inspect, check or copy a shard set.

<root> is a folder or an s3://, gs://, az:// or https:// URL.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from shards.audit import audit
from shards.cli.command_line import run_entry_point
from shards.errors import ConfigError, MaskStreamError
from shards.manifest import Manifest, SplitInfo, load_manifest
from shards.mirror import bytes_of, copy_set
from shards.picture import contact_sheet, overlay, save_picture
from shards.plan import LANES, SPAN_SAMPLES, TrainPlan
from shards.reader import ShardReader
from shards.shown_text import shown
from shards.verify import verify
from shards.workers import default_workers


def main() -> int:
    prog = sys.argv[0] if sys.argv[0].startswith("maskstream ") else "python -m shards"
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="print splits, sizes and classes")
    check = commands.add_parser("verify", help="read and check every byte and every sample; exit code 1 if any is bad")
    show = commands.add_parser("show", help="write a contact sheet of samples, each with its mask overlay")
    audited = commands.add_parser("audit", help="simulate an epoch across ranks and workers; exit code 1 unless every "
                                  "sample is seen exactly once")
    mirror = commands.add_parser("copy", help="copy the set to another folder or URL; rerun to resume")
    for command in (info, check, show, audited, mirror):
        command.add_argument("root", help="folder or URL that holds manifest.json")
    mirror.add_argument("destination", help="folder or URL to copy to")
    audited.add_argument("--split", default="train", help="split to simulate (default: train)")
    audited.add_argument("--seed", type=int, default=0, help="seed of the shuffling (default: 0)")
    for name, default, meaning in (("ranks", 1, "ranks"), ("workers", 1, "loader processes per rank"),
                                   ("batch", 2, "samples per micro-batch"), ("accumulation", 1, "micro-batches per "
                                   "rank and step"), ("lanes", LANES, "same as data.lanes"),
                                   ("span-samples", SPAN_SAMPLES, "same as data.span_samples")):
        audited.add_argument(f"--{name}", type=_at_least_one, default=default, help=f"{meaning} (default: {default})")
    check.add_argument("--deep", action="store_true", help="also decode every sample; this is the default")
    check.add_argument("--hashes", action="store_true", help="compare hashes only, without decoding samples")
    check.add_argument("--workers", type=_at_least_one, default=default_workers(),
                       help="processes (default: one per CPU)")
    show.add_argument("--split", default=None, help="split to show (default: the first one)")
    show.add_argument("--count", type=int, default=12, help="number of samples to show (default: 12)")
    show.add_argument("--first", type=int, default=0, help="index of the first sample (default: 0)")
    show.add_argument("--output", default="contact-sheet.png", help="image file to write (default: contact-sheet.png)")
    arguments = parser.parse_args()
    if arguments.command == "verify":
        return _verify(arguments.root, not arguments.hashes, arguments.workers)
    if arguments.command == "show":
        return _show(arguments)
    if arguments.command == "audit":
        return _audit(arguments)
    if arguments.command == "copy":
        return _copy(arguments.root, arguments.destination)
    return _info(arguments.root)


def _info(root: str) -> int:
    manifest = load_manifest(root)
    print(f"{shown(manifest.dataset)}: {manifest.num_classes} classes, format {manifest.format_version}, "
          f"config {manifest.config_hash[:12]}, seed {manifest.seed}")
    for name, split in manifest.splits.items():
        _print_split(name, split, manifest)
    return 0


def _print_split(name: str, split: SplitInfo, manifest: Manifest) -> None:
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
    print("  most frequent classes (share of labelled pixels, samples):")
    for class_id in np.argsort(split.class_pixels)[::-1][:10]:
        if split.class_pixels[class_id]:
            share = split.class_pixels[class_id] / split.labelled_pixels
            print(f"    {class_id:5d} {manifest.classes[class_id].name:30s} {share:6.1%} "
                  f"{split.class_samples[class_id]:8d}")


def _verify(root: str, deep: bool, workers: int) -> int:
    try:
        total = sum(split.shards for split in load_manifest(root).splits.values())
    except MaskStreamError:  # verify() below reports it; this only sizes the progress bar
        total = 0
    with tqdm(total=total, unit="shard", disable=None) as bar:
        problems = verify(root, lambda shard: bar.update(), deep=deep, workers=workers)
    for problem in problems:
        print(f"problem: {shown(problem)}")
    print(f"{shown(root)}: {f'{len(problems)} problems' if problems else 'sound'}")
    return 1 if problems else 0


def _audit(arguments: argparse.Namespace) -> int:
    reader = ShardReader(arguments.root, arguments.split)
    plan = TrainPlan(reader.table.samples, arguments.batch, arguments.seed,
                     arguments.lanes, arguments.span_samples)
    with tqdm(total=len(reader), unit="sample", disable=None) as bar:
        found = audit(reader, plan, arguments.ranks, arguments.workers, arguments.accumulation,
                      lambda sample: bar.update())
    reader.close()
    print(f"split {arguments.split!r}, epoch 0, seed {arguments.seed}: {found.samples} samples, "
          f"{arguments.ranks} ranks x {arguments.workers} workers, {found.micro_batches[0]} micro-batches of "
          f"{arguments.batch} per rank")
    print(f"{found.spans} spans of consecutive samples, {found.shared_spans} of them read by more than one worker")
    if found.is_exact:
        print(f"each of {found.samples} samples seen once")
        return 0
    missing = found.samples - len(found.seen)
    repeated = sum(count > 1 for count in found.seen.values())
    same_key = sum(count > 1 for count in found.keys.values())
    print(f"problem: {missing} samples never seen, {repeated} seen more than once, {same_key} keys seen more than "
          f"once, micro-batches per rank {found.micro_batches}")
    return 1


def _copy(root: str, destination: str) -> int:
    manifest = load_manifest(root)
    total = bytes_of(manifest)
    with tqdm(total=total, unit="B", unit_scale=True, disable=None, desc="copying") as bar:
        copied = copy_set(root, destination, lambda file: bar.update(file.bytes))
    print(f"{shown(destination)}: complete, {copied} files copied, all verified ({total / 1e6:.1f} MB)")
    return 0


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text[:9]) < 1:
        raise argparse.ArgumentTypeError(f"{text[:80]!r}, legal: a whole number of at least 1")
    return int(text)


def _show(arguments: argparse.Namespace) -> int:
    output = Path(arguments.output)
    if output.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise ConfigError(f"--output is {output}, legal: a .png or .jpg file")
    manifest = load_manifest(arguments.root)
    split = arguments.split or next(iter(manifest.splits))
    reader = ShardReader(arguments.root, split, manifest)
    if not 0 <= arguments.first < len(reader) or arguments.count < 1:
        raise ConfigError(f"--first {arguments.first} --count {arguments.count}, legal: --first from 0 to "
                          f"{len(reader) - 1} and --count at least 1")
    colors = [item.color for item in manifest.classes]
    pictures, captions = [], []
    for number in range(arguments.first, min(arguments.first + arguments.count, len(reader))):
        sample = reader.read(number)
        pictures += [sample.image, overlay(sample.image, sample.label_map(), colors)]
        names = ", ".join(manifest.classes[label].name.split(",")[0] for label in sample.labels.tolist())
        captions.append(f"{sample.key}: {names}"[:80])
    reader.close()
    output.parent.mkdir(parents=True, exist_ok=True)
    save_picture(contact_sheet([pictures[i : i + 2] for i in range(0, len(pictures), 2)], captions), output)
    print(f"wrote {output}: {len(captions)} samples of split {split!r}")
    return 0


if __name__ == "__main__":
    run_entry_point(main)
