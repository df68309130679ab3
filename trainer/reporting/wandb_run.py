"""A run in Weights & Biases, which the extra `wandb` brings; where it is sent is for W&B's environment to say."""

from __future__ import annotations

import secrets
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from shards.errors import ConfigError
from shards.files.atomic import write_atomically
from shards.shown_text import masked_value

_ID_NAME = "wandb-id"  # file in the run's folder: a continued run is the same one there


class WandbRun:
    """One run of `project`; WANDB_MODE=offline keeps it in `<run>/wandb`, to be sent by `wandb sync`."""

    def __init__(self, run: Path, project: str, config: dict[str, Any]) -> None:
        """Raises ConfigError when wandb is not installed, or cannot start (no login, no network)."""
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(f"train.wandb_project is {project!r} and wandb is not installed: "
                              "pip install maskstream[wandb], or set train.wandb_project=null") from error
        self._image = wandb.Image
        sys.argv[:] = map(masked_value, sys.argv)  # which W&B stores as well
        try:
            self._run = wandb.init(project=project, name=run.name, id=_run_id(run), resume="allow", dir=str(run),
                                   config=config)
        except wandb.Error as error:
            raise ConfigError(f"train.wandb_project is {project!r} and wandb did not start: {error} Run `wandb "
                              "login`, or set WANDB_MODE=offline") from error
        # W&B's own step may only grow, and a continued run logs again what came after its checkpoint.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: dict[str, float]) -> None:
        """Scalars under their full names, e.g. "train/loss"."""
        self._run.log({**values, "step": step})

    def picture(self, step: int, name: str, picture: Image.Image) -> None:
        """A picture, e.g. "val-panels"."""
        self._run.log({name: self._image(picture), "step": step})

    def close(self) -> None:
        """Send what is left."""
        self._run.finish()


def _run_id(run: Path) -> str:
    path = run / _ID_NAME
    if not path.exists():
        write_atomically(path, secrets.token_hex(8).encode())
    return path.read_text(encoding="ascii").strip()
