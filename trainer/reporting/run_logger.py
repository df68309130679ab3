"""A run's logs: metrics.jsonl (the record), TensorBoard, W&B and pictures. Written by rank 0 only."""

from __future__ import annotations

import json
import logging
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from shards.files.atomic import write_atomically
from shards.files.outside_json import parse_json
from shards.files.strict_json import nan_for_null, to_json
from shards.picture import encode_png
from shards.shown_text import masked
from trainer.reporting.wandb_run import WandbRun

_log = logging.getLogger(__name__)
METRICS_NAME = "metrics.jsonl"
EVALUATION_NAME = "evaluation.json"
PICTURES_NAME = "pictures"
SKIPPED_NAME = "skipped-samples.jsonl"
_BOARD_SECONDS = 20.0  # time limit for TensorBoard to close


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The records of a run in order; malformed lines, such as one cut short by a kill, are skipped.

    Non-finite numbers are written as null, and read back as NaN.
    """
    path = run / METRICS_NAME
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and type(record.get("step")) is int and "kind" in record:
            records.append(nan_for_null(record))
    return records


def read_evaluation(run: Path) -> dict[str, Any] | None:
    """All results of the last evaluation, with its step; None if there was none. ConfigError when it is malformed."""
    path = run / EVALUATION_NAME
    try:
        evaluation: dict[str, Any] = nan_for_null(parse_json(path.read_bytes(), str(path)))
    except FileNotFoundError:
        return None
    return evaluation


def append_skipped_samples(run: Path, step: int, rank: int, problems: Sequence[str]) -> None:
    """Append the corrupt samples that a step skipped to `<run>/skipped-samples.jsonl`, which all ranks write to.

    Each problem names shard and sample number; the key cannot be read from a corrupt sample.
    """
    if not problems:
        return
    lines = [to_json({"step": step, "rank": rank, "sample": problem}) for problem in problems]
    try:
        with (run / SKIPPED_NAME).open("a", encoding="utf-8") as file:
            file.write("\n".join([*lines, ""]))
    except OSError as error:
        warnings.warn(f"{SKIPPED_NAME} could not be written: {error}. Training continues", stacklevel=2)


class RunLogger:
    """Appends to the run's record from `step` on. Records that a killed run had logged beyond it are dropped; events
    stay.

    `wandb`: the Weights & Biases run that receives the same scalars and pictures.
    """

    def __init__(self, run: Path, step: int, wandb: WandbRun | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import (torch), and not needed to read a record

        self.run, self.wandb = run, wandb
        kept = [record for record in read_metrics(run) if record["step"] <= step or record["kind"] == "event"]
        write_atomically(run / METRICS_NAME, "".join(to_json(record) + "\n" for record in kept).encode())
        self._file = (run / METRICS_NAME).open("a", encoding="utf-8")
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)
        self._excepthook, threading.excepthook = threading.excepthook, self._thread_failed

    def scalars(self, step: int, kind: str, values: dict[str, float], **remarks: str) -> None:
        """One record, e.g. kind "train" or "val"; remarks only in metrics.jsonl."""
        with self._or_warn():
            self._record({"step": step, "kind": kind, **remarks, **values})
            for name, value in values.items():
                self._board.add_scalar(f"{kind}/{name}", value, step)
        if self.wandb is not None:
            self.wandb.log(step, {f"{kind}/{name}": value for name, value in values.items()})

    def evaluation(self, step: int, metrics: Mapping[str, dict[str, Any]]) -> None:
        """A record of the means of each kind of weights, averaged or raw: of kind "val" for those that count, which
        come first, and "val_raw" or "val_averaged" for the others.

        `<run>/evaluation.json` gets everything of the first, with classes and pairs. Which these are is only said where
        there are others ("weights"). An evaluation that only repeats the last one, as when a finished run's command is
        given again, adds no record.
        """
        first = next(iter(metrics))
        remarks = {"weights": first} if len(metrics) > 1 else {}
        logged = {record["kind"]: record for record in read_metrics(self.run)}  # the last of each kind
        for of_weights, values in metrics.items():
            kind = "val" if of_weights == first else f"val_{of_weights}"
            means = {name: value for name, value in values.items() if isinstance(value, float)}
            extra = remarks if of_weights == first else {}
            if to_json(logged.get(kind)) != to_json({"step": step, "kind": kind, **extra, **means}):
                self.scalars(step, kind, means, **extra)
        with self._or_warn():
            content = {"step": step, **remarks, **metrics[first]}
            write_atomically(self.run / EVALUATION_NAME, to_json(content, indent=1).encode())

    def event(self, step: int, what: str) -> None:
        """An unusual event that explains the curves, e.g. a restart or a skipped step."""
        with self._or_warn():
            what = masked(what)
            self._record({"step": step, "kind": "event", "what": what})
            self._board.add_text("events", what, step)

    def picture(self, step: int, name: str, picture: Image.Image) -> None:
        """Save a picture as `<run>/pictures/<name>-<step>.png`, in TensorBoard and in W&B."""
        folder = self.run / PICTURES_NAME
        with self._or_warn():
            folder.mkdir(exist_ok=True)
            write_atomically(folder / f"{name}-{step:08d}.png", encode_png(picture))
            self._board.add_image(name, np.asarray(picture), step, dataformats="HWC")
        if self.wandb is not None:
            self.wandb.picture(step, name, picture)

    def close(self) -> None:
        with self._or_warn():
            self._file.close()
        # A full disk kills TensorBoard's writer thread, and close() then waits for it forever.
        board = threading.Thread(target=self._close_board, daemon=True)
        board.start()
        board.join(_BOARD_SECONDS)
        threading.excepthook = self._excepthook
        if self.wandb is not None:
            self.wandb.close()

    def _thread_failed(self, failure: threading.ExceptHookArgs) -> None:
        """Report a TensorBoard thread that died of a full disk in one line, instead of its traceback."""
        if type(failure.thread).__module__.startswith("tensorboard") and isinstance(failure.exc_value, OSError):
            _log.warning("warning: TensorBoard files in %s are no longer written: %s. Training continues", self.run,
                         failure.exc_value)
        else:
            self._excepthook(failure)

    def _close_board(self) -> None:
        with suppress(OSError):
            self._board.close()

    @contextmanager
    def _or_warn(self) -> Iterator[None]:
        """Turn OSErrors into warnings: a full disk may cost records, but not the run."""
        try:
            yield
        except OSError as error:
            place, reason = error.filename or self.run, error.strerror or error
            warnings.warn(f"the record in {place} could not be written: {reason}. Training continues", stacklevel=4)

    def _record(self, record: dict[str, Any]) -> None:
        self._file.write(to_json(record) + "\n")
        self._file.flush()
