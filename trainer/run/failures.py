"""Turn hardware and network failures into one-line errors that name rank, host, step and the settings to change."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from shards.errors import RunError
from trainer.data.loader import LoaderError
from trainer.distributed import DistContext
from trainer.out_of_memory import OutOfMemory, allocator_error
from trainer.run.run import Run

# Messages of gloo and NCCL when a peer is gone.
_LOST_RANK = ("Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe",
              "NCCL communicator was aborted", "remote process exited", "Socket Timeout", "Timed out waiting",
              "no longer reachable")


class RankLost(RunError):
    """Another rank died or became unreachable."""


@contextmanager
def explain_failures(run: Run) -> Iterator[None]:
    """Turn memory, network and loader errors into one line naming rank, host and step."""
    try:
        with explain_lost_rank(lambda: _where(run), "The same command resumes from the newest checkpoint"):
            yield
    except (LoaderError, OutOfMemory) as error:
        raise type(error)(f"{_where(run)}: {error}") from error
    except (RuntimeError, MemoryError) as error:
        if (line := allocator_error(error)) is not None:
            raise OutOfMemory(f"{_where(run)}: out of memory ({line}). {_settings(run)}") from error
        raise


@contextmanager
def explain_lost_rank(where: Callable[[], str], advice: str) -> Iterator[None]:
    """Turn what a collective raises when another rank is gone into RankLost; `advice` ends its message."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if allocator_error(error) is not None or not any(sign in text for sign in _LOST_RANK):
            raise
        raise RankLost(f"{where()}: another rank died or became unreachable ({_first_line(text)}); see its own output "
                       f"for the cause. {advice}") from error


def place_of(context: DistContext) -> str:
    """A rank, and the host that it runs on."""
    return f"rank {context.rank} on {socket.gethostname()}"


def _where(run: Run) -> str:
    return f"{place_of(run.context)}, step {run.step + 1}"


def _first_line(text: str) -> str:
    line = text.strip().splitlines()[0] if text.strip() else "no details"
    return line.partition(". This is")[0][:300]  # gloo's speculation about the cause follows


def _settings(run: Run) -> str:
    config = run.config
    crop = config.data.crop_size or "as stored"
    fsdp = ("set train.fsdp=true, so that ranks share the trained weights; "
            if config.backbone.trainable and run.context.world_size > 1 and not config.train.fsdp
            and config.train.precision != "fp16" and not config.train.compile else "")
    return (
        f"Lower train.micro_batch_size (now {config.train.micro_batch_size}; the global batch stays "
        f"{config.train.global_batch_size} through accumulation); set train.gradient_checkpointing=true (now "
        f"{str(config.train.gradient_checkpointing).lower()}); {fsdp}lower data.crop_size (now {crop}), "
        f"loss.num_points (now {config.loss.num_points}) or, if this was during evaluation, eval.crop_size (now "
        f"{config.eval.crop_size}). "
        f"For host memory, lower data.workers (now {config.data.workers}), data.prefetch_batches (now "
        f"{config.data.prefetch_batches}), data.read_ahead_mb (now {config.data.read_ahead_mb})"
    )
