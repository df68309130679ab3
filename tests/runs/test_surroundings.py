"""Real machines: no locks, full disks, terminals without Unicode, killed processes."""

from __future__ import annotations

import copy
import errno
import fcntl
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any

import pytest

from shards.cli.command_line import run_entry_point
from shards.errors import ConfigError
from shards.exports.coco_files import export_coco
from shards.exports.staging import staged_folder
from shards.files import locks
from shards.files.atomic import copy_atomically, naming, write_atomically
from shards.files.cache import DiskCache
from shards.files.locks import among_writers, only_writer
from shards.files.storage import LocalStorage
from shards.manifest import MANIFEST_NAME, load_manifest
from shards.mirror import copy_set
from shards.picture import save_picture
from shards.verify import verify
from shards.workers import use_own_temporary_folder
from shards.writer import ShardWriter
from tests.conftest import REPOSITORY, make_shards
from trainer.run.folder import is_used, lock_run_folder

NO_LOCKS = [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP]


# -- locks --------------------------------------------------------------------------------------------------


@pytest.fixture(params=NO_LOCKS)
def no_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    use_own_temporary_folder()  # locked while this process can: other processes must not take its folder for a leftover

    def flock(file: Any, operation: int) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.usefixtures("no_locks")
def test_where_files_cannot_be_locked_all_go_on_with_a_warning(scenes: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"set cannot be locked \(.*\): make sure that no other run uses it"):
        make_shards(tmp_path / "set", scenes)
    with pytest.warns(UserWarning, match=r"mirror cannot be locked"):
        assert copy_set(tmp_path / "set", tmp_path / "mirror") == 13
    assert verify(tmp_path / "set") == verify(tmp_path / "mirror") == []
    with pytest.warns(UserWarning, match=r"run cannot be locked"), lock_run_folder(tmp_path / "run"):
        assert is_used(tmp_path / "run") is None
    cache = DiskCache(folder=tmp_path / "cache", limit=1000)
    with pytest.warns(UserWarning, match=r"cache cannot be locked"):
        for number in range(20):
            cache.get(str(number), lambda: bytes(300))
    assert sum(path.stat().st_size for path in (tmp_path / "cache").glob("??/*")) <= 1000 + 1000 // 50 + 304


def test_a_lock_that_another_holds_is_still_refused(tmp_path: Path) -> None:
    refused = pytest.raises(ConfigError, match=f"another run is writing to {tmp_path}")
    with only_writer(tmp_path / "lock", tmp_path), refused, only_writer(tmp_path / "lock", tmp_path):
        pass


def test_only_the_first_of_several_writers_tidies_up(tmp_path: Path) -> None:
    calls: list[str] = []
    with among_writers(tmp_path / "lock", lambda: calls.append("first")):
        with among_writers(tmp_path / "lock", lambda: calls.append("second")):
            pass
        assert (tmp_path / "lock").exists()
    assert calls == ["first"] and not (tmp_path / "lock").exists()
    with among_writers(tmp_path / "lock", lambda: calls.append("third")):
        assert calls == ["first", "third"]


