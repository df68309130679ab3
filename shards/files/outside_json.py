"""Untrusted JSON: parse it and build our dataclasses from it, or reject it with a one-line error."""

from __future__ import annotations

import dataclasses
import functools
import json
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from shards.errors import ConfigError, MaskStreamError

_Built = TypeVar("_Built")
LARGEST_INTEGER = 2**62  # the sum of two still fits int64
_LONGEST_TEXT = 4096  # characters
_DEEPEST = 32  # nesting depth of fields of type Any
_SHOWN = 80  # characters of a wrong value quoted in errors
_NAMES = {int: f"a whole number from 0 to {LARGEST_INTEGER}", str: f"text of at most {_LONGEST_TEXT} characters",
          dict: "an object", list: "a list"}


def parse_json(data: bytes | str, name: str, error: type[MaskStreamError] = ConfigError) -> dict[str, Any]:
    """Parse a JSON object. Raises `error`, naming `name`, for anything else: malformed, nested thousands deep, with
    numbers of thousands of digits."""
    try:
        content = json.loads(data)
    except RecursionError:
        raise error(f"{name} is not valid JSON: brackets are nested too deep") from None
    except ValueError as problem:
        raise error(f"{name} is not valid JSON: {problem}") from problem
    if not isinstance(content, dict):
        raise error(f"{name} must hold a JSON object, but holds {_shown(content)}")
    return content


def built(kind: type[_Built], value: Any, where: str = "") -> _Built:
    """Build the dataclass `kind` from plain containers, checking types. Raises ValueError naming the field.

    Numbers must be non-negative integers; a field of type Any may be nested at most `_DEEPEST` deep.
    """
    made: _Built = _built(kind, value, where)
    return made


def _built(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, value, where)
    origin: Any = typing.get_origin(kind) or kind
    inner = typing.get_args(kind)
    if origin is Any:
        _check_depth(value, where)
        return value
    if origin is types.UnionType:  # X | None
        return None if value is None else _built(inner[0], value, where)
    expected: Any = list if origin is tuple else origin
    if type(value) is not expected or (expected is int and not 0 <= value <= LARGEST_INTEGER) or (
            expected is str and len(value) > _LONGEST_TEXT):
        raise ValueError(f"{where} is {_shown(value)}, legal: {_NAMES[expected]}")
    if origin is list:
        return [_built(inner[0], item, f"{where}[{number}]") for number, item in enumerate(value)]
    if origin is dict:
        return {_built(inner[0], key, f"a name in {where}"): _built(inner[1], item, f"{where}.{key[:_SHOWN]}")
                for key, item in value.items()}
    if origin is tuple:
        if len(value) != len(inner):
            raise ValueError(f"{where} is {_shown(value)}, legal: {len(inner)} values")
        return tuple(_built(part, item, where) for part, item in zip(inner, value, strict=True))
    return value


def _dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} is {_shown(value)}, legal: {_NAMES[dict]}")
    kinds, needed = _fields(kind)
    if unknown := value.keys() - kinds.keys():
        raise ValueError(f"{where or 'it'} has the unknown field {_shown(min(unknown))}")
    if missing := needed - value.keys():
        raise ValueError(f"{where or 'it'} lacks the field {min(missing)!r}")
    dot = f"{where}." if where else ""
    return kind(**{name: _built(kinds[name], item, f"{dot}{name}") for name, item in value.items()})


@functools.cache
def _fields(kind: Any) -> tuple[dict[str, Any], frozenset[str]]:
    """(types of a dataclass's fields, names of those without a default)"""
    hints = typing.get_type_hints(kind)
    absent = dataclasses.MISSING
    needed = (field.name for field in dataclasses.fields(kind)
              if field.default is absent and field.default_factory is absent)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}, frozenset(needed)


def _check_depth(value: Any, where: str) -> None:
    level: list[Any] = [value]
    for _ in range(_DEEPEST):
        level = [item for container in level if isinstance(container, list | dict)
                 for item in (container.values() if isinstance(container, dict) else container)]
        if not level:
            return
    raise ValueError(f"{where} is nested more than {_DEEPEST} deep")


def _shown(value: Any) -> str:
    if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
        return f"a number of {value.bit_length()} bits"
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deep, or a number in it has too many digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
