"""Read a configuration: frozen dataclasses + YAML + dotted overrides, one error per mistake.

Both stages (`preprocess`, `trainer`) describe their settings as frozen keyword-only dataclasses whose
fields are made with `knob`. OmegaConf does the merging and the type checks; this module only maps its
errors to `ConfigError` and writes the table that `--help` prints.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from shards.errors import ConfigError

ConfigT = TypeVar("ConfigT")


def knob(default: Any, help: str, *, choices: Sequence[str] = (), minimum: float | None = None,
         maximum: float | None = None) -> Any:
    """A documented field: `help` says meaning and unit; `choices` or a range are checked by `check_knobs`.

    Lists, dicts and dataclass instances become a `default_factory`, as dataclasses demand.
    """
    metadata = {"help": help, "choices": tuple(choices), "minimum": minimum, "maximum": maximum}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    if dataclasses.is_dataclass(default) and isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check_knobs(config: Any, prefix: str = "") -> None:
    """Raise ConfigError when a field (at any depth) lies outside its documented choices or range."""
    for field in dataclasses.fields(config):
        name, value = f"{prefix}{field.name}", getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            check_knobs(value, f"{name}.")
            continue
        choices = field.metadata.get("choices", ())
        if choices and value not in choices:
            near = difflib.get_close_matches(str(value), choices, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{name} is {value!r}, legal: {', '.join(choices)}{hint}")
        low, high = field.metadata.get("minimum"), field.metadata.get("maximum")
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            in_range = (low is None or number >= low) and (high is None or number <= high)
            if not math.isfinite(number) or not in_range:
                legal = f"from {low if low is not None else '-inf'} to {high if high is not None else 'inf'}"
                raise ConfigError(f"{name} is {value!r}, legal: {legal}")


def load_config(schema: type[ConfigT], paths: str | Path | Sequence[str | Path] | None,
                overrides: Sequence[str] = ()) -> ConfigT:
    """Defaults of `schema`, then the YAML files, then `key=value` overrides (later wins).

    Raises ConfigError naming the unknown key and the nearest legal one, the value that has the wrong
    type, or the field out of range.
    """
    files = [paths] if isinstance(paths, str | Path) else paths or []
    layers = [(f"configuration {path}", _read_yaml(path)) for path in files]
    layers.append(("command line", _read_overrides(overrides)))
    merged: ConfigT = _merge(schema, layers)
    return merged


def override_config(config: ConfigT, overrides: Sequence[str]) -> ConfigT:
    """`config` with `key=value` overrides. Raises ConfigError like `load_config`."""
    merged: ConfigT = _merge(config, [("command line", _read_overrides(overrides))])
    return merged


def config_from_dict(schema: type[ConfigT], values: Mapping[str, Any], source: str) -> ConfigT:
    """Inverse of `config_to_dict`; `source` is named in errors. Raises ConfigError like `load_config`."""
    merged: ConfigT = _merge(schema, [(source, OmegaConf.create(dict(values)))])
    return merged


def _merge(base: Any, layers: Sequence[tuple[str, DictConfig]]) -> Any:
    merged: Any = _writable(OmegaConf.structured(base))
    source = "defaults"
    for source, layer in layers:
        try:
            merged = OmegaConf.merge(merged, layer)
        except (OmegaConfBaseException, TypeError) as error:  # TypeError: a dict where a list belongs
            raise ConfigError(f"{source}: {_explain(error, layer)}") from error
    try:
        config = OmegaConf.to_object(merged)
        OmegaConf.structured(config)  # checks what is inside of lists
    except OmegaConfBaseException as error:
        raise ConfigError(f"{source}: {_explain(error, merged)}") from error
    check_knobs(config)
    return config


def config_to_dict(config: Any) -> dict[str, Any]:
    """The resolved configuration as plain containers (for YAML, JSON, checkpoints)."""
    plain = OmegaConf.to_container(OmegaConf.structured(config), resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def config_changes(before: Any, now: Any) -> list[str]:
    """"name was A and is B" for each setting that differs between two configurations of one schema."""
    old, new = (_flat(config_to_dict(config)) for config in (before, now))
    return [f"{name} was {old.get(name)} and is {value}" for name, value in new.items() if old.get(name) != value]


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def config_to_yaml(config: Any) -> str:
    """The resolved configuration as YAML; `load_config` reads it back to an equal object."""
    return OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True)


def describe_config(schema: type[Any], prefix: str = "") -> Iterator[str]:
    """One line per setting, as `--help` prints them: `key = default   meaning (unit)`."""
    instance = schema()
    for field in dataclasses.fields(schema):
        value, name = getattr(instance, field.name), f"{prefix}{field.name}"
        nested = value if dataclasses.is_dataclass(value) else field.metadata.get("nested")
        help_text = field.metadata.get("help", "")
        choices = field.metadata.get("choices", ())
        if dataclasses.is_dataclass(nested):
            yield from describe_config(type(nested) if not isinstance(nested, type) else nested, f"{name}.")
            continue
        shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
        suffix = f" [{' | '.join(choices)}]" if choices else ""
        yield f"  {name} = {shown}\n      {help_text}{suffix}"


def _read_yaml(path: str | Path) -> DictConfig:
    if not Path(path).is_file():
        raise ConfigError(f"configuration file {path} does not exist")
    try:
        loaded = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration file {path} is not valid YAML: {error}") from error
    except OSError as error:  # of a file that cannot be read, and of one that holds a lone value
        raise ConfigError(f"configuration file {path} cannot be read: {error}") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"configuration file {path} must hold key: value pairs at its top level")
    return loaded


def _read_overrides(overrides: Sequence[str]) -> DictConfig:
    for item in overrides:
        if "=" not in item:
            raise ConfigError(f"override {item!r} is not of the form key=value (for example seed=1)")
    try:
        return OmegaConf.from_dotlist(list(overrides))
    except (YAMLError, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"command line: cannot read {' '.join(overrides)!r}: {error}") from error


def _writable(node: Any) -> Any:
    """OmegaConf marks frozen dataclasses read-only, which also forbids merging; lift that mark."""
    OmegaConf.set_readonly(node, False)
    for key in node:
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none():
            _writable(child)
    return node


def _explain(error: Exception, layer: DictConfig) -> str:
    first_line = str(error).splitlines()[0].rstrip()
    key = getattr(error, "full_key", None)
    if isinstance(error, ConfigKeyError):
        return f"unknown key {key!r}: {first_line}"
    return f"{key or ', '.join(map(str, layer))}: {first_line}"
