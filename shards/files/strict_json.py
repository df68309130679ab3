"""JSON that every parser takes: it knows no NaN and no infinity, which Python would write all the same.

All JSON of this project is written here, but for the canonical form that hashes are taken over (`shards.manifest`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any


def to_json(value: Any, *, indent: int | None = None, not_finite: Callable[[float], Any] = lambda number: None) -> str:
    """`value` as JSON text; numbers that are not finite become what `not_finite` makes of them, null by default."""
    return json.dumps(_finite(value, not_finite), indent=indent, allow_nan=False)


def nan_for_null(value: Any) -> Any:
    """A record of numbers as it was before `to_json`: null was a number that is not finite."""
    if value is None:
        return math.nan
    if isinstance(value, dict):
        return {key: nan_for_null(item) for key, item in value.items()}
    return [nan_for_null(item) for item in value] if isinstance(value, list) else value


def _finite(value: Any, not_finite: Callable[[float], Any]) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return not_finite(value)
    if isinstance(value, dict):
        return {key: _finite(item, not_finite) for key, item in value.items()}
    return [_finite(item, not_finite) for item in value] if isinstance(value, list | tuple) else value
