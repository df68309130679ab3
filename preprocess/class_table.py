"""Class tables in YAML: classes in id order, each with the stored ids, names or colours that mean it.

    labels: ids                # or rgb: label maps are RGB images
    names: labels.txt          # optional: text file with the name of each stored id, one per line, from id 0
    tolerance: 0               # rgb: largest distance to a listed colour
    classes:
      - {name: road, ids: [7], color: '#804080'}
      - {name: vehicle, names: [car, truck, bus]}
      - {name: person, colors: ['#dc143c', '#ff0000']}
    ignore: {ids: [0, 255], names: [static], colors: ['#000000'], rest: false}
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from preprocess.label_mapping import Color, LabelMapping, hex_color
from shards.cli.config_file import read_yaml
from shards.cli.settings import shown_value
from shards.errors import ConfigError, StorageError
from shards.files.plain_file import read_plain_text
from shards.manifest import ClassInfo
from shards.picture import default_colors
from shards.rle import MAX_CLASSES, ignore_value


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Ids, names of ids, or colours that label maps hold."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    ids: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    colors: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class TableClass(Stored):
    """One class, with the colour in which it is shown; for RGB label maps also its stored one, unless `colors` is
    set."""

    name: str
    color: str | None = None


@dataclass(frozen=True, kw_only=True)
class Ignored(Stored):
    """What is ignored; `rest`: also everything that is not listed at all."""

    rest: bool = False


@dataclass(frozen=True, kw_only=True)
class ClassTable:
    """The content of the file."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    classes: list[TableClass]
    ignore: Ignored = field(default_factory=Ignored)
    labels: Literal["ids", "rgb"] = "ids"
    names: str | None = None
    tolerance: float = 0.0


def is_class_table(path: str) -> bool:
    """Whether a class file is such a table, rather than a list of names."""
    return path.lower().endswith((".yaml", ".yml"))


def read_class_file(path: Path) -> str:
    """The content of `dataset.class_file`, a list of names. Raises ConfigError naming it."""
    return _read_text(path, "dataset.class_file")


def _read_text(path: Path, setting: str) -> str:
    try:
        return read_plain_text(path)
    except StorageError as error:
        raise ConfigError(f"{setting} {error}") from error
    except OSError as error:
        raise ConfigError(f"{setting} {path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{setting} {path} is not a text file: {error}") from error


def read_class_table(path: str, own_names: dict[str, list[int]] | None = None) -> tuple[list[ClassInfo], LabelMapping]:
    """The classes and the mapping of the table `path`. Raises ConfigError naming file, entry, value and what is legal.

    `own_names`: name -> stored ids, known from the dataset, for tables without `names`.
    """
    table = _parsed(path)
    ids_of = _ids_by_name(path, table.names) if table.names is not None else own_names or {}
    return build_classes(table, path, ids_of)


def names_in_table(path: Path, first: int) -> dict[str, list[int]]:
    """Name -> the stored ids that have it, as a layout's own table knows them: from its list of names, or else its
    classes. `first` is the id of the first line of a plain list."""
    if not is_class_table(str(path)):
        lines = _read_text(path, "class list").splitlines()
        return {line.partition("\t")[0].strip(): [number] for number, line in enumerate(lines, first)}
    table = _parsed(str(path))
    known = _ids_by_name(str(path), table.names) if table.names is not None else {}
    return known or {entry.name: _stored(entry, table.labels, known, str(path)) for entry in table.classes}


def build_classes(table: ClassTable, path: str, ids_of: dict[str, list[int]]) -> tuple[list[ClassInfo], LabelMapping]:
    """As `read_class_table`; `path` is used in errors."""
    if not 1 <= len(table.classes) <= MAX_CLASSES:
        raise ConfigError(f"{path} lists {len(table.classes)} classes, legal: 1..{MAX_CLASSES}")
    if table.tolerance < 0 or (table.tolerance and table.labels == "ids"):
        raise ConfigError(f"{path}: tolerance is {table.tolerance:g}, legal: 0 or more with labels: rgb, 0 with ids")
    classes = [_class_info(entry, default, f"{path}: class {shown_value(entry.name)}")
               for entry, default in zip(table.classes, default_colors(len(table.classes)), strict=True)]
    names = [info.name for info in classes]
    repeated = [name for number, name in enumerate(names) if name in names[:number]]
    if repeated:
        raise ConfigError(f"{path}: two classes are named {repeated[0]!r}; list all its ids or colours in one class")
    ignored = ignore_value(len(classes))
    mapping: dict[Any, int] = {}
    for number, entry in enumerate([*table.classes, table.ignore]):
        where = f"{path}: class {shown_value(entry.name)}" if isinstance(entry, TableClass) else f"{path}: ignore"
        meaning = number if isinstance(entry, TableClass) else ignored
        for stored in _stored(entry, table.labels, ids_of, where):
            if stored in mapping:
                raise ConfigError(f"{where} lists {_shown(stored)}, which already means "
                                  f"{_meaning(mapping[stored], classes)}")
            mapping[stored] = meaning
    return classes, _mapping(table, classes, mapping, path)


