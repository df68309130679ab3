"""Parse class lists: one name per line, in id order, with an optional colour after a tab."""

from __future__ import annotations

from shards.cli.settings import shown_value
from shards.errors import ConfigError
from shards.manifest import ClassInfo
from shards.picture import default_colors
from shards.rle import MAX_CLASSES


def parse_classes(text: str, name: str) -> list[ClassInfo]:
    """Parse lines of `name` or `name<tab>#rrggbb`. Raises ConfigError naming the file (`name`) and the line."""
    lines = [line.rstrip("\r") for line in text.split("\n")]
    while lines and not lines[-1].strip():
        lines.pop()
    if not 1 <= len(lines) <= MAX_CLASSES:
        raise ConfigError(f"{name} lists {len(lines)} classes, legal: 1..{MAX_CLASSES}")
    colors = default_colors(len(lines))
    classes = [_parse_class(line, colors[number], f"{name}, line {number + 1}") for number, line in enumerate(lines)]
    first_line: dict[str, int] = {}
    for number, info in enumerate(classes, 1):
        if first_line.setdefault(info.name, number) != number:
            raise ConfigError(f"{name}: lines {first_line[info.name]} and {number} both name the class {info.name!r}")
    return classes


def _parse_class(line: str, default: tuple[int, int, int], where: str) -> ClassInfo:
    name, _, code = line.partition("\t")
    if not name.strip():
        raise ConfigError(f"{where}: empty class name; every line must name one class, in id order")
    red, green, blue = default
    try:
        if code.strip():
            red, green, blue = bytes.fromhex(code.strip().removeprefix("#"))
    except ValueError:
        raise ConfigError(f"{where}: colour {shown_value(code.strip())}, legal: #rrggbb") from None
    try:
        return ClassInfo(name=name.strip(), color=(red, green, blue))
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None
