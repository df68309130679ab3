"""Libraries that only some sources need."""

from __future__ import annotations

import importlib
from typing import Any

from shards.errors import ConfigError


def import_extra(module: str, extra: str, file: str) -> Any:
    """Import a library that reading `file` needs. Raises ConfigError naming the extra that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"{file} needs the extra {extra!r} ({error}): pip install 'maskstream[{extra}]'") from None
