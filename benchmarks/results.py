"""Benchmark results: printed while measuring, and saved as `benchmarks/results/NAME.json`.

    name, command, date (UTC), commit ("-dirty" when tracked sources were modified), machine, versions
    tables   [{title, columns, rows}]; a cell is text, a number, null, or a spread of repeated measurements:
             {"median", "low", "high", "count"}, where low and high are the quartiles
    notes    [text]

`python -m benchmarks.report` builds docs/benchmarks.md from these files.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from shards.files.atomic import write_atomically
from shards.files.strict_json import to_json

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"
# Modules whose versions are recorded if a benchmark imported them, and their distributions.
_DISTRIBUTIONS = {"numpy": "numpy", "torch": "torch", "transformers": "transformers", "scipy": "scipy", "PIL": "pillow",
                  "simplejpeg": "simplejpeg", "msgpack": "msgpack", "obstore": "obstore", "zstandard": "zstandard",
                  "pycocotools": "pycocotools", "webdataset": "webdataset", "litdata": "litdata",
                  "streaming": "mosaicml-streaming"}

Cell = str | int | float | dict[str, float] | None


class Table:
    """A table, printed row by row as Markdown."""

    def __init__(self, title: str, columns: Iterable[str]) -> None:
        self.title, self.columns, self.rows = title, list(columns), list[list[Cell]]()
        print("\n" + table_head(self.title, self.columns), flush=True)

    def row(self, *cells: Cell) -> None:
        """Add and print one row."""
        if len(cells) != len(self.columns):
            raise ValueError(f"a row of {len(cells)} cells in a table of {len(self.columns)} columns: {self.title}")
        self.rows.append([cell.item() if isinstance(cell, np.generic) else cell for cell in cells])
        print(table_row(self.rows[-1]), flush=True)


class Result:
    """The tables and notes of one benchmark; `save` writes them with command, commit, machine and versions."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.tables: list[Table] = []
        self.notes: list[str] = []
        self._facts = {"command": command(), "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
                       "commit": commit()}  # at the start, as sources may be edited while measuring

    def table(self, title: str, *columns: str) -> Table:
        """Start a table."""
        self.tables.append(Table(title, columns))
        return self.tables[-1]

    def note(self, text: str) -> None:
        """Print and keep a sentence."""
        self.notes.append(text)
        print(f"\n{text}", flush=True)

    def save(self) -> Path:
        """Write `<folder>/<name>.json`."""
        content = {"name": self.name, **self._facts, "machine": machine(), "versions": versions(),
                   "tables": [{"title": table.title, "columns": table.columns, "rows": table.rows}
                              for table in self.tables], "notes": self.notes}
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{self.name}.json"
        write_atomically(path, (to_json(content, indent=1) + "\n").encode())
        print(f"\nsaved to {path}", file=sys.stderr)
        return path


def benchmark_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with --results, the folder for the JSON file."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS,
                        help="folder for the JSON file (default: benchmarks/results)")
    return parser


def spread(values: Iterable[float], scale: float = 1.0) -> dict[str, float]:
    """Median and quartiles of repeated measurements, times `scale`."""
    numbers = np.asarray(list(values), np.float64) * scale
    low, median, high = np.percentile(numbers, (25, 50, 75))
    return {"median": float(median), "low": float(low), "high": float(high), "count": numbers.size}


def table_head(title: str, columns: list[str]) -> str:
    """Title and first two lines of a Markdown table."""
    return f"**{title}**\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}"


def table_row(cells: list[Cell]) -> str:
    """One line of a Markdown table."""
    return f"| {' | '.join(map(shown_cell, cells))} |"


def shown_cell(cell: Cell) -> str:
    """A spread as "median (quartile to quartile)", other numbers with three significant digits."""
    if isinstance(cell, dict):
        middle, low, high = (shown_number(cell[name]) for name in ("median", "low", "high"))
        return middle if low == middle == high else f"{middle} ({low} to {high})"
    return cell if isinstance(cell, str) else "" if cell is None else shown_number(cell)


def shown_number(number: float) -> str:
    """Whole numbers in full, others with three significant digits."""
    if isinstance(number, int):
        return f"{number:,}"
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}"


def command() -> str:
    """The command line of this process; absolute paths become relative to the repository, or lose their folder."""
    module = Path(sys.argv[0]).stem
    words = ["python", "-m", f"benchmarks.{module}", *map(_portable, _without_results(sys.argv[1:]))]
    return shlex.join(words)


def _without_results(words: list[str]) -> list[str]:
    if "--results" in words:
        place = words.index("--results")
        return words[:place] + words[place + 2 :]
    return words


def _portable(word: str) -> str:
    path = Path(word)
    if not path.is_absolute():
        return word
    is_near = path.is_relative_to(REPOSITORY.parent)
    return os.path.relpath(path, REPOSITORY) if is_near else f"DIR/{path.name}"


def commit() -> str:
    """The checked-out commit, with "-dirty" if tracked files differ from it (except results and pages)."""
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout

    try:
        head = git("rev-parse", "--short=10", "HEAD").strip()
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results", ":!docs",
                      ":!*.md")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}-dirty" if changed.strip() else head


def machine() -> dict[str, Any]:
    """Processor, cores, memory, GPU, system. No host name."""
    return {"processor": _processor(), "cores": len(os.sched_getaffinity(0)),
            "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
            "gpu": _gpu(), "system": f"{platform.system()} {platform.machine()}",
            "load_average": round(os.getloadavg()[0], 1)}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _gpu() -> str | None:
    torch = sys.modules.get("torch")
    return torch.cuda.get_device_name() if torch is not None and torch.cuda.is_available() else None


def versions() -> dict[str, str]:
    """Versions of Python and of the recorded packages that this process imported."""
    found = {"python": platform.python_version()}
    for module, distribution in _DISTRIBUTIONS.items():
        if module in sys.modules:
            try:
                found[distribution] = importlib.metadata.version(distribution)
            except importlib.metadata.PackageNotFoundError:
                continue
    return found