def _parsed(path: str) -> ClassTable:
    try:
        return TypeAdapter(ClassTable).validate_python(read_yaml(path))
    except ValidationError as error:
        problem = error.errors()[0]
        place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"])
        raise ConfigError(f"{path}: {place.removeprefix('.') or 'the table'} is {shown_value(problem['input'])}: "
                          f"{problem['msg'].lower()}") from error


def _class_info(entry: TableClass, default: Color, where: str) -> ClassInfo:
    color = default if entry.color is None else _color(entry.color, where)
    try:
        return ClassInfo(name=entry.name.strip(), color=color)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None


def _ids_by_name(path: str, names: str) -> dict[str, list[int]]:
    """Name -> the ids that have it, from the file `names`, relative to the table."""
    file = Path(path).parent / names
    lines = _read_text(file, f"{path}: names is {names}, but").splitlines()
    found: dict[str, list[int]] = {}
    for number, line in enumerate(lines):
        found.setdefault(line.strip(), []).append(number)
    return found


def _stored(entry: Stored, labels: str, ids_of: dict[str, list[int]], where: str) -> list[Any]:
    """The ids or colours that an entry lists."""
    if labels == "rgb":
        if entry.ids or entry.names:
            raise ConfigError(f"{where} has ids or names, legal with labels: rgb: colors")
        display = [entry.color] if isinstance(entry, TableClass) and entry.color is not None else []
        return [_color(color, where) for color in entry.colors or display]
    if entry.colors:
        raise ConfigError(f"{where} has colors, legal with labels: ids: ids and names; or set labels: rgb")
    unknown = [name for name in entry.names if name not in ids_of]
    if unknown:
        raise ConfigError(f"{where} has the name {unknown[0]!r}, which "
                          f"{_nearest(unknown[0], ids_of)}")
    ids = [*entry.ids, *(number for name in entry.names for number in ids_of[name])]
    illegal = [number for number in ids if not 0 <= number <= MAX_CLASSES]
    if illegal:
        raise ConfigError(f"{where} has the id {illegal[0]}, legal: 0..{MAX_CLASSES}")
    return ids


def _nearest(name: str, names: dict[str, list[int]]) -> str:
    """What is wrong with a name that is in no list."""
    if not names:
        return "is known only with a list of names: set `names` to a text file with one name per line, from id 0"
    near = difflib.get_close_matches(name, names, n=1)
    return f"is not in the list of names{f'; did you mean {near[0]!r}?' if near else ''}"


def _mapping(table: ClassTable, classes: list[ClassInfo], mapping: dict[Any, int], path: str) -> LabelMapping:
    without = sorted(set(range(len(classes))) - set(mapping.values()))
    if without:
        raise ConfigError(f"{path}: class {classes[without[0]].name!r} lists nothing that label maps hold; give it "
                          f"{'colors' if table.labels == 'rgb' else 'ids or names'}")
    shown = sorted(map(_shown, mapping)) if table.labels == "rgb" else [str(value) for value in sorted(mapping)]
    more = f" and {len(shown) - 20} more" if len(shown) > 20 else ""
    is_rgb = table.labels == "rgb"
    return LabelMapping(
        num_classes=len(classes), values={} if is_rgb else mapping, colors=mapping if is_rgb else {},
        tolerance=table.tolerance, ignore_rest=table.ignore.rest,
        legal=f"{', '.join(shown[:20])}{more} (listed in {path})",
        identity=("table", [[_shown(key), value] for key, value in sorted(mapping.items())], table.tolerance,
                  table.ignore.rest))


def _color(text: str, where: str) -> Color:
    try:
        red, green, blue = bytes.fromhex(text.strip().removeprefix("#"))
    except ValueError:
        raise ConfigError(f"{where}: colour {shown_value(text)}, legal: #rrggbb") from None
    return red, green, blue


def _shown(stored: int | Color) -> str:
    return hex_color(stored) if isinstance(stored, tuple) else str(stored)


def _meaning(number: int, classes: list[ClassInfo]) -> str:
    return f"class {classes[number].name!r}" if number < len(classes) else "ignored"
