"""The option `pytest --golden DIR`, known to pytest wherever DIR lies.

An existing folder after an option that pytest does not know yet makes it look for conftest.py there, and not here; so
the option comes by an entry point (pyproject.toml) instead of by tests/conftest.py, which uses it.
"""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Register the option."""
    parser.addoption("--golden", default=None, metavar="DIR",
                     help="MaskStream: folder of golden files (default: $MASKSTREAM_SHARED/golden); prints how far "
                     "each test was from its file")
