"""`python -m shards COMMAND <root>`: look at a shard set, compare, check, copy or export it.

<root> is a folder or an s3://, gs://, az:// or https:// URL.
"""

from __future__ import annotations

import argparse
import sys

from tqdm import tqdm

from shards.audit import audit
from shards.cli.command_line import run_entry_point
from shards.commands.arguments import at_least_one, number_of_workers, whole_number
from shards.commands.diff import add_diff
from shards.commands.export import add_export
from shards.commands.info import add_info
from shards.commands.show import add_show
from shards.errors import ConfigError, MaskStreamError
from shards.manifest import load_manifest
from shards.mirror import bytes_of, copy_set
from shards.plan import LANES, SPAN_SAMPLES, TrainPlan
from shards.reader import ShardReader
from shards.shown_text import shown
from shards.verify import verify
from shards.workers import default_workers

_MOST_AT_ONCE = 1_000_000  # micro-batches per step in an audit, which looks at each: seconds


def main() -> int:
    prog = sys.argv[0] if sys.argv[0].startswith("maskstream ") else "python -m shards"
    parser = argparse.ArgumentParser(prog=prog, description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    add_info(commands)
    add_show(commands)
    add_diff(commands)
    add_export(commands)
    check = commands.add_parser("verify", help="read and check every byte and every sample; exit code 1 if any is bad")
    audited = commands.add_parser("audit", help="simulate an epoch across ranks and workers; exit code 1 unless every "
                                  "sample is seen exactly once")
    mirror = commands.add_parser("copy", help="copy the set to another folder or URL; rerun to resume")
    for command in (check, audited, mirror):
        command.add_argument("root", help="folder or URL that holds manifest.json")
    mirror.add_argument("destination", help="folder or URL to copy to")
    audited.add_argument("--split", default="train", help="split to simulate (default: train)")
    audited.add_argument("--seed", type=whole_number, default=0, help="seed of the shuffling (default: 0)")
    for name, default, meaning in (("ranks", 1, "ranks"), ("workers", 1, "loader processes per rank"),
                                   ("batch", 2, "samples per micro-batch"), ("accumulation", 1, "micro-batches per "
                                   "rank and step"), ("lanes", LANES, "same as data.lanes"),
                                   ("span-samples", SPAN_SAMPLES, "same as data.span_samples")):
        audited.add_argument(f"--{name}", type=at_least_one, default=default, help=f"{meaning} (default: {default})")
    check.add_argument("--deep", action="store_true", help="also decode every sample; this is the default")
    check.add_argument("--hashes", action="store_true", help="compare hashes only, without decoding samples")
    check.add_argument("--workers", type=number_of_workers, default=default_workers(),
                       help="processes (default: one per CPU)")
    arguments = parser.parse_args()
    if arguments.command == "verify":
        return _verify(arguments.root, not arguments.hashes, arguments.workers)
    if arguments.command == "audit":
        return _audit(arguments)
    if arguments.command == "copy":
        return _copy(arguments.root, arguments.destination)
    return int(arguments.run(arguments))


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
    if (at_once := arguments.ranks * arguments.accumulation) > _MOST_AT_ONCE:
        raise ConfigError(f"--ranks {arguments.ranks} x --accumulation {arguments.accumulation} are {at_once} "
                          f"micro-batches per step, legal: at most {_MOST_AT_ONCE}")
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
          f"once, micro-batches per rank {sorted(set(found.micro_batches))}")
    return 1


def _copy(root: str, destination: str) -> int:
    manifest = load_manifest(root)
    total = bytes_of(manifest)
    with tqdm(total=total, unit="B", unit_scale=True, disable=None, desc="copying") as bar:
        copied = copy_set(root, destination, lambda file: bar.update(file.bytes))
    print(f"{shown(destination)}: complete, {copied} files copied, all verified ({total / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    run_entry_point(main)
