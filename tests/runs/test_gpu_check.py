"""What `make gpu-check` runs works: on the CPU, small, without its training runs, which other tests do there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *map(str, arguments)], cwd=REPOSITORY, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, check=False)


@pytest.mark.slow
def test_the_checks_pass_on_a_cpu() -> None:
    done = run("pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "tests/gpu", "--device", "cpu", "-k",
               "not run and not rank")
    assert done.returncode == 0 and "needs CUDA" in done.stdout, done.stdout


@pytest.mark.slow
def test_the_benchmark_measures_all_it_promises(tmp_path: Path) -> None:
    done = run("benchmarks.gpu", "--device", "cpu", "--vits", "tiny", "--heads", "linear", "--sides", "64",
               "--batch", "1", "--repetitions", "1", "--results", tmp_path)
    assert done.returncode == 0, done.stderr
    tables = json.loads((tmp_path / "gpu-cpu.json").read_text())["tables"]
    assert [len(table["rows"]) for table in tables] == [1, 1, 1, 2, 10]
    assert "Training steps" in tables[0]["title"] and "dearest kernels" in tables[-1]["title"]
