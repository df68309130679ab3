"""Turn a folder of images and label PNGs into a shard set.

example: python preprocess/make_shards.py --dataset ade20k --root ADEChallengeData2016 --output shards-ade20k
"""

from __future__ import annotations

import sys
from argparse import ArgumentTypeError, Namespace
from typing import Any

try:
    from preprocess.config import PreprocessConfig
    from preprocess.dry_run import print_dry_run
    from preprocess.pairs import open_dataset
    from preprocess.pipeline import Part, finish, write_part, write_shards
    from preprocess.publish import label_warnings
    from shards.cli.command_line import add_overrides, config_files, config_parser, run_entry_point
    from shards.cli.config_file import load_config
    from shards.manifest import Manifest
    from shards.shown_text import masked_value, shown
except ImportError as error:
    raise SystemExit(f"error: {error}; is MaskStream installed (pip install -e .), or does another package named "
                     "shards or preprocess shadow it?") from None

DEFAULT_RECIPE = "ade20k-shards"
_LONGEST_PART = 40  # characters of I/N


def main() -> int:
    config, arguments = _parse()
    dataset = open_dataset(config.dataset, config.on_error)
    output = masked_value(str(config.output))
    if arguments.dry_run:
        print_dry_run(config, dataset)
        return 0
    part: Part | None = arguments.part
    if part is not None and not arguments.finish:
        images = write_part(config, dataset, part)
        print(f"{output}: part {part.number} of {part.total} is there, {images} images; once all parts are, run the "
              "same command with --finish")
        return 0
    manifest, written = (finish(config, dataset, part.total if part else None) if arguments.finish else
                         write_shards(config, dataset))
    print(f"{output}: {'written' if written else 'already complete, nothing to do'}")
    _print_report(manifest, output)
    for warning in label_warnings(manifest, config.warn_ignored):
        print(f"warning: {shown(warning)}", file=sys.stderr)
    return 0


def _parse() -> tuple[PreprocessConfig, Namespace]:
    parser = config_parser(str(__doc__), PreprocessConfig, DEFAULT_RECIPE)
    parser.add_argument("--dataset", default=None, help="dataset layout, such as ade20k or folder (dataset.kind)")
    parser.add_argument("--root", default=None, help="dataset folder, or a .zip of it (dataset.root)")
    parser.add_argument("--output", default=None, help="folder or URL of the shard set to write (output)")
    parser.add_argument("--workers", type=int, default=None, help="worker processes; 0: none; default: one per "
                        "CPU (workers)")
    parser.add_argument("--on-error", default=None, help="on an unusable image: fail or skip it (on_error)")
    parser.add_argument("--dry-run", action="store_true", help="print settings, counts, label mapping and one sample; "
                        "write nothing")
    parser.add_argument("--part", type=_part, metavar="I/N", help="write only part I of N, counted from 0; parts run "
                        "anywhere, in any order, at the same time or again")
    parser.add_argument("--finish", action="store_true", help="when all parts are there: write the manifest")
    add_overrides(parser)
    arguments = parser.parse_intermixed_args()
    config = load_config(PreprocessConfig, config_files(arguments), arguments.overrides, _named(arguments))
    return config, arguments


def _part(text: str) -> Part:
    number, slash, count = text.partition("/")
    is_short = len(text) <= _LONGEST_PART
    if not (slash and is_short and number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise ArgumentTypeError(f"{text[:_LONGEST_PART]!r}, legal: I/N with I from 0 to N-1, such as 0/16")
    return Part(int(number), int(count))


def _named(arguments: Namespace) -> dict[str, Any]:
    """The named options given on the command line, keyed by the setting each one sets."""
    named = {
        "dataset.kind": arguments.dataset, "dataset.root": arguments.root, "output": arguments.output,
        "workers": arguments.workers, "on_error": arguments.on_error,
    }
    return {key: value for key, value in named.items() if value is not None}


def _print_report(manifest: Manifest, output: str) -> None:
    for name, split in manifest.splits.items():
        skipped = sum(split.skipped_crops.values())
        print(f"  {name}: {split.samples} {split.kind} from {split.images} images, {split.shards} shards, "
              f"{split.bytes / 1e6:.1f} MB; skipped {skipped} crops, {len(split.skipped_images)} files")
    print(f"inspect it:  python -m shards show {output}\ncheck it:    python -m shards verify {output}")


if __name__ == "__main__":
    run_entry_point(main)
