"""Software versions, as recorded in checkpoints and reports."""

from __future__ import annotations

from importlib import metadata

import torch


def versions() -> dict[str, str]:
    """Versions of maskstream and torch."""
    return {"maskstream": metadata.version("maskstream"), "torch": str(torch.__version__)}
