"""How well each single image was segmented: the table `images.jsonl` that an evaluation writes, one JSON object a line.

    split   str     the split
    number  int     of the sample in its split, from 0
    key     str     of the sample
    mIoU    float   mean IoU of the classes labelled in this image, 0 to 1; null without a labelled pixel
    aAcc    float   share of the labelled pixels that were predicted correctly, 0 to 1; null likewise
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from shards.errors import ConfigError
from shards.files.outside_json import LARGEST_INTEGER, parse_json
from shards.files.plain_file import open_plain
from shards.files.strict_json import nan_for_null, to_json

IMAGE_SCORES = "images.jsonl"
_LONGEST_LINE = 1 << 20  # bytes


class ImageScore(NamedTuple):
    """A row of the table; the scores are NaN for an image without a labelled pixel."""

    split: str
    number: int
    key: str
    miou: float
    accuracy: float


def encode_scores(scores: Iterable[ImageScore]) -> bytes:
    """The content of the table."""
    return "".join(to_json({"split": score.split, "number": score.number, "key": score.key, "mIoU": score.miou,
                            "aAcc": score.accuracy}) + "\n" for score in scores).encode()


def read_scores(place: Path) -> Iterator[ImageScore]:
    """The rows of a table, or of the one in the folder of an evaluation or run. Raises ConfigError naming file, line
    and field."""
    path = _table_at(place)
    with open(open_plain(path), "rb") as file:  # noqa: PTH123 - a descriptor
        number = 0
        while line := file.readline(_LONGEST_LINE):
            number += 1
            yield _parsed(line, f"{path}, line {number}")
    if not number:
        raise ConfigError(f"{path} is empty, legal: one JSON object per image, as trainer/eval.py writes it")


def _table_at(place: Path) -> Path:
    if not place.is_dir():
        if place.exists():
            return place
        raise ConfigError(f"{place} does not exist, legal: the folder of an evaluation (trainer/eval.py --output) or "
                          f"its {IMAGE_SCORES}")
    places = [place / IMAGE_SCORES, place / "evaluation" / IMAGE_SCORES]
    found = next((path for path in places if path.exists()), None)
    if found is None:
        raise ConfigError(f"{place} has no {IMAGE_SCORES}, nor has its folder evaluation/. trainer/eval.py writes it; "
                          "evaluations of older versions lack it: run trainer/eval.py again")
    return found


def _parsed(line: bytes, where: str) -> ImageScore:
    row = parse_json(line, where)
    miou, accuracy = (_score(row, name, where) for name in ("mIoU", "aAcc"))
    split, number, key = row.get("split"), row.get("number"), row.get("key")
    for name, value in (("split", split), ("key", key)):
        if not isinstance(value, str) or not value:
            raise ConfigError(f"{where}: {name} is {value!r:.80}, legal: text")
    if type(number) is not int or not 0 <= number <= LARGEST_INTEGER:
        raise ConfigError(f"{where}: number is {number!r:.80}, legal: a whole number from 0")
    return ImageScore(str(split), number, str(key), miou, accuracy)


def _score(row: dict[str, Any], name: str, where: str) -> float:
    value = nan_for_null(row.get(name, ""))
    if type(value) not in (int, float) or not (0 <= value <= 1 or math.isnan(value)):
        raise ConfigError(f"{where}: {name} is {value!r:.80}, legal: a number from 0 to 1, or null")
    return float(value)
