"""A cache on a disk shared with other users: none of their files is read, followed, truncated or deleted."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from shards.errors import ConfigError
from shards.files.atomic import temporary_name, write_atomically
from shards.files.cache import DiskCache
from shards.files.locks import among_writers, only_writer, open_lock
from shards.writer import ShardWriter

PRECIOUS = b"years of work"


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    path = tmp_path / "precious"
    path.write_bytes(PRECIOUS)
    return path


@pytest.fixture
def cache(tmp_path: Path) -> DiskCache:
    return DiskCache(folder=tmp_path / "disk" / "cache", limit=1000)


def fill(cache: DiskCache, count: int = 20) -> None:
    for number in range(count):
        assert cache.get(str(number), lambda number=number: bytes([number]) * 300) == bytes([number]) * 300  # type: ignore[misc]


def entry(cache: DiskCache) -> Path:
    return next(cache.folder.glob("??/*"))


def test_folders_and_entries_are_for_this_user_alone(cache: DiskCache) -> None:
    before = os.umask(0)
    try:
        cache.prepare()
        fill(cache)
    finally:
        os.umask(before)
    folders = [cache.folder, *cache.folder.glob("??")]
    assert {path.stat().st_mode & 0o777 for path in folders} == {0o700}
    assert {path.stat().st_mode & 0o777 for path in [cache.folder / "lock", *cache.folder.glob("??/*")]} == {0o600}


def test_a_link_named_lock_empties_nothing(cache: DiskCache, precious: Path) -> None:
    cache.prepare()
    (cache.folder / "lock").symlink_to(precious)
    fill(cache)
    assert precious.read_bytes() == PRECIOUS


@pytest.mark.parametrize("opened", [
    lambda folder: only_writer(folder / "lock", folder),
    lambda folder: among_writers(folder / "lock", lambda: None),
    lambda folder: open_lock(folder / "lock"),
], ids=["only_writer", "among_writers", "open_lock"])
@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_no_lock_follows_a_link(tmp_path: Path, precious: Path, opened: Callable[[Path], object], kind: str) -> None:
    lock = tmp_path / "lock"
    {"link": lambda: lock.symlink_to(precious), "pipe": lambda: os.mkfifo(lock), "folder": lock.mkdir}[kind]()
    with pytest.raises(ConfigError, match=r"the lock .*lock is .*; remove it"), opened(tmp_path):  # type: ignore[attr-defined]
        pass
    assert precious.read_bytes() == PRECIOUS


def test_a_run_empties_no_file_that_its_lock_leads_to(tmp_path: Path, precious: Path) -> None:
    from trainer.run.folder import lock_run_folder

    (tmp_path / ".lock").symlink_to(precious)
    with pytest.raises(ConfigError, match="remove it"), lock_run_folder(tmp_path):
        pass
    assert precious.read_bytes() == PRECIOUS


def test_an_entry_that_is_a_link_is_neither_read_nor_written_through(cache: DiskCache, precious: Path) -> None:
    assert cache.get("x", lambda: b"right") == b"right"
    stored = entry(cache).read_bytes()
    outside = precious.with_name("outside")
    outside.write_bytes(stored)
    path = entry(cache)
    path.unlink()
    path.symlink_to(outside)
    assert cache.get("x", lambda: b"fetched") == b"fetched", "the link's target is a sound entry, but it is not ours"
    assert outside.read_bytes() == stored and not path.is_symlink()
    assert cache.get("x", lambda: b"no") == b"fetched"


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")],
                         ids=["pipe", "folder", "device"])
def test_an_entry_that_is_no_file_is_not_read(cache: DiskCache, make: Callable[[Path], object]) -> None:
    cache.get("x", lambda: b"right")
    path = entry(cache)
    path.unlink()
    make(path)
    assert cache.get("x", lambda: b"fetched") == b"fetched"


def test_an_entry_larger_than_the_cache_is_not_read(cache: DiskCache) -> None:
    cache.get("x", lambda: b"right")
    os.truncate(entry(cache), 60 << 30)
    assert cache.get("x", lambda: b"fetched") == b"fetched"


def test_a_folder_that_is_a_link_is_not_used(cache: DiskCache, tmp_path: Path) -> None:
    """Cleaning up would delete these files."""
    theirs = tmp_path / "home" / "letters"
    theirs.mkdir(parents=True)
    (theirs / ("0" * 64)).write_bytes(PRECIOUS * 1000)
    cache.prepare()
    for number in range(256):
        (cache.folder / f"{number:02x}").symlink_to(theirs)
    fill(cache)
    assert [path.read_bytes() for path in theirs.iterdir()] == [PRECIOUS * 1000]


def test_only_what_is_named_like_an_entry_is_deleted(tmp_path: Path) -> None:
    for name in ("us/photo.jpg", "ab/photo.jpg", "ab/" + "0" * 63):
        (tmp_path / "x" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "x" / name).write_bytes(PRECIOUS * 1000)
    fill(DiskCache(folder=tmp_path / "x", limit=1000))
    assert len(list((tmp_path / "x").glob("*/photo.jpg"))) == 2 and (tmp_path / "x" / "ab" / ("0" * 63)).exists()


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770, 0o720])
def test_a_folder_that_others_may_write_to_is_refused(cache: DiskCache, mode: int) -> None:
    cache.folder.mkdir(parents=True)
    cache.folder.chmod(mode)
    with pytest.raises(ConfigError, match=rf"is writable by others \(mode {mode:o}\), legal: 700; remove it, or "
                       "change data.cache_dir"):
        cache.prepare()
    fill(cache)
    assert list(cache.folder.iterdir()) == [], "and not used by who did not ask"


def test_another_users_folder_is_refused(cache: DiskCache, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(cache)
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(ConfigError, match=rf"belongs to user {owner}, legal: your own \({owner + 1}\)"):
        cache.prepare()
    assert cache.get("19", lambda: b"fetched") == b"fetched"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_another_users_entry_is_not_read(cache: DiskCache) -> None:
    cache.get("x", lambda: b"right")
    os.chown(entry(cache), 12345, 12345)
    assert cache.get("x", lambda: b"fetched") == b"fetched"


def test_a_run_uses_a_folder_of_its_own_on_a_disk_that_all_use(scene_shards: Path, tmp_path: Path) -> None:
    from trainer.data.crops import open_reader
    from trainer.data_config import DataConfig

    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch").chmod(0o1777)
    config = DataConfig(root=str(scene_shards), cache_dir=str(tmp_path / "scratch"))
    reader = open_reader(config, "train")
    own = tmp_path / "scratch" / f"maskstream-{os.geteuid()}"
    assert reader.cache is not None and reader.cache.folder == own and own.stat().st_mode & 0o777 == 0o700
    own.rmdir()
    own.symlink_to(tmp_path)
    with pytest.raises(ConfigError, match="is a symbolic link, legal: a folder"):
        open_reader(config, "train")
    own.unlink()
    own.mkdir()
    own.chmod(0o777)
    with pytest.raises(ConfigError, match=r"the cache .* is writable by others"):
        open_reader(config, "train")


def test_files_are_not_written_through_a_link_with_their_temporary_name(tmp_path: Path, precious: Path) -> None:
    temporary_name(tmp_path / "x").symlink_to(precious)
    write_atomically(tmp_path / "x", b"new")
    temporary_name(tmp_path / "y.tar").symlink_to(precious)
    with ShardWriter(tmp_path / "y.tar"):
        pass
    assert precious.read_bytes() == PRECIOUS and (tmp_path / "x").read_bytes() == b"new"
