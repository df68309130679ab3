"""What an evaluation has counted so far, kept on disk, so that one that was killed goes on where it stopped.

    <folder>/unfinished/<identity>/rank-0-<random>.jsonl    one line per group of images that were predicted together:
        {"first": number of the group's first image, "images": [{"number", "key", "places", "counts"}]}

`places` and `counts` are the entries of `Counts.data` that are not 0. The folder is removed when the evaluation is
complete. A line that was cut off counts as missing.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from shards.errors import ConfigError
from shards.files.atomic import naming
from shards.files.outside_json import parse_json
from shards.files.strict_json import to_json
from trainer.evaluation.counts import Counts

FOLDER = "unfinished"


class CountedImage(NamedTuple):
    """An image and its counts."""

    number: int
    key: str
    counts: Counts


class JournalGroup:
    """A finished group; the counts of its images, which take much more memory, are made while iterating."""

    def __init__(self, images: list[dict[str, object]], template: Counts) -> None:
        self.images, self.template = images, template

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[CountedImage]:
        for image in self.images:
            yield _counted(image, self.template)


class Journal:
    """Appends to this rank's file; `read` returns what the files of all ranks and earlier processes hold.

    identity   of all that determines the counts, in hexadecimal: files of another one are not read
    """

    def __init__(self, output: Path, identity: str) -> None:
        self.folder = output / FOLDER / identity[:16]
        self._name = secrets.token_hex(4)

    def read(self, template: Counts) -> dict[int, JournalGroup]:
        """First number -> group; counts are shaped and placed like the template's."""
        found: dict[int, JournalGroup] = {}
        for path in sorted(self.folder.glob("*.jsonl")):
            for line in path.read_bytes().splitlines():
                try:
                    record = parse_json(line, str(path))
                    group = JournalGroup(record["images"], template)
                    numbers = [image.number for image in group]  # raises when one is not as `add` writes it
                    if numbers and numbers == list(range(record["first"], record["first"] + len(numbers))):
                        found[numbers[0]] = group
                except (ConfigError, KeyError, TypeError, ValueError, IndexError, RuntimeError):
                    continue  # cut off by the end of the process: the group is evaluated again
        return found

    def add(self, rank: int, first: int, images: Sequence[CountedImage]) -> None:
        """Append a group."""
        self.folder.mkdir(parents=True, exist_ok=True)
        rows = []
        for image in images:
            data = image.counts.data.cpu()
            places = data.nonzero()[:, 0]
            rows.append({"number": image.number, "key": image.key, "places": places.tolist(),
                         "counts": data[places].tolist()})
        path = self.folder / f"rank-{rank}-{self._name}.jsonl"
        with naming(path), path.open("ab") as file:
            file.write((to_json({"first": first, "images": rows}) + "\n").encode())

    def remove(self) -> None:
        """Forget everything; the evaluation is complete."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.folder.parent.is_dir() and not any(self.folder.parent.iterdir()):
            self.folder.parent.rmdir()


def _counted(image: dict[str, object], template: Counts) -> CountedImage:
    confusion = template.confusion
    counts = Counts(confusion.num_classes, confusion.ignore_index, template.data.device)
    places, values = (torch.tensor(image[name], dtype=torch.int64, device=template.data.device)
                      for name in ("places", "counts"))
    number, key = image["number"], image["key"]
    if type(number) is not int or not isinstance(key, str) or bool((places < 0).any() or (values < 0).any()):
        raise ValueError("not as `Journal.add` writes it")
    counts.data[places] = values
    return CountedImage(number, key, counts)
