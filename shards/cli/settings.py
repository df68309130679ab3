"""Settings: dataclass fields that carry their meaning, unit and legal range; `config_file` loads them."""

from __future__ import annotations

import dataclasses
import difflib
import math
import reprlib
import typing
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from shards.errors import ConfigError
from shards.files.outside_json import LARGEST_INTEGER
from shards.shown_text import masked_value, shown

ConfigT = TypeVar("ConfigT")
_MAX_SHOWN = 80  # characters of a wrong value quoted in an error


def setting(default: Any, help: str, *, choices: Sequence[str] = (), minimum: float | None = None,
            maximum: float | None = None, only_for: Sequence[str] = (), may_be_empty: bool = True) -> Any:
    """A documented field: `help` gives meaning and unit; `check_settings` enforces `choices` and the range.

    A setting of type `str | list[...]` is one of its `choices` or a list, whose numbers are in the range.
    `only_for`: values of the section's `type` that use this setting; with any other type it may not be set. Unless it
    `may_be_empty`, an empty text is an error, rather than the same as null. Lists, dicts and dataclass types become a
    `default_factory`, as dataclasses require.
    """
    metadata = {"help": help, "choices": tuple(choices), "minimum": minimum, "maximum": maximum,
                "only_for": tuple(only_for), "may_be_empty": may_be_empty}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    if dataclasses.is_dataclass(default) and isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def place(help: str, *, may_be_empty: bool = True) -> Any:
    """A setting naming a folder, file, URL, account or function of the user: unset by default, left out of exports."""
    field: Any = setting(None, help, may_be_empty=may_be_empty)
    return dataclasses.field(default=None, metadata={**field.metadata, "is_place": True})


def without_places(config: ConfigT) -> ConfigT:
    """The configuration with every `place` unset, at any depth, so that it can be shared."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(typing.cast(Any, config)):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            changes[field.name] = without_places(value)
        elif isinstance(value, list) and entry_type(config, field.name):
            changes[field.name] = [without_places(entry) for entry in value]
        elif field.metadata.get("is_place"):
            changes[field.name] = None
    return typing.cast(ConfigT, dataclasses.replace(typing.cast(Any, config), **changes))


def check_settings(config: Any, prefix: str = "") -> None:
    """Raise ConfigError when a field (at any depth) lies outside its documented choices or range."""
    for field in dataclasses.fields(config):
        name, value = f"{prefix}{field.name}", getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            check_settings(value, f"{name}.")
            continue
        if isinstance(value, list) and entry_type(config, field.name):
            for number, entry in enumerate(value):
                check_settings(entry, f"{name}[{number}].")
            continue
        choices = field.metadata.get("choices", ())
        is_free = isinstance(value, list) or (value is None and field.default is None)  # a word, or a list
        if choices and value not in choices and not is_free:
            near = difflib.get_close_matches(str(value), choices, n=1)
            hint = " or a list" if may_be_list(type(config), field.name) else ""
            hint += f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{name} is {shown_value(value)}, legal: {', '.join(choices)}{hint}")
        if value == "" and not field.metadata.get("may_be_empty", True):
            raise ConfigError(f"{name} is empty, legal: text{', or null' if field.default is None else ''}")
        low, high = field.metadata.get("minimum"), field.metadata.get("maximum")
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            if isinstance(number, int):
                low, high = (-LARGEST_INTEGER if low is None else low), (LARGEST_INTEGER if high is None else high)
            in_range = (low is None or number >= low) and (high is None or number <= high)
            if not in_range or not math.isfinite(number):
                raise ConfigError(f"{name} is {shown_value(value)}, legal: {_range_text(low, high, number)}")


def may_be_list(schema: Any, name: str) -> bool:
    """Whether a setting takes a list instead of a single value."""
    kind = typing.get_type_hints(schema)[name]
    return any(typing.get_origin(member) is list for member in (kind, *typing.get_args(kind)))


def entry_type(schema: Any, name: str) -> Any:
    """The dataclass of the entries of a setting that is a list of sections; None for other settings."""
    kind = typing.get_type_hints(schema if isinstance(schema, type) else type(schema))[name]
    entries = typing.get_args(kind) if typing.get_origin(kind) is list else ()
    return next((entry for entry in entries if dataclasses.is_dataclass(entry)), None)


def _range_text(low: float | None, high: float | None, number: float) -> str:
    if isinstance(number, int) and abs(number) > LARGEST_INTEGER:  # the limit that goes without saying elsewhere
        return f"from {low} to {high}"
    if low in (None, -LARGEST_INTEGER):
        return "a finite number" if high in (None, LARGEST_INTEGER) else f"at most {high}"
    return f"at least {low}" if high in (None, LARGEST_INTEGER) else f"from {low} to {high}"


def describe_config(schema: type[Any], prefix: str = "") -> Iterator[str]:
    """One line per setting, as `--help` prints them: `key = default   meaning (unit)`."""
    instance = schema()
    for field in dataclasses.fields(schema):
        value, name = getattr(instance, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            yield from describe_config(type(value), f"{name}.")
            continue
        choices = field.metadata.get("choices", ())
        shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
        suffix = f" [{' | '.join(choices)}]" if choices else ""
        suffix += f" (type {listing(readers)} only)" if (readers := field.metadata.get("only_for")) else ""
        yield f"  {name} = {shown}\n      {field.metadata.get('help', '')}{suffix}"
        if entry := entry_type(schema, field.name):
            yield from describe_config(entry, f"{name}[N].")


def listing(names: Sequence[str]) -> str:
    """Names in a sentence: "a", "a or b", "a, b or c"."""
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def shown_value(value: Any) -> str:
    """A wrong value as quoted in an error: short, without control characters or secrets."""
    limited = reprlib.Repr()  # with YAML aliases, or in a checkpoint, ten lines can expand to a gigabyte of text
    limited.maxlevel, limited.maxstring, limited.maxother = 3, 10_000, 10_000
    short = repr(masked_value(value)) if isinstance(value, str) else limited.repr(value)
    text = shown(short)  # mask before truncating: a cut URL may no longer be recognised
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}… ({len(text)} characters)"
