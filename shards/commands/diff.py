"""`python -m shards diff`: what differs between two sets."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from tqdm import tqdm

from shards.files.storage import Storage, open_storage
from shards.files.strict_json import to_json
from shards.looking.comparison import (
    Change,
    Numbers,
    SampleChanges,
    SplitComparison,
    class_changes,
    count_changes,
    other_changes,
    setting_changes,
)
from shards.manifest import Manifest, load_manifest
from shards.shown_text import masked_value, shown

_SHOWN = 5  # items of a list, without --all
_LONGEST_VALUE = 200  # characters

DESCRIPTION = """Compare two shard sets: settings, classes, splits, counts per class, and samples by key. Exit code 0
when they are equal, 1 when they differ, 2 on an error. Masks are compared by class id, images by their bytes.

What it costs: equal sets are recognised by their manifests, and equal shards by their sha256 in them; neither is
read. In other shards, samples of equal length and CRC-32 are taken as equal, from 16 bytes each in the index. Samples
that have no such counterpart are read in both sets, as keys are stored with the samples, once, and once more for each
key that is printed. Memory: about 80 bytes for each sample in shards that differ."""


def add_diff(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    diff = commands.add_parser("diff", help="say what differs between two sets; exit code 1 if anything does",
                               description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    diff.set_defaults(run=run)
    diff.add_argument("root", metavar="A", help="folder or URL of a set")
    diff.add_argument("other", metavar="B", help="folder or URL of the other set")
    diff.add_argument("--all", dest="most", action="store_const", const=None, default=_SHOWN,
                      help=f"print every key, class and setting that differs, not only the first {_SHOWN} of each kind")
    diff.add_argument("--no-samples", action="store_true", help="compare the manifests only, and read no sample")


def run(arguments: argparse.Namespace) -> int:
    """Print the differences."""
    storages = map(open_storage, (arguments.root, arguments.other))
    ours, theirs = ((storage, load_manifest(storage)) for storage in storages)
    for name, (storage, manifest) in (("A", ours), ("B", theirs)):
        splits = ", ".join(f"{split} {info.samples}" for split, info in manifest.splits.items())
        print(f"{name}: {shown(storage.root)} ({shown(manifest.dataset)}, {manifest.num_classes} classes; {splits})")
    if ours[1].sha256 == theirs[1].sha256:
        print("equal: the manifests are the same, with the sha256 of every shard; no sample was read")
        return 0
    lines = 0
    for line in _differences(ours, theirs, arguments.most, arguments.no_samples):
        print(line)
        lines += 1
    if not lines:
        print(f"the manifests differ in: {', '.join(other_changes(ours[1], theirs[1]))}")
    print("different")
    return 1


Set = tuple[Storage, Manifest]


def _differences(ours: Set, theirs: Set, most: int | None, no_samples: bool) -> Iterator[str]:
    one, other = ours[1], theirs[1]
    yield from _listed("settings", map(_as_line, setting_changes(one, other)), most)
    classes = list(class_changes(one.classes, other.classes))
    yield from _listed("classes", classes, most)
    if any(" has id " in line or " only in " in line for line in classes):
        yield "  (masks are compared by class id, so samples of classes whose id has changed have other masks)"
    for split in [*one.splits, *(name for name in other.splits if name not in one.splits)]:
        if split not in other.splits or split not in one.splits:
            name, manifest = ("A", one) if split in one.splits else ("B", other)
            yield f"split {split!r} is only in {name}: {manifest.splits[split].samples} samples"
        else:
            lines = [*_listed("counts", map(_as_line, count_changes(one, other, split)), most)]
            lines += [] if no_samples else _samples(SplitComparison(ours, theirs, split), ours, theirs, most)
            if lines:
                yield f"split {split!r}:"
                yield from (f"  {line}" for line in lines)


def _samples(comparison: SplitComparison, ours: Set, theirs: Set, most: int | None) -> Iterator[str]:
    split, shards = comparison.split, comparison.shards
    with tqdm(total=sum(map(len, comparison.unmatched)), unit="sample", desc=f"comparing {split}", leave=False,
              disable=None) as bar:
        found = comparison.compare(bar.update)
    for what, numbers, which in _kinds(found):
        if numbers.size:
            keys = (shown(repr(key)) for key in comparison.keys(which, numbers[:most]))
            yield from _listed(f"samples {what}: {len(numbers)}", keys, most, len(numbers))
    if found.is_reordered:
        yield "samples that both have are stored in another order, so training reads them in another order"
    if found.is_empty and shards[0] != shards[1]:
        yield f"the same samples in other shards ({len(shards[0])} in A, {len(shards[1])} in B)"
    if found.read:
        yield f"({found.skipped} samples of A were taken as equal by checksum; {found.read} of both sets were read)"


def _kinds(found: SampleChanges) -> list[tuple[str, Numbers, int]]:
    """(name, sample numbers, set that they are numbers of)"""
    return [("only in A", found.only_ours, 0), ("only in B", found.only_theirs, 1),
            ("with another image", found.image, 0), ("with other masks", found.masks, 0),
            ("that differ in provenance or encoding only", found.record, 0)]


def _listed(title: str, items: Iterable[str], most: int | None, count: int | None = None) -> Iterator[str]:
    """A title and the first items, indented; nothing if there are none. `count`: how many there are, if known."""
    items = iter(items)
    first = list(islice(items, most))
    if not first:
        return
    yield title
    yield from (f"  {item}" for item in first)
    rest = sum(1 for _ in items) if count is None else count - len(first)
    if rest:
        yield f"  and {rest} more (--all)"


def _as_line(change: Change) -> str:
    return f"{shown(change.what)}: {_text(change.ours)} in A, {_text(change.theirs)} in B"


def _text(value: Any) -> str:
    text = "nothing" if value is None else shown(value if isinstance(value, str) else to_json(masked_value(value)))
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}…"