@pytest.fixture
def removed_when_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first process to open a lock file finds that its last holder removes it before it can be locked."""
    real, opened = locks.open_lock, list[Path]()

    def open_lock(path: Path) -> IO[str]:
        file = real(path)
        if not opened:
            opened.append(path)
            path.unlink()
            path.parent.rmdir()
        return file

    monkeypatch.setattr(locks, "open_lock", open_lock)


@pytest.mark.usefixtures("removed_when_opened")
@pytest.mark.parametrize("first", ["alone", "among others"])
@pytest.mark.parametrize("second", ["alone", "among others"])
def test_a_lock_file_that_was_removed_before_it_was_locked_protects_nobody(tmp_path: Path, first: str, second: str
                                                                           ) -> None:
    """Otherwise both would write: the first holds a file without a name, the second locks a new one."""
    lock, calls = tmp_path / "folder/lock", list[str]()
    lock.parent.mkdir()
    ways: dict[str, Callable[[], AbstractContextManager[None]]] = {
        "alone": lambda: only_writer(lock, tmp_path), "among others": lambda: among_writers(lock, lambda: None)}
    with ways[first]():
        assert lock.exists()
        if second == "alone":
            with pytest.raises(ConfigError, match="another run is writing"), ways[second]():
                calls.append("both write")
        else:  # would wait; so look whether it could be locked
            with lock.open("r+") as file, pytest.raises(BlockingIOError):
                locks.try_lock(file)
        assert not calls and lock.exists()
    assert not lock.exists()


def test_a_lock_file_of_another_process_is_not_removed(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    for way in (only_writer(lock, tmp_path), among_writers(lock, lambda: None)):
        with way:
            lock.rename(tmp_path / "old")  # as if removed; a new file would get the same number
            lock.touch()
        assert lock.exists()


def test_numbers_of_files_that_never_last_are_no_endless_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "_has_name", lambda *_: False)
    with only_writer(tmp_path / "lock", tmp_path):
        pass


# -- what killed processes left -----------------------------------------------------------------------------


def test_a_killed_copy_leaves_nothing_behind_once_it_is_run_again(scene_shards: Path, tmp_path: Path) -> None:
    destination = tmp_path / "mirror"
    whole = {path.name for path in scene_shards.iterdir()}
    process = multiprocessing.get_context("fork").Process(target=killed_after_one, args=(scene_shards, destination))
    process.start()
    process.join(60)
    assert process.exitcode == 9
    assert [path for path in destination.iterdir() if path.suffix == ".tmp"], "killed too late"
    copy_set(scene_shards, destination)
    assert verify(destination) == [] and {path.name for path in destination.iterdir()} == whole
    (destination / ".manifest.json.4711.tmp").write_bytes(b"of a kill after publishing")
    (destination / ".notes.tmp").write_bytes(b"somebody else's")
    assert copy_set(scene_shards, destination) == 0
    assert {path.name for path in destination.iterdir()} == {*whole, ".notes.tmp"}


def killed_after_one(source: Path, destination: Path) -> None:
    from shards.files import atomic

    real = atomic.os.fsync
    synced: list[int] = []

    def fsync(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) > 2:  # of the first file and its folder, then of the second
            os._exit(9)
        real(descriptor)

    atomic.os.fsync = fsync  # type: ignore[assignment]
    copy_set(source, destination)


def test_a_complete_set_loses_what_a_kill_after_publishing_left(scenes: Path, tmp_path: Path) -> None:
    output = make_shards(tmp_path / "set", scenes)
    (output / ".progress").mkdir()
    (output / ".progress/lock").touch()
    (output / ".train-000000.tar.4711.tmp").write_bytes(b"half a shard")
    make_shards(output, scenes)
    assert verify(output) == [] and not (output / ".progress").exists()


# -- errors name the file -----------------------------------------------------------------------------------


def full(*_: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def shard(path: Path) -> None:
    with ShardWriter(path) as writer:
        writer.write("key", b"image", "jpg", b"payload")


def picture(path: Path) -> None:
    from PIL import Image

    save_picture(Image.new("L", (4, 4)), path)


@pytest.mark.parametrize(("what", "broken"), [
    (lambda path: write_atomically(path, b"x"), "fsync"),
    (lambda path: copy_atomically(Path(__file__), path), "fsync"),
    (shard, "fsync"),
    (lambda path: LocalStorage(path.parent).upload(path.name, Path(__file__)), "fsync"),
    (lambda path: (path.write_bytes(b"x"), LocalStorage(path.parent).read(path.name, 0, 1)), "pread"),
])
def test_errors_of_files_name_them(tmp_path: Path, what: Callable[[Path], object], broken: str,
                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, broken, full)
    with pytest.raises(OSError, match="No space left") as caught:
        what(tmp_path / "it.png")
    monkeypatch.undo()
    assert caught.value.filename == str(tmp_path / "it.png")
    assert not list(tmp_path.glob(".*"))


def test_errors_of_writing_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "it.png").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as caught:
        picture(tmp_path / "it.png")
    assert caught.value.filename == str(tmp_path / "it.png")


@pytest.fixture
def full_temporary_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shards.files.atomic.tempfile.TemporaryFile", lambda dir: open("/dev/full", "w+b"))  # noqa: SIM115


@pytest.mark.usefixtures("full_temporary_files")
def test_publishing_on_a_full_disk_names_file_and_folder(scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left") as caught:
        make_shards(tmp_path / "set", scenes)
    place = Path(caught.value.filename)
    assert place.name == "train.index" and place.parent.parent == tmp_path / "set/.progress"
    assert not (tmp_path / "set" / MANIFEST_NAME).exists()


class Remote:
    """A folder that is not known to be one."""

    def __init__(self, folder: Path) -> None:
        self._storage = LocalStorage(folder)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)


@pytest.mark.usefixtures("full_temporary_files")
def test_copying_through_a_full_folder_of_temporary_files_names_file_and_folder(scene_shards: Path, tmp_path: Path
                                                                                ) -> None:
    with pytest.raises(OSError, match="No space left") as caught:
        copy_set(Remote(scene_shards), tmp_path / "copy")  # type: ignore[arg-type]
    assert caught.value.filename == f"{tempfile.gettempdir()}/train.shards"


def test_an_export_to_a_full_disk_names_file_and_folder(scene_shards: Path, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the images of COCO files, which are collected in a file beside."""
    asked: list[Any] = []

    def full_file(*_: object, dir: Path, encoding: str) -> IO[str]:
        asked.append(dir)
        return open("/dev/full", "w+", encoding=encoding)

    monkeypatch.setattr("shards.exports.coco_files.tempfile.TemporaryFile", full_file)
    with pytest.raises(OSError, match="No space left") as caught, staged_folder(tmp_path / "out") as folder:
        asked.append(folder)
        export_coco(LocalStorage(scene_shards), load_manifest(scene_shards), ["val"], folder, lambda: None)
    assert asked[0] == asked[1] and caught.value.filename == f"{asked[0]}/annotations/val.json"
    assert not list(tmp_path.iterdir())


