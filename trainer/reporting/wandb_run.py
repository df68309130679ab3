"""Logging to Weights & Biases (extra `wandb`); W&B's environment variables select server and account."""

from __future__ import annotations

import secrets
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from shards.errors import ConfigError
from shards.files.atomic import write_atomically
from shards.shown_text import masked_value

_ID_NAME = "wandb-id"  # file in the run's folder, so that a resumed run continues the same W&B run


class WandbRun:
    """One run of `project`; WANDB_MODE=offline keeps it in `<run>/wandb`, to be uploaded by `wandb sync`."""

    def __init__(self, run: Path, project: str, config: dict[str, Any]) -> None:
        """Raises ConfigError when wandb is not installed, or cannot start (no login, no network)."""
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(f"train.wandb_project is {project!r} but wandb is not installed; run `pip install "
                              "maskstream[wandb]`, or set train.wandb_project=null") from error
        self._image = wandb.Image
        sys.argv[:] = map(masked_value, sys.argv)  # W&B stores the command line, which may contain secrets
        try:
            self._run = wandb.init(project=project, name=run.name, id=_run_id(run), resume="allow", dir=str(run),
                                   config=config)
        except wandb.Error as error:
            raise ConfigError(f"train.wandb_project is {project!r} but wandb failed to start: {error} Run `wandb "
                              "login`, or set WANDB_MODE=offline") from error
        # W&B's own step can only increase, but a resumed run logs the steps after its checkpoint again.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: dict[str, float]) -> None:
        """Log scalars under their full names, e.g. "train/loss"."""
        self._run.log({**values, "step": step})

    def picture(self, step: int, name: str, picture: Image.Image) -> None:
        """Log a picture, e.g. "val-panels"."""
        self._run.log({name: self._image(picture), "step": step})

    def close(self) -> None:
        """Finish the run, uploading anything pending."""
        self._run.finish()


def _run_id(run: Path) -> str:
    path = run / _ID_NAME
    if not path.exists():
        write_atomically(path, secrets.token_hex(8).encode())
    return path.read_text(encoding="ascii").strip()
