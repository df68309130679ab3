"""Fixtures of unit tests."""

from __future__ import annotations

import pytest


@pytest.fixture(params=["cpu", "device"])
def loss_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test twice: with the loss's CPU kernels, and on the path that a GPU takes."""
    from trainer.loss import cpu_kernels

    monkeypatch.setattr(cpu_kernels, "serve", lambda values: request.param == "cpu")
    return str(request.param)