def test_an_error_without_a_number_gets_a_name_that_survives_another_process(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="encoder error") as caught, naming(tmp_path):
        raise OSError("encoder error -2")
    assert copy.copy(caught.value).filename == str(tmp_path)  # by what pickle uses too


@pytest.mark.parametrize(("error", "line"), [
    (OSError(errno.ENOSPC, "No space left on device", "/a/b"), "error: /a/b: No space left on device"),
    (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"),
     "error: BlockingIOError: Resource temporarily unavailable"),
    (OSError("odd"), "error: OSError: odd"),
])
def test_the_entry_point_never_says_input_or_output(error: OSError, line: str,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> int:
        raise error

    with pytest.raises(SystemExit) as left:
        run_entry_point(main)
    assert left.value.code == 2 and capsys.readouterr().err.strip() == line


@pytest.mark.parametrize("arguments", [("info", "{set}"), ("--help",)])
def test_output_that_cannot_be_written_is_one_line(scene_shards: Path, arguments: tuple[str, ...]) -> None:
    words = [item.format(set=scene_shards) for item in arguments]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as nowhere:
        result = subprocess.run([sys.executable, "-m", "shards", *words], stdout=nowhere, stderr=subprocess.PIPE,
                                text=True, check=False, cwd=REPOSITORY, env=environment)
    assert (result.returncode, result.stderr) == (2, "error: standard output: No space left on device\n")


# -- terminals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("terminal", [{"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1"},
                                      {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}])
def test_a_terminal_without_unicode_breaks_nothing(scenes: Path, tmp_path: Path, terminal: dict[str, str]) -> None:
    names = (scenes / "classes.txt").read_text().replace("sky", "Himmel über 東京")
    (tmp_path / "classes.txt").write_text(names, encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("LC_", "LANG", "PYTHON"))}
    commands = [
        ["preprocess/make_shards.py", "--dataset", "folder", "--root", str(scenes), "--output", str(tmp_path / "set"),
         f"dataset.class_file={tmp_path / 'classes.txt'}", "crops.size=64", "crops.per_image=1", "--workers", "1"],
        ["preprocess/make_shards.py", "--dataset", "folder", "--root", str(scenes), "--output", str(tmp_path / "unset"),
         f"dataset.class_file={tmp_path / 'classes.txt'}", "--dry-run"],
        ["-m", "shards", "info", str(tmp_path / "set")],
        ["-m", "shards", "show", str(tmp_path / "set"), "--output", str(tmp_path / "s.png")],
        ["preprocess/make_shards.py", "--help"],
        ["trainer/train.py", "--help"],
    ]
    for command in commands:
        result = subprocess.run([sys.executable, *command], capture_output=True, env={**environment, **terminal},
                                check=False, cwd=REPOSITORY)
        assert result.returncode == 0, result.stderr.decode()
        if "info" in command:
            assert b"Himmel " in result.stdout and b"\\u6771" in result.stdout
