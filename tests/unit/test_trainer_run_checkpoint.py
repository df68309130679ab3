"""Checkpoints: atomic, verified, written in the background, thinned out, on disk or object storage."""

from __future__ import annotations

import hashlib
import os
import random
import resource
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from shards.errors import ConfigError
from tests.support.zygote import Forked
from trainer.run import checkpoint_writer
from trainer.run.checkpoint import Checkpoint, load_checkpoint, load_latest
from trainer.run.checkpoint_writer import CheckpointError, CheckpointWriter, TakenOver
from trainer.run.folder import FolderInUse, lock_run_folder
from trainer.run.identity import check_identity, lock_checkpoints, run_id

REPOSITORY = Path(__file__).resolve().parent.parent.parent


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
    """Like a nearly full disk: writing beyond it fails."""
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
        with pytest.warns(UserWarning, match=r"could not be written to .*\. Training continues"):
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
import warnings
from pathlib import Path
sys.path.insert(0, sys.argv[2])
warnings.simplefilter("error")
from tests.unit.test_trainer_run_checkpoint import state
from trainer.run.checkpoint import load_latest
from trainer.run.checkpoint_writer import CheckpointWriter

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
    rng, last, folder = random.Random(0), 0, tmp_path / "checkpoints"
    folder.mkdir()
    (tmp_path / "write.py").write_text(_WRITE_FOR_EVER)
    for number in range(5):
        said = tmp_path / f"{number}.log"
        process = Forked([str(tmp_path / "write.py"), str(folder), str(REPOSITORY)], said, dict(os.environ))
        while not said.exists() or said.read_text() != "begun\n":
            assert process.poll() is None, said.read_text()
            time.sleep(0.01)
        time.sleep(rng.uniform(0.05, 0.4))
        process.kill()
        process.wait()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = load_latest(folder)
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


# A checkpoint of a step that exists is written again


class Killed(BaseException):
    """Simulates the death of the process."""


