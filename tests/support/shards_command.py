"""Run `python -m shards …` in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest

from shards.__main__ import main
from shards.cli.command_line import run_entry_point


class Done(NamedTuple):
    code: int
    out: str
    err: str


def shards_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """`run(*words) -> (exit code, stdout, stderr)`"""

    def run(*words: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["python -m shards", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            run_entry_point(main)
        captured = capsys.readouterr()
        return Done(int(left.value.code or 0), captured.out, captured.err)

    return run
