"""Whatever killed processes leave behind, the next start removes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shards import workers
from shards.mirror import copy_set
from shards.verify import verify
from tests.conftest import REPOSITORY
from tests.support.object_storage import FaultyProxy

SEMAPHORES = Path("/dev/shm")
LOADING = """
import sys
import torch
from trainer.data_config import DataConfig
from trainer.data.crops import open_reader
from trainer.data.loader import validation_loader
from trainer.data.whole_images import WholeImages

if __name__ == "__main__":
    config = DataConfig(root=sys.argv[1], workers=2)
    items = validation_loader(WholeImages(open_reader(config, "val"), config), range(4), torch.device("cpu"))
    print(next(items).key, flush=True)
    sys.stdin.readline()
    print(len(list(items)), flush=True)
"""


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A separate TMPDIR with a short path."""
    folder = Path(tempfile.mkdtemp(prefix="left-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


def start(temporary: Path, *command: object) -> subprocess.Popen[str]:
    """Start programs in a process group of their own."""
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=REPOSITORY, text=True, start_new_session=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"})


def kill_all(process: subprocess.Popen[str]) -> None:
    """kill -9 the group, and the loader processes, each of which has its own group."""
    children = children_of(process.pid)
    loaders = [loader for child in children for loader in children_of(child)]
    os.killpg(process.pid, signal.SIGKILL)
    for loader in loaders:
        with contextlib.suppress(ProcessLookupError):
            os.kill(loader, signal.SIGKILL)
    process.communicate()


def children_of(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return [int(child) for child in found.stdout.split()]


def semaphores(temporary: Path) -> set[Path]:
    """Semaphores of the processes whose folders are, or were, in `temporary`."""
    return {path for folder in temporary.glob("mstream-*") for path in SEMAPHORES.glob(f"sem.{folder.name}-*")}


@pytest.mark.slow
def test_killed_loader_processes_leave_nothing_after_the_next_start(scene_shards: Path, temporary: Path) -> None:
    loading = temporary / "loading.py"
    loading.write_text(f"import sys\nsys.path.insert(0, {str(REPOSITORY)!r})\n{LOADING}")
    killed = start(temporary, loading, scene_shards)
    assert killed.stdout is not None and killed.stdout.readline().startswith("scene_val"), killed.stderr
    kill_all(killed)
    left, folders = semaphores(temporary), set(temporary.glob("mstream-*"))
    assert len(left) >= 3 and len(folders) == 1, "the test is of a case that leaves something"
    again = start(temporary, loading, scene_shards)
    assert again.stdout is not None and again.stdout.readline().startswith("scene_val")
    assert not any(path.exists() for path in left | folders)
    other = start(temporary, loading, scene_shards)  # while that one lives
    assert other.stdout is not None and other.stdout.readline().startswith("scene_val")
    assert len(set(temporary.glob("mstream-*"))) == 2, "the living keep theirs"
    own = semaphores(temporary)
    for process in (again, other):
        out, err = process.communicate("go on\n", timeout=60)
        assert out == "3\n" and process.returncode == 0 and err == ""
    assert not any(path.exists() for path in own) and set(temporary.iterdir()) == {loading}


@pytest.mark.slow
def test_killed_preprocessing_leaves_nothing_after_the_next_start(scenes: Path, temporary: Path,
                                                                  tmp_path: Path) -> None:
    command = ("preprocess/make_shards.py", "--dataset", "folder", "--root", scenes, "--output", tmp_path / "set",
               "crops.size=64", "images_per_shard=1", "crops.per_image=20", "workers=2")
    killed = start(temporary, *command)
    deadline = time.monotonic() + 60
    while len(semaphores(temporary)) < 3:
        assert time.monotonic() < deadline and killed.poll() is None
        time.sleep(0.01)
    kill_all(killed)
    left, folders = semaphores(temporary), set(temporary.glob("mstream-*"))
    assert left and folders
    again = start(temporary, *command)
    assert again.communicate(timeout=120) and again.returncode == 0
    assert not any(path.exists() for path in left | folders) and list(temporary.iterdir()) == []
    assert verify(tmp_path / "set") == []


@pytest.mark.slow
def test_a_killed_copy_between_object_stores_leaves_no_file(s3: FaultyProxy, s3_shards: str, temporary: Path) -> None:
    s3.delay = 0.1
    copying = start(temporary, "-m", "shards", "copy", s3_shards, f"{s3_shards}-copy")
    s3.writes.clear()
    deadline = time.monotonic() + 60
    while not s3.writes:  # a file has come, and goes
        assert time.monotonic() < deadline and copying.poll() is None
        time.sleep(0.01)
    kill_all(copying)
    assert list(temporary.iterdir()) == []
    s3.delay = 0
    assert copy_set(s3_shards, f"{s3_shards}-copy") > 0 and verify(f"{s3_shards}-copy") == []


def test_only_what_is_ours_and_dead_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["mstream-deadbeef", "mstream-alive123", "mstream-nolock12", "mstream-longer-name", "other-12345678"]
    for name in names:
        (tmp_path / name).mkdir()
    (tmp_path / "precious").mkdir()
    (tmp_path / "mstream-linked12").symlink_to(tmp_path / "precious")
    monkeypatch.setattr(workers, "_SEMAPHORES", tmp_path)
    for name in ("deadbeef", "alive123"):
        (tmp_path / f"mstream-{name}" / "lock").touch()
        (tmp_path / f"sem.mstream-{name}-x").touch()
    (tmp_path / "sem.mp-x").touch()
    with (tmp_path / "mstream-alive123" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        workers._remove_dead(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "mstream-alive123", "mstream-longer-name", "mstream-linked12", "other-12345678", "precious", "sem.mp-x",
        "sem.mstream-alive123-x"}
    owner = os.geteuid()
    (tmp_path / "mstream-theirs12").mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    workers._remove_dead(tmp_path)
    assert (tmp_path / "mstream-theirs12").exists() and (tmp_path / "precious").exists()


def test_where_nothing_can_be_locked_nothing_is_taken_for_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    folder, lock = workers._make_folder(tmp_path)
    workers._remove_dead(tmp_path)
    assert folder.exists() and folder.stat().st_mode & 0o777 == 0o700
    workers._remove(folder, lock)
    assert list(tmp_path.iterdir()) == []