class Death:
    """Counts calls; from a given one on, they are not made."""

    def __init__(self, at: int) -> None:
        self.at, self.calls = at, 0

    def before(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            if self.calls >= self.at:
                raise Killed
            return call(*arguments, **options)
        return counted


def again(place: Path | str, scratch: Path, prepare: Callable[[CheckpointWriter], object]) -> bool:
    """Write step 2 again, with other values and as the best; returns whether that was killed."""
    writer = CheckpointWriter(place, scratch, 2, None)
    prepare(writer)
    checkpoint = state(2)
    checkpoint.model["weight"] = torch.full((1000,), 20.0)
    try:
        writer.save(checkpoint, is_best=True)
        writer.close()
    except Killed:
        return True
    return False


def assert_step_2_is_whole(place: Path | str) -> None:
    """Either the old or the new checkpoint loads, with nothing damaged on the way to it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = load_latest(place)
    assert found is not None and found.step == 2 and found.model["weight"][0] in (2.0, 20.0)


def test_a_kill_between_any_two_system_calls_leaves_the_old_or_the_new(tmp_path: Path,
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    for at in range(1, 100):
        folder = tmp_path / str(at)
        folder.mkdir()
        written(folder, folder, 1, 2, best=2)
        death = Death(at)
        with monkeypatch.context() as patch:
            for name in ("replace", "unlink", "fsync"):
                patch.setattr(os, name, death.before(getattr(os, name)))
            killed = again(folder, folder, lambda writer: None)
        assert_step_2_is_whole(folder)
        for name in ("best.pt", "step-00000002.pt"):
            assert load_checkpoint(folder / name).step == 2
        if not killed:
            assert at > 10, "there were so many calls"
            return
    pytest.fail("it never ended")


def test_on_object_storage_too(s3_root: str, tmp_path: Path) -> None:
    for at in range(1, 100):
        place = f"{s3_root}/{at}"
        written(place, tmp_path, 1, 2, best=2)

        def deadly(writer: CheckpointWriter, death: Death) -> None:
            for name in ("delete", "upload", "write"):
                setattr(writer.storage, name, death.before(getattr(writer.storage, name)))

        killed = again(place, tmp_path, partial(deadly, death=Death(at)))
        assert_step_2_is_whole(place)
        if not killed:
            assert at == 7, "drop, publish, hash: of best.pt and of step-2"
            return


def test_what_killed_writers_left_is_removed_by_the_next_start(tmp_path: Path) -> None:
    place = tmp_path / "checkpoints"
    place.mkdir()
    for name in (".best.pt.4711.tmp", ".step-00000001.pt.sha256.12.tmp", ".checkpoint.tmp", ".mine.tmp"):
        (place / name).write_bytes(b"half")
    (tmp_path / ".state.json.99.tmp").write_bytes(b"half")
    with lock_run_folder(tmp_path), lock_checkpoints(place, tmp_path):
        assert names(place) == [".lock", ".mine.tmp", "owner.json"]
        assert names(tmp_path) == [".lock", "checkpoints", "run-id"]


# One place, one run


@pytest.fixture(params=["folder", "object storage"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "shared") if request.param == "folder" else str(request.getfixturevalue("s3_root"))


def run_at(place: str, folder: Path, step: int) -> str:
    """A start of the run in `folder` that writes a checkpoint; returns its identity."""
    folder.mkdir(exist_ok=True)
    with lock_checkpoints(place, folder):
        checkpoint = state(step)
        checkpoint.run_id = run_id(folder)
        with CheckpointWriter(place, folder, 2, None) as writer:
            writer.save(checkpoint, is_best=False)
            writer.close()
    return run_id(folder)


def test_a_run_keeps_its_place_and_others_are_refused_by_name(place: str, tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    identity = run_at(place, one, 1)
    assert run_at(place, one, 2) == identity and len(identity) == 16
    with pytest.raises(ConfigError) as refused:
        run_at(place, other, 1)
    assert str(one) in str(refused.value) and str(other) in str(refused.value) and identity in str(refused.value)
    one.rename(tmp_path / "moved")
    assert run_at(place, tmp_path / "moved", 3) == identity, "a folder may be moved"
    (tmp_path / "moved/run-id").unlink()
    assert run_at(place, tmp_path / "moved", 4) == identity, "and its disk be lost"
    found = load_latest(place)
    assert found is not None and (found.step, found.run_id) == (4, identity)


def test_a_place_without_checkpoints_may_change_hands(place: str, tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        with lock_checkpoints(place, tmp_path / name):
            pass
    assert run_id(tmp_path / "one") != run_id(tmp_path / "other")


def test_a_start_that_was_killed_is_taken_over_and_cannot_write_any_more(s3_root: str, tmp_path: Path) -> None:
    killed, writer = lock_checkpoints(s3_root, tmp_path), CheckpointWriter(s3_root, tmp_path, 2, None)
    killed.__enter__()  # and never leaves: kill -9, or a node that was cut off
    with writer:
        writer.save(state(1), is_best=False)
        writer.wait()
        run_at(s3_root, tmp_path, 2)
        with pytest.raises(TakenOver, match="another process has taken over s3://"):
            writer.save(state(3), is_best=False)
            writer.wait()
    killed.__exit__(None, None, None)
    found = load_latest(s3_root)
    assert found is not None and found.step == 2


def test_a_folder_of_checkpoints_is_locked(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    with lock_checkpoints(tmp_path / "shared", tmp_path / "one"), \
            pytest.raises(FolderInUse, match=r"shared is in use by a run \(process .* another train\.checkpoint_dir"), \
            lock_run_folder(tmp_path / "shared", 0.1, "train.checkpoint_dir"):
        pytest.fail("it is locked")


def test_a_checkpoint_of_another_run_among_ones_own_is_refused() -> None:
    check_identity("a", Path("mine"), "", "old")
    check_identity("a", Path("mine"), "a", "elsewhere")
    message = r"belongs to the run in runs/theirs \(b\), not to the run in mine \(a\); choose another"
    with pytest.raises(ConfigError, match=message):
        check_identity("a", Path("mine"), "b", "runs/theirs")


def test_a_malformed_owner_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "owner.json").write_text('{"run_id": ' + "9" * 5000 + "}")
    with pytest.raises(ConfigError, match=r"owner\.json is malformed, .*remove it"), \
            lock_checkpoints(tmp_path, tmp_path):
        pytest.fail("whose is it?")
