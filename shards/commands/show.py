"""`python -m shards show`: a contact sheet of samples."""

from __future__ import annotations

import argparse
from pathlib import Path

from tqdm import tqdm

from shards.commands.arguments import at_least_one, picture_file, whole_number
from shards.errors import ConfigError
from shards.looking.selection import Chosen, Filter, choose, choose_worst, class_of, split_of_scores
from shards.looking.sheet import legend_sheet, sample_row
from shards.manifest import load_manifest
from shards.picture import save_picture
from shards.reader import ShardReader
from shards.sample import CropSample

_MOST = 100  # samples; a sheet of more is too tall for most viewers

DESCRIPTION = """Write a contact sheet: each sample's image, the image under its class colours, and a legend of its
classes with their shares of the pixels. Without filters, the first samples are shown, in storage order. --class and
--key read samples one after another (whole, and verified, but no pixels are decoded) until enough are found, so the
time they take depends on how rare the samples are; the output says how many were read."""


def add_show(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    show = commands.add_parser("show", help="write a contact sheet of samples, with overlays and legends",
                               description=DESCRIPTION)
    show.set_defaults(run=run)
    show.add_argument("root", help="folder or URL that holds manifest.json")
    show.add_argument("--split", default=None, help="split to show (default: the first one; with --worst, the "
                      "evaluation's)")
    show.add_argument("--output", default="contact-sheet.png",
                      help="image file to write, .png or .jpg (default: contact-sheet.png)")
    show.add_argument("--count", "--number", type=at_least_one, default=12,
                      help=f"number of samples to show, at most {_MOST} (default: 12)")
    show.add_argument("--first", type=whole_number, default=0,
                      help="number of the first sample to look at (default: 0)")
    show.add_argument("--class", dest="classes", metavar="CLASS", action="append", default=[],
                      help="only samples that contain this class, given by name or id; repeat it for samples that "
                      "contain several classes together")
    show.add_argument("--key", dest="keys", metavar="KEY", action="append", default=[],
                      help="only samples with this key; *, ? and [] match as in a shell, and * also matches /; may be "
                      "repeated, for samples with any of the keys")
    show.add_argument("--worst", metavar=("EVALUATION", "N"), nargs="+", default=None,
                      help="the samples of lowest mIoU in an evaluation, worst first: a folder that trainer/eval.py "
                      "wrote, or its images.jsonl; N is the same as --count N")


def run(arguments: argparse.Namespace) -> int:
    """Write the sheet; exit code 1 when no sample passes the filters."""
    output = picture_file("--output", arguments.output)
    evaluation, count = _worst(arguments)
    if count > _MOST:
        raise ConfigError(f"--count is {count}, legal: 1 to {_MOST}")
    manifest = load_manifest(arguments.root)
    wanted = Filter(classes=[class_of(text, manifest) for text in arguments.classes], keys=arguments.keys)
    split = arguments.split or (split_of_scores(evaluation) if evaluation else next(iter(manifest.splits)))
    reader = ShardReader(arguments.root, split, manifest)
    if arguments.first >= max(1, len(reader)):
        raise ConfigError(f"--first is {arguments.first}, legal: 0 to {len(reader) - 1} in split {split!r}")
    with tqdm(total=len(reader) - arguments.first, unit="sample", desc="looking", leave=False,
              disable=True if wanted.keeps_all else None) as bar:
        if evaluation is None:
            chosen = choose(reader, wanted, arguments.first, count, bar.update)
        else:
            chosen = choose_worst(reader, wanted, evaluation, count, bar.update)
    looked = "" if wanted.keeps_all else f", after reading {chosen.looked_at} of {len(reader)}"
    if not chosen.numbers:
        others = [name for name, info in manifest.splits.items()
                  if name != split and wanted.classes and all(info.class_samples[number] for number in wanted.classes)]
        hint = f"; --split {' or '.join(others)} has such classes" if others else ""
        print(f"no sample of split {split!r} passes the filters{looked}; nothing written{hint}")
        return 1
    rows = []
    for number in chosen.numbers:
        sample = reader.read(number)
        rows.append(sample_row(sample, manifest.classes, _caption(sample, number, split, chosen), set(wanted.classes)))
    reader.close()
    save_picture(legend_sheet(rows), output)
    print(f"wrote {output}: {len(rows)} samples of split {split!r}{looked}")
    return 0


def _worst(arguments: argparse.Namespace) -> tuple[Path | None, int]:
    """(evaluation, number of samples)"""
    if arguments.worst is None:
        return None, arguments.count
    evaluation, *number = arguments.worst
    if arguments.first:
        raise ConfigError(f"--first {arguments.first} with --worst, legal: one of the two")
    try:
        return Path(evaluation), at_least_one(*number) if number else arguments.count
    except (argparse.ArgumentTypeError, TypeError):
        raise ConfigError(f"--worst is {' '.join(arguments.worst)!r}, legal: an evaluation, optionally followed by a "
                          "number of at least 1; give the shard set before it") from None


def _caption(sample: CropSample, number: int, split: str, chosen: Chosen) -> str:
    size = f"{split} {number}   {sample.key}   {sample.header.width} x {sample.header.height}"
    if number not in chosen.scores:
        return size
    return f"{size}   mIoU {chosen.scores[number].miou:.3f}, accuracy {chosen.scores[number].accuracy:.3f}"
