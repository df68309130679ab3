"""Read COCO's JSON files, which hold the annotations of all images, element by element.

Of each annotation only the text is kept, cut from the file: parsed, the 860,000 polygons of COCO 2017 would take
several times the memory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Set
from typing import Any, NamedTuple

from preprocess.layouts.drawn import NOTHING, short
from shards.errors import DatasetError

_BLANK = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()
_LISTS = ("images", "annotations", "categories")


class CocoImage(NamedTuple):
    """An entry of `images`."""

    file_name: str
    height: int
    width: int


class CocoFile(NamedTuple):
    """The content of a file.

    images       image id -> entry, in the order of the file
    annotations  image id -> texts of its annotations, in the order of the file
    categories   category id -> (name, colour or None), in the order of the file
    problems     image id -> what is wrong with one of its annotations: the first thing
    strays       what is wrong with annotations of no image
    """

    images: dict[int, CocoImage]
    annotations: dict[int, list[str]]
    categories: dict[int, tuple[str, str | None]]
    problems: dict[int, str]
    strays: list[str]


def read_coco(data: bytes, name: str, known: Set[int], *, has_ids: bool) -> CocoFile:
    """Read a file, whose annotations have ids of their own (`has_ids`) or not (panoptic). `known`: ids of categories.

    Raises DatasetError naming the file, the entry, its field and value, unless the entry concerns one image only.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{name} is not a JSON file: {error}") from error
    del data
    read = _Reading(known, has_ids)
    present = set()
    for field, number, element, raw in _elements(text, name):
        present.add(field)
        where = f"{name}: {field}[{number}]"
        if field not in _LISTS:
            continue
        if number is None or not isinstance(element, dict):
            raise DatasetError(f"{name}: {field} is or holds {short(element)}, legal: a list of objects")
        {"images": read.image, "annotations": read.annotation, "categories": read.category}[field](element, raw, where)
    if missing := [field for field in _LISTS if field not in present]:
        raise DatasetError(f"{name} has no {' and no '.join(missing)}, or an empty list; legal: a COCO file with "
                           f"{', '.join(_LISTS)}")
    return read.finished()


def read_categories(data: bytes, name: str) -> dict[int, tuple[str, str | None]]:
    """Only the categories; see `CocoFile`."""
    read = _Reading(set(), False)
    for field, number, element, raw in _elements(data.decode("utf-8-sig", "replace"), name):
        if field == "categories":
            if number is None or not isinstance(element, dict):
                raise DatasetError(f"{name}: categories is or holds {short(element)}, legal: a list of objects")
            read.category(element, raw, f"{name}: {field}[{number}]")
    if not read.content.categories:
        raise DatasetError(f"{name} has no categories; legal: a COCO file with {', '.join(_LISTS)}")
    return read.content.categories


