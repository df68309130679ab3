"""Show a run's status: whether it is running, its progress, speed and results so far.

example: python trainer/status.py runs/ade20k-m2f
Exit code: 0 running or finished; 75 stopped or lost: run the same training command again (for job-queueing scripts);
1 failed; 2 no run in this folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import socket
import time
from pathlib import Path
from typing import Any

try:
    from shards.cli.command_line import run_entry_point
    from shards.errors import ConfigError
    from shards.files.strict_json import to_json
    from shards.shown_text import shown
    from trainer.reporting.run_logger import METRICS_NAME, read_metrics
    from trainer.reporting.state import STATE_NAME, RunState, format_duration, read_state
    from trainer.run.folder import LOCK_NAME, is_used
except ImportError as error:
    raise SystemExit(f"error: {error}; is MaskStream installed (pip install -e .), or does another package named "
                     "shards or trainer shadow it?") from None

EXIT_CODES = {"running": 0, "finished": 0, "failed": 1, "stopped": 75, "lost": 75}  # 75: EX_TEMPFAIL of sysexits.h
_EVENTS_SHOWN = 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run's folder (output_dir)")
    parser.add_argument("--json", action="store_true", help="print the state as JSON; its status can also be \"lost\"")
    arguments = parser.parse_args()
    state = read_state(arguments.run)
    if state is None:
        return _print_without_state(arguments.run, arguments.json)
    records, now = read_metrics(arguments.run), time.time()
    try:
        is_lost = state.is_lost(_steps_between_updates(records), now, is_used(arguments.run))
        status = "lost" if is_lost else state.status
        lines = _lines(arguments.run, status, state, records, now)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise ConfigError(f"{arguments.run / METRICS_NAME} contains a malformed record: {error!r}") from error
    if arguments.json:
        print(to_json(dataclasses.asdict(state) | {"status": status}, indent=1))
    else:
        print("\n".join(map(shown, lines)))  # escape control characters: the JSON may contain anything
    return EXIT_CODES[status]


def _print_without_state(run: Path, as_json: bool) -> int:
    """Status of a run that locked its folder but has not written state.json yet, or died before it did."""
    if not (run / LOCK_NAME).exists():
        raise ConfigError(f"{run / STATE_NAME} does not exist: no run was started in {run}")
    status = "running" if is_used(run) else "lost"
    verdict = {"running": "running: it has just started",
               "lost": "lost: it was killed before it wrote its state; run the same command again"}[status]
    print(to_json({"status": status}, indent=1) if as_json else f"{run}: {verdict}")
    return EXIT_CODES[status]


def _steps_between_updates(records: list[dict[str, Any]]) -> int:
    steps = [record["step"] for record in records if record["kind"] == "train"]
    return steps[-1] - steps[-2] if len(steps) > 1 else 1


def _lines(run: Path, status: str, state: RunState, records: list[dict[str, Any]], now: float) -> list[str]:
    lines = [f"{run}: {_verdict(status, state, now)}", f"  step        {state.step}/{state.total_steps} "
             f"({state.step / state.total_steps:.1%})"]
    if status == "running" and state.seconds_left is not None:
        lines[-1] += f", {state.seconds_per_step:.3g} s/step, ETA {format_duration(state.seconds_left)}"
    train = [record for record in records if record["kind"] == "train"]
    val = [record for record in records if record["kind"] == "val"]
    if train:
        lines.append(f"  loss        {train[-1]['loss']:.4f}, gradient norm {train[-1]['grad_norm']:.2f}, "
                     f"lr {train[-1]['lr']:.2e}, {train[-1]['images_per_second']:.1f} images/s")
    if val:
        best = f", best {state.best_miou:.4f}" if state.best_miou is not None else ""
        of = f" of the {val[-1]['weights']} weights" if "weights" in val[-1] else ""
        lines.append(f"  mIoU        {val[-1]['mIoU']:.4f}{of} at step {val[-1]['step']}{best}")
    lines.append(f"  checkpoint  {state.checkpoint or 'none yet'}")
    lines += [f"  event       step {record['step']}: {record.get('what')}"
              for record in records if record["kind"] == "event"][-_EVENTS_SHOWN:]
    return lines


def _verdict(status: str, state: RunState, now: float) -> str:
    place = f"{state.world_size} rank(s), process {state.pid} on {state.host}"
    silent = format_duration(now - state.updated)
    if status == "lost":
        here = state.host == socket.gethostname()
        why = "has exited or hangs, and" if here else "is on another host, and"
        return f"lost: {place} {why} has been silent for {silent}; resume with the same command"
    if status == "running":
        return f"running for {format_duration(now - state.started)}, last update {silent} ago; {place}"
    if status == "stopped":
        return f"stopped {silent} ago{_reason(state)}; resume with the same command"
    if status == "failed":
        return f"failed {silent} ago{_reason(state)}"
    return f"finished {silent} ago{_reason(state)}"


def _reason(state: RunState) -> str:
    return f": {state.message}" if state.message else ""


if __name__ == "__main__":
    run_entry_point(main)
