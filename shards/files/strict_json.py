"""Write standard JSON, which has no NaN or infinity (Python's encoder writes them by default).

All JSON of this project is written here, except the canonical form used for hashing (`shards.manifest`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any


def to_json(value: Any, *, indent: int | None = None, not_finite: Callable[[float], Any] = lambda number: None) -> str:
    """`value` as JSON text; non-finite numbers are replaced by `not_finite(number)`, by default null."""
    return json.dumps(_finite(value, not_finite), indent=indent, allow_nan=False)


def nan_for_null(value: Any) -> Any:
    """Undo `to_json` for a record of numbers: every null becomes NaN."""
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
