"""Load a configuration: frozen dataclasses + YAML + dotted overrides; every mistake is a one-line error.

Both stages (`preprocess`, `trainer`) declare their settings as frozen keyword-only dataclasses whose fields are made
with `setting`. A value stays text until the type of its field is known: a string setting is exactly what was typed
(`010`, `1e3`, `yes`, `runs/exp #2`, `${HOME}` stay as they are), and only numbers, booleans, lists and mappings are
parsed. Nothing is interpolated. pydantic checks the types; this module turns its errors into `ConfigError`.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from shards.cli.settings import ConfigT, check_settings, entry_type, listing, shown_value
from shards.errors import ConfigError, StorageError
from shards.files.plain_file import LARGEST_YAML, read_plain_text
from shards.shown_text import masked_value

_COMMAND_LINE = "command line"  # the source named in errors about typed settings
_ABSENT = "not given"  # an entry of a list or mapping, in changes between configurations
_EXPECTED = {"int": "a whole number", "float": "a number", "bool": "true or false", "string": "text",
             "list": "a list, e.g. [a, b]", "dict": "a mapping, e.g. {a: b}", "dataclass": "a section of settings"}


class _TextLoader(yaml.SafeLoader):
    """YAML whose plain values stay text, except null: the type of the field decides how to parse them."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        start: [(tag, pattern) for tag, pattern in resolvers if tag == "tag:yaml.org,2002:null"]
        for start, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """As SafeLoader, but duplicate keys are an error (SafeLoader silently keeps the last)."""
        names = set[str]()
        for name in (key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if name in names:
                raise yaml.constructor.ConstructorError(None, None, f"found duplicate key {name}", node.start_mark)
            names.add(name)
        return super().construct_mapping(node, deep)


def load_config(schema: type[ConfigT], paths: str | Path | Sequence[str | Path] | None,
                overrides: Sequence[str] = (), named: Mapping[str, Any] | None = None) -> ConfigT:
    """Defaults of `schema`, then the YAML files, then `named` options, then `key=value` overrides (later wins).

    `named` maps dotted settings to values that are used unparsed. Raises ConfigError naming the unknown key and its
    nearest match, the value of the wrong type, or the field out of range.
    """
    files = [paths] if isinstance(paths, str | Path) else paths or []
    layers = [(f"configuration {path}", read_yaml(path)) for path in files]
    layers += [(_COMMAND_LINE, _nested(name.split("."), value)) for name, value in (named or {}).items()]
    layers += [(_COMMAND_LINE, _read_override(schema, override)) for override in overrides]
    return _build(schema, layers)


def override_config(config: ConfigT, overrides: Sequence[str]) -> ConfigT:
    """`config` with `key=value` overrides. Raises ConfigError like `load_config`."""
    schema = type(config)
    layers = [(_COMMAND_LINE, _read_override(schema, override)) for override in overrides]
    values = dataclasses.asdict(typing.cast(Any, config))
    return _build(schema, [("the configuration", values), *layers])


def config_from_dict(schema: type[ConfigT], values: Mapping[str, Any], source: str) -> ConfigT:
    """Inverse of `config_to_dict`; `source` is named in errors. Raises ConfigError like `load_config`.

    Older versions also stored settings that the chosen `type` does not read; they are dropped.
    """
    types_again = {name: {"type": section["type"]} for name, _ in _typed_sections(schema)
                   if isinstance(section := values.get(name), Mapping) and "type" in section}
    return _build(schema, [(source, dict(values)), (source, types_again)])


def config_to_dict(config: Any) -> dict[str, Any]:
    """The configuration as plain containers (for YAML, JSON, checkpoints), credentials in URLs masked."""
    settings: dict[str, Any] = masked_value(dataclasses.asdict(config))
    return settings


def config_changes(before: Any, now: Any) -> list[str]:
    """"name was A and is B" for each setting that differs between two configurations of one schema."""
    old, new = (_flat(config_to_dict(config)) for config in (before, now))
    names = [*new, *(name for name in old if name not in new)]  # entries of lists and mappings come and go
    pairs = [(name, old.get(name, _ABSENT), new.get(name, _ABSENT)) for name in names]
    return [f"{name} was {before} and is {after}" for name, before, after in pairs if before != after]


def config_to_yaml(config: Any) -> str:
    """The configuration as YAML; `load_config` reads it back to an equal object."""
    # Unicode stays escaped: YAML treats some characters, such as U+0085, as line breaks.
    text: str = yaml.safe_dump(config_to_dict(config), sort_keys=False, width=120)
    return text


def _build(schema: type[ConfigT], layers: _Layers) -> ConfigT:
    """Merge the layers and build the configuration they describe."""
    from pydantic import TypeAdapter, ValidationError  # importing takes 0.3 s, which --help should not wait for

    merged: dict[str, Any] = {}
    for source, layer in layers:
        _check_names(schema, layer, source)
    for _, layer in _without_other_types(schema, layers):
        merged = _overlay(merged, layer)
    try:
        config: ConfigT = TypeAdapter(schema).validate_python(merged)
    except ValidationError as error:
        raise _explain(_first_problem(schema, error.errors()), layers) from error
    check_settings(config)
    _refuse_other_types(config, layers)
    return config


def _check_names(schema: Any, layer: Mapping[Any, Any], source: str, prefix: str = "") -> None:
    """Raise ConfigError for an unknown setting, or for a single value where a section is expected."""
    fields = _field_types(schema)
    for key, value in layer.items():
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f". Did you mean: '{near[0]}'" if near else ""
            raise ConfigError(f"{source}: unknown key {f'{prefix}{key}'!r}{hint}; legal: {', '.join(fields)}")
        sections = {f"{prefix}{key}": (fields[key], value)} if dataclasses.is_dataclass(fields[key]) else {}
        if isinstance(value, list) and (entry := entry_type(schema, key)):
            sections = {f"{prefix}{key}[{number}]": (entry, part) for number, part in enumerate(value)}
        for name, (kind, section) in sections.items():
            if not isinstance(section, Mapping):
                raise ConfigError(f"{source}: {name} is {shown_value(section)}, legal: {_EXPECTED['dataclass']} "
                                  f"({', '.join(_field_types(kind))})")
            _check_names(kind, section, source, f"{name}.")


_Layers = Sequence[tuple[str, dict[str, Any]]]  # (source, settings), lowest priority first


def _without_other_types(schema: Any, layers: _Layers) -> _Layers:
    """Drop settings that the chosen `type` does not read (`only_for`), where they were not set for this run.

    These are settings in layers below the one that chooses the `type`, and in files above it, which may serve several
    types. Inapplicable settings on the command line stay, for `_refuse_other_types` to report.
    """
    kept = [(source, dict(layer)) for source, layer in layers]
    for name, section in _typed_sections(schema):
        choosing = max((number for number, (_, layer) in enumerate(layers) if "type" in layer.get(name, {})),
                       default=-1)
        chosen = layers[choosing][1][name]["type"] if choosing >= 0 else section().type
        for number, (source, layer) in enumerate(kept):
            if name in layer and (number < choosing or (number > choosing and source != _COMMAND_LINE)):
                layer[name] = {key: value for key, value in layer[name].items() if _applies(section, key, chosen)}
    return kept


def _refuse_other_types(config: Any, layers: _Layers) -> None:
    """Raise ConfigError for a setting that its section's `type` does not read, unless it has its default value."""
    for name, kind in _typed_sections(type(config)):
        section, default = getattr(config, name), kind()
        for field in dataclasses.fields(kind):
            value = getattr(section, field.name)
            if not _applies(kind, field.name, section.type) and value != getattr(default, field.name):
                source = next(source for source, layer in reversed(layers) if _holds(layer, [name, field.name]))
                readers = listing(field.metadata["only_for"])
                raise ConfigError(f"{source}: {name}.{field.name} is {shown_value(value)}; only {name}.type {readers} "
                                  f"reads it, and {name}.type is {section.type}: remove it")


def _typed_sections(schema: Any) -> Iterator[tuple[str, Any]]:
    """Sections with settings that apply only to some values of their `type`."""
    for name, kind in _field_types(schema).items():
        if dataclasses.is_dataclass(kind) and any(field.metadata.get("only_for") for field in dataclasses.fields(kind)):
            yield name, kind


def _applies(section: Any, key: str, chosen: Any) -> bool:
    readers = next((field.metadata["only_for"] for field in dataclasses.fields(section) if field.name == key), ())
    return not readers or chosen in readers


def _field_types(schema: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(schema)
    return {field.name: hints[field.name] for field in dataclasses.fields(schema)}


def _overlay(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings are merged key by key; anything else is replaced."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _overlay(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _first_problem(schema: Any, problems: Sequence[Any]) -> Any:
    """The first of pydantic's errors. A value that may be a word or a list has one for each, with the type in its
    place: of these it is the last, the list's, without that type."""
    first = problems[0]
    field, kind = list[Any](), schema
    while dataclasses.is_dataclass(kind) and len(field) < len(first["loc"]):
        field.append(first["loc"][len(field)])
        kind = _field_types(kind).get(field[-1])
    if not {str, list} <= {typing.get_origin(member) or member for member in typing.get_args(kind)}:
        return first
    last = [problem for problem in problems if list(problem["loc"][: len(field)]) == field][-1]
    return {**last, "loc": (*field, *last["loc"][len(field) + 1 :])}


def _explain(problem: Any, layers: Sequence[tuple[str, Mapping[str, Any]]]) -> ConfigError:
    """pydantic's first error as one line naming the value's source and what is legal."""
    if isinstance(inner := problem.get("ctx", {}).get("error"), ConfigError):
        return inner  # raised by a section's own checks
    place = [part for part in problem["loc"] if isinstance(part, str | int)]
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).removeprefix(".")
    source = next((source for source, layer in reversed(layers) if _holds(layer, place)), "the configuration")
    kind = problem["type"].partition("_")[0]
    legal = _EXPECTED.get(kind, problem["msg"])
    return ConfigError(f"{source}: {name} is {shown_value(problem['input'])}, legal: {legal}")


def _holds(layer: Any, place: Sequence[str | int]) -> bool:
    for part in place:
        if isinstance(part, int) or not isinstance(layer, Mapping):
            return True
        if part not in layer:
            return False
        layer = layer[part]
    return True


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        elif isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
            flat |= _flat({f"{name}[{number}]": entry for number, entry in enumerate(value)}, prefix)
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _nested(path: Sequence[str], value: Any) -> dict[str, Any]:
    """`{"a": {"b": value}}` for the path a, b."""
    for name in reversed(path):
        value = {name: value}
    assert isinstance(value, dict)
    return value


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The content of a YAML file, plain values as text. Raises ConfigError when it is not a mapping."""
    try:
        loaded = _parse(read_plain_text(path, LARGEST_YAML))
    except FileNotFoundError:
        raise ConfigError(f"configuration file {path} does not exist") from None
    except ValueError as error:
        raise ConfigError(f"configuration file {path} is not valid YAML: {error}") from error
    except StorageError as error:
        raise ConfigError(f"configuration file {error}") from error
    except OSError as error:
        raise ConfigError(f"configuration file {path} cannot be read: {error.strerror or error}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"configuration file {path} must hold key: value pairs at its top level")
    return loaded


def _read_override(schema: Any, override: str) -> dict[str, Any]:
    """`key=value` as a nested mapping; the field's type decides whether the value is text.

    For a word or a list, "[" begins a list.
    """
    name, equals, text = override.partition("=")
    if not equals:
        raise ConfigError(f"override {shown_value(override)} is not of the form key=value (for example seed=1)")
    path = name.split(".")
    members = _types_at(schema, path)
    is_list = text.startswith("[") and any(typing.get_origin(member) is list for member in members)
    if str in members and not is_list:
        return _nested(path, None if text == "null" or (not text and _may_be_empty(schema, path)) else text)
    try:
        return _nested(path, _parse(text))
    except ValueError as error:
        raise ConfigError(f"{_COMMAND_LINE}: cannot read {shown_value(override)}: {error}") from error


def _types_at(schema: Any, path: Sequence[str]) -> tuple[Any, ...]:
    """The types that the setting at the path, or an entry of a mapping there, may have."""
    kind = schema
    for part in path:
        if dataclasses.is_dataclass(kind):
            kind = _field_types(kind).get(part)
        elif typing.get_origin(kind) is dict:
            kind = typing.get_args(kind)[1]
        else:
            return ()
    return typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)


def _may_be_empty(schema: Any, path: Sequence[str]) -> bool:
    """Whether an empty text unsets the setting at the path; for others `check_settings` refuses it."""
    *sections, name = path
    for section in sections:
        schema = _field_types(schema).get(section) if dataclasses.is_dataclass(schema) else None
    fields = dataclasses.fields(schema) if dataclasses.is_dataclass(schema) else ()
    return all(field.metadata.get("may_be_empty", True) for field in fields if field.name == name)


def _parse(text: str) -> Any:
    """YAML with plain values left as text. Raises ValueError in one line."""
    try:
        return yaml.load(text, _TextLoader)  # a subclass of SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError:
        raise ValueError("brackets are nested too deep") from None