class _Reading:
    """Checks entries and collects them."""

    def __init__(self, known: Set[int], has_ids: bool) -> None:
        self.known, self.has_ids = known, has_ids
        self.content = CocoFile({}, {}, {}, {}, [])
        self._ids: set[int] = set()

    def image(self, entry: dict[str, Any], _: str, where: str) -> None:
        image_id, name = entry.get("id"), entry.get("file_name")
        if type(image_id) is not int:
            raise DatasetError(f"{where}.id is {short(image_id)}, legal: a whole number")
        if image_id in self.content.images:
            raise DatasetError(f"{where}.id is {image_id}, which another image has too")
        if not isinstance(name, str) or not name:
            raise DatasetError(f"{where} (id {image_id}): file_name is {short(name)}, legal: the name of a file")
        for field in ("height", "width"):
            if type(entry.get(field)) is not int or entry[field] < 1:
                raise DatasetError(f"{where} (id {image_id}): {field} is {short(entry.get(field))}, legal: 1 or more")
        self.content.images[image_id] = CocoImage(name, entry["height"], entry["width"])

    def annotation(self, entry: dict[str, Any], raw: str, where: str) -> None:
        image_id, number = entry.get("image_id"), entry.get("id")
        if type(image_id) is not int:
            raise DatasetError(f"{where}.image_id is {short(image_id)}, legal: the id of an image")
        if self.has_ids:
            if type(number) is not int:
                self._problem(image_id, f"{where}.id is {short(number)}, legal: a whole number")
            elif number in self._ids:
                self._problem(image_id, f"{where}.id is {number}, which another annotation has too")
            else:
                self._ids.add(number)
            self._check_category(entry, image_id, where)
        else:
            if image_id in self.content.annotations:
                self._problem(image_id, f"{where}.image_id is {image_id}, which another annotation has too")
            segments = entry.get("segments_info")
            if not isinstance(segments, list) or not all(isinstance(segment, dict) for segment in segments):
                self._problem(image_id, f"{where}.segments_info is {short(segments)}, legal: a list of objects")
            else:
                for place, segment in enumerate(segments):
                    self._check_category(segment, image_id, f"{where}.segments_info[{place}]")
        self.content.annotations.setdefault(image_id, []).append(raw)

    def category(self, entry: dict[str, Any], _: str, where: str) -> None:
        number, name, color = entry.get("id"), entry.get("name"), entry.get("color")
        if type(number) is not int or not 0 <= number < NOTHING:
            raise DatasetError(f"{where}.id is {short(number)}, legal: 0..{NOTHING - 1}")
        if number in self.content.categories:
            raise DatasetError(f"{where}.id is {number}, which another category has too")
        if not isinstance(name, str) or not name.strip():
            raise DatasetError(f"{where} (id {number}): name is {short(name)}, legal: text")
        is_color = isinstance(color, list) and len(color) == 3 and all(type(c) is int and 0 <= c <= 255 for c in color)
        self.content.categories[number] = (name, "#" + bytes(color or ()).hex() if is_color else None)

    def finished(self) -> CocoFile:
        """The content, with annotations that turned out to belong to no image."""
        for image_id in sorted(self.content.annotations.keys() - self.content.images.keys()):
            self.content.strays.append(f"the image_id {image_id}, which is not among the images")
        return self.content

    def _check_category(self, entry: dict[str, Any], image_id: int, where: str) -> None:
        number = entry.get("category_id")
        if type(number) is not int or number not in self.known:
            self._problem(image_id, f"{where}.category_id is {short(number)}, which is not among the categories")

    def _problem(self, image_id: int, text: str) -> None:
        self.content.problems.setdefault(image_id, text)


def _elements(text: str, name: str) -> Iterator[tuple[str, int | None, Any, str]]:
    """(field, position, element, its text) of the lists in a JSON object; other values have position None."""
    try:
        place = _expect(text, 0, "{")
        while text[place] != "}":
            field, place = _DECODER.raw_decode(text, place)
            if not isinstance(field, str):
                raise ValueError(f"a key is {short(field)}")
            place = _expect(text, _blank(text, place), ":")
            if text[place] != "[":
                value, end = _DECODER.raw_decode(text, place)
                yield field, None, value, ""
            else:
                end = _blank(text, place + 1)
                number = 0
                while text[end] != "]":
                    value, after = _DECODER.raw_decode(text, end)
                    yield field, number, value, text[end:after]
                    number, end = number + 1, _separator(text, after, "]")
                end += 1
            place = _separator(text, end, "}")
        if _blank(text, place + 1) != len(text):
            raise ValueError(f"more text after the object, at character {place + 1}")
    except RecursionError:
        raise DatasetError(f"{name} is not valid JSON: brackets are nested too deep") from None
    except (ValueError, IndexError) as error:
        raise DatasetError(f"{name} is not a JSON object: {error or 'it ends early'}") from error


def _blank(text: str, place: int) -> int:
    """The next place that is not blank."""
    found = _BLANK.match(text, place)
    assert found is not None
    return found.end()


def _expect(text: str, place: int, character: str) -> int:
    """The place after a character and blanks. Raises ValueError when something else is there."""
    place = _blank(text, place)
    if text[place] != character:
        raise ValueError(f"expected {character!r} at character {place}, found {text[place : place + 20]!r}")
    return _blank(text, place + 1)


def _separator(text: str, place: int, end: str) -> int:
    """The place of the next element after a comma, or of the closing bracket."""
    place = _blank(text, place)
    if text[place] == end:
        return place
    after = _expect(text, place, ",")
    if text[after] == end:
        raise ValueError(f"a comma before {end!r} at character {after}")
    return after
