"""`python -m shards info|verify|show <root>`: look at a shard set."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from tqdm import tqdm

from shards.command_line import run_entry_point
from shards.errors import ConfigError, MaskStreamError
from shards.manifest import Manifest, SplitInfo, load_manifest
from shards.picture import contact_sheet, overlay
from shards.reader import ShardReader
from shards.verify import verify


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m shards", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="what the set holds: splits, sizes, classes")
    check = commands.add_parser("verify", help="read every byte and every sample; exit code 1 when something is wrong")
    show = commands.add_parser("show", help="write a contact sheet of samples: image, overlay")
    for command in (info, check, show):
        command.add_argument("root", help="folder that holds manifest.json")
    show.add_argument("--split", default=None, help="split to draw from (default: the first one)")
    show.add_argument("--count", type=int, default=12, help="samples on the sheet (default: 12)")
    show.add_argument("--first", type=int, default=0, help="number of the first sample (default: 0)")
    show.add_argument("--output", default="contact-sheet.png", help="picture file (default: contact-sheet.png)")
    arguments = parser.parse_args()
    if arguments.command == "verify":
        return _verify(arguments.root)
    if arguments.command == "show":
        return _show(arguments)
    return _info(arguments.root)


def _info(root: str) -> int:
    manifest = load_manifest(root)
    print(f"{manifest.dataset}: {manifest.num_classes} classes, format {manifest.format_version}, "
          f"config {manifest.config_hash[:12]}, seed {manifest.seed}")
    for name, split in manifest.splits.items():
        _print_split(name, split, manifest)
    return 0


def _print_split(name: str, split: SplitInfo, manifest: Manifest) -> None:
    megabytes = sum(shard.bytes for shard in split.shards) / 1e6
    print(f"\n{name}: {split.samples} {split.kind} from {split.images} images in {len(split.shards)} shards, "
          f"{megabytes:.1f} MB")
    for reason, count in split.skipped_crops.items():
        print(f"  skipped crops: {count} ({reason})")
    for skipped in split.skipped_images:
        print(f"  skipped image: {skipped['image']} ({skipped['reason']})")
    labelled = sum(split.class_pixels)
    print(f"  ignored pixels: {split.ignored_pixels / max(1, split.ignored_pixels + labelled):.1%}")
    print("  most frequent classes (share of labelled pixels, samples):")
    for class_id in np.argsort(split.class_pixels)[::-1][:10]:
        if split.class_pixels[class_id]:
            share = split.class_pixels[class_id] / labelled
            print(f"    {class_id:5d} {manifest.classes[class_id].name:30s} {share:6.1%} "
                  f"{split.class_samples[class_id]:8d}")


def _verify(root: str) -> int:
    try:
        total = sum(len(split.shards) for split in load_manifest(root).splits.values())
    except MaskStreamError:  # verify() below reports it; this only sizes the bar
        total = 0
    with tqdm(total=total, unit="shard", disable=None) as bar:
        problems = verify(root, lambda shard: bar.update())
    for problem in problems:
        print(f"problem: {problem}")
    print(f"{root}: {len(problems)} problems" if problems else f"{root}: sound")
    return 1 if problems else 0


def _show(arguments: argparse.Namespace) -> int:
    output = Path(arguments.output)
    if output.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise ConfigError(f"--output is {output}, legal: a .png or .jpg file")
    manifest = load_manifest(arguments.root)
    split = arguments.split or next(iter(manifest.splits))
    reader = ShardReader(arguments.root, split, manifest)
    if not 0 <= arguments.first < len(reader) or arguments.count < 1:
        raise ConfigError(f"--first {arguments.first} --count {arguments.count}, legal: a first sample from 0 to "
                          f"{len(reader) - 1} and a count of at least 1")
    colors = [item.color for item in manifest.classes]
    pictures, captions = [], []
    for number in range(arguments.first, min(arguments.first + arguments.count, len(reader))):
        sample = reader.read(number)
        pictures += [sample.image, overlay(sample.image, sample.label_map(), colors)]
        names = ", ".join(manifest.classes[label].name.split(",")[0] for label in sample.labels.tolist())
        captions.append(f"{sample.key}: {names}"[:80])
    reader.close()
    output.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet([pictures[i : i + 2] for i in range(0, len(pictures), 2)], captions).save(output)
    print(f"wrote {output}: {len(captions)} samples of split {split!r}")
    return 0


if __name__ == "__main__":
    run_entry_point(main)
