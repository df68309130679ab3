"""Checkpoints: whole or not at all, verified, written beside training, thinned out, on a disk or in object storage."""

from __future__ import annotations

import hashlib
import random
import resource
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from shards.errors import ConfigError
from trainer import checkpoint_writer
from trainer.checkpoint import Checkpoint, load_checkpoint, load_latest
from trainer.checkpoint_writer import CheckpointError, CheckpointWriter

REPOSITORY = Path(__file__).resolve().parent.parent


def state(step: int, size: int = 1000) -> Checkpoint:
    return Checkpoint(step=step, model={"weight": torch.full((size,), float(step))}, optimizer={"state": [step]},
                      config={}, classes=[], ignore_index=255, data_hash="d", backbone_sha256="b", best_miou=None,
                      evaluated=False, skipped_steps=[], versions={})


def written(folder: Path | str, scratch: Path, *steps: int, keep: int = 2, keep_every: int | None = None,
            best: int | None = None) -> None:
    writer = CheckpointWriter(folder, scratch, keep, keep_every)
    for step in steps:
        writer.save(state(step), is_best=step == best)
    writer.close()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_are_kept_and_the_best_and_every_so_many(tmp_path: Path) -> None:
    written(tmp_path, tmp_path, 1, 2, 3, 4, 5, 6, 7, keep_every=3, best=2)
    kept = [f"step-0000000{step}.pt{suffix}" for step in (3, 6, 7) for suffix in ("", ".sha256")]
    assert names(tmp_path) == ["best.pt", "best.pt.sha256", *kept]
    for name in ("best.pt", "step-00000007.pt"):
        found_hash = hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        assert (tmp_path / f"{name}.sha256").read_text() == f"{found_hash}  {name}\n"
    assert load_checkpoint(tmp_path / "best.pt").step == 2
    found = load_latest(tmp_path)
    assert found is not None and found.step == 7 and torch.equal(found.model["weight"], torch.full((1000,), 7.0))


def test_hashes_are_what_sha256sum_reads(tmp_path: Path) -> None:
    written(tmp_path, tmp_path, 1)
    name = "step-00000001.pt"
    expected = hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
    assert (tmp_path / f"{name}.sha256").read_text() == f"{expected}  {name}\n"


def test_one_changed_bit_is_noticed_where_torch_reads_on(tmp_path: Path) -> None:
    written(tmp_path, tmp_path, 1, 2)
    newest = tmp_path / "step-00000002.pt"
    data = bytearray(newest.read_bytes())
    place = data.index(torch.full((8,), 2.0).numpy().tobytes())
    data[place + 1] ^= 1
    newest.write_bytes(data)
    with pytest.warns(UserWarning, match=r"step-00000002\.pt cannot be read, it is damaged: its sha256.*Falling back"):
        found = load_latest(tmp_path)
    assert found is not None and found.step == 1
    (tmp_path / "step-00000001.pt").unlink()
    with pytest.warns(UserWarning), pytest.raises(ConfigError, match="none of the 1 checkpoints"):
        load_latest(tmp_path)


def test_a_checkpoint_without_a_hash_is_read_as_far_as_torch_can_check_it(tmp_path: Path) -> None:
    written(tmp_path, tmp_path, 1)
    (tmp_path / "step-00000001.pt.sha256").unlink()
    found = load_latest(tmp_path)
    assert found is not None and found.step == 1


def test_training_goes_on_while_a_copy_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, save = threading.Event(), torch.save

    def slow(*arguments: object) -> None:
        assert go_on.wait(30)
        save(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(checkpoint_writer.torch, "save", slow)
    writer, checkpoint = CheckpointWriter(tmp_path, tmp_path, 2, None), state(1)
    writer.save(checkpoint, is_best=False)
    checkpoint.model["weight"].zero_()  # the next step
    go_on.set()
    writer.close()
    found = load_latest(tmp_path)
    assert found is not None and torch.equal(found.model["weight"], torch.ones(1000))


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """As on a disk that is nearly full: writing beyond it fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_a_warning_and_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, tmp_path, 1, None)
    writer.save(state(1), is_best=False)
    writer.wait()
    with files_of_at_most(100_000):
        writer.save(state(2, size=1_000_000), is_best=True)
        with pytest.warns(UserWarning, match=r"could not be written to .*\. Training goes on"):
            writer.wait()
    assert names(tmp_path) == ["step-00000001.pt", "step-00000001.pt.sha256"], "nothing half-written is left"
    writer.save(state(3), is_best=False)  # room again
    writer.close()
    found = load_latest(tmp_path)
    assert found is not None and found.step == 3


def test_the_last_checkpoint_must_be_written(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, tmp_path, 1, None)
    with files_of_at_most(100_000):
        writer.save(state(2, size=1_000_000), is_best=False)
        with pytest.warns(UserWarning), pytest.raises(CheckpointError, match="could not be written"):
            writer.close()


_WRITE_FOR_EVER = """
import sys
from pathlib import Path
from tests.test_trainer_checkpoints import state
from trainer.checkpoint import load_latest
from trainer.checkpoint_writer import CheckpointWriter

folder = Path(sys.argv[1])
found = load_latest(folder)
writer = CheckpointWriter(folder, folder, 2, 50)
print("begun", flush=True)
step = found.step if found else 0
while True:
    step += 1
    writer.save(state(step, 300_000), is_best=step % 3 == 0)
"""


def test_a_kill_at_any_moment_leaves_a_sound_checkpoint(tmp_path: Path) -> None:
    rng, last = random.Random(0), 0
    for _ in range(5):
        process = subprocess.Popen([sys.executable, "-W", "error", "-c", _WRITE_FOR_EVER, tmp_path], cwd=REPOSITORY,
                                   stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "begun\n"
        time.sleep(rng.uniform(0.05, 0.4))
        process.kill()
        process.communicate()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = load_latest(tmp_path)
        step = 0 if found is None else found.step
        assert step >= last
        last = step
    assert last > 5


def test_damaged_later_checkpoints_push_out_no_sound_one(tmp_path: Path) -> None:
    written(tmp_path, tmp_path, 1, 2)
    (tmp_path / "step-00000009.pt").write_bytes((tmp_path / "step-00000002.pt").read_bytes()[:500])
    (tmp_path / "step-00000009.pt.sha256").write_text("00  step-00000009.pt\n")
    written(tmp_path, tmp_path, 3, keep=1)
    with pytest.warns(UserWarning, match="Falling back"):
        found = load_latest(tmp_path)
    assert found is not None and found.step == 3


def test_checkpoints_live_in_object_storage_too(s3_root: str, tmp_path: Path) -> None:
    place = f"{s3_root}/checkpoints"
    assert load_latest(place) is None
    written(place, tmp_path, 1, 2, 3, best=2)
    found = load_latest(place)
    assert found is not None and found.step == 3
    assert names(tmp_path) == [], "nothing is left on the local disk"
    writer = CheckpointWriter(place, tmp_path, 2, None)
    assert writer.storage.sizes() is not None
    assert sorted(writer.storage.sizes() or {}) == [
        name + suffix for name in ("best.pt", "step-00000002.pt", "step-00000003.pt") for suffix in ("", ".sha256")]
    data = bytearray(writer.storage.read("step-00000003.pt"))
    data[len(data) // 2] ^= 1
    writer.storage.write("step-00000003.pt", bytes(data))
    with pytest.warns(UserWarning, match="Falling back"):
        found = load_latest(place)
    assert found is not None and found.step == 2
