"""Object storage on a real S3 server: exact bytes or a clear error, whatever the network does; complete sets only."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from shards.errors import ConfigError, CorruptShardError, FormatVersionError, ShardError, StorageError
from shards.files.cache import DiskCache
from shards.files.object_storage import ObjectStorage
from shards.files.storage import LocalStorage, RetryPolicy, Storage, is_remote, open_storage
from shards.manifest import MANIFEST_NAME, load_manifest, manifest_bytes
from shards.mirror import copy_set, files_of
from shards.reader import ShardReader, iter_samples
from shards.verify import verify
from tests.conftest import REPOSITORY, make_shards
from tests.support.object_storage import (
    Fault,
    FaultyProxy,
    S3Server,
    cloud_stub,
    cut,
    flip,
    internal_error,
    short,
    stall,
    trickle,
    unavailable,
)

HASTY = RetryPolicy(tries=5, longest_pause=0.2)
DATA = bytes(range(256)) * 800


def python(*arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=timeout)


# Places


@pytest.mark.parametrize("root", ["pipe:cat /etc/passwd", "file:///tmp/x", "ftp://host/x", "gopher://x", "S4://x",
                                  "s3:bucket", "pipe:true", "s3://", "https:///"])
def test_other_schemes_are_refused_and_nothing_runs(root: str) -> None:
    with pytest.raises(ConfigError, match="legal: a path, or a URL such as s3://bucket"):
        open_storage(root)
    assert python("-m", "shards", "info", root).returncode == 2


@pytest.mark.parametrize(("root", "prefix"), [("az://container/sets/one", "/account/container/sets/one/"),
                                              ("gs://bucket/sets/one", "/bucket/sets/one/")])
def test_other_clouds_are_asked_for_the_right_keys(root: str, prefix: str, scene_shards: Path, tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    with cloud_stub(scene_shards) as (address, asked):
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "a2V5")
        monkeypatch.setenv("AZURE_ENDPOINT", f"{address}/account")
        account = {"gcs_base_url": address, "disable_oauth": True, "private_key": "", "private_key_id": "",
                   "client_email": ""}
        (tmp_path / "account.json").write_text(json.dumps(account))
        monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(tmp_path / "account.json"))
        found, here = list(iter_samples(root, "val")), list(iter_samples(scene_shards, "val"))
        assert [(one.key, one.image_bytes) for one in found] == [(one.key, one.image_bytes) for one in here]
        files = {path.removeprefix(prefix) for path in asked if path.startswith(prefix)}
        assert {"manifest.json", "val.index", "val-000000.tar"} <= files
        with pytest.raises(FileNotFoundError):
            open_storage(root).read("absent", 0, 1)


def test_paths_are_paths(tmp_path: Path) -> None:
    assert not any(map(is_remote, ["shards", "./a:b", "/data/run:3", "C_drive", str(tmp_path)]))
    assert all(map(is_remote, ["s3://b/x", "gs://b", "az://a/c", "https://h/x"]))


# Reading


@pytest.mark.parametrize("fault", [cut, short, unavailable, internal_error, stall, trickle])
def test_a_read_goes_on_from_the_byte_reached(
    s3: FaultyProxy, s3_root: str, fault: Fault, caplog: pytest.LogCaptureFixture
) -> None:
    open_storage(s3_root).write("x", DATA)
    # Only who is to wait for a server that says nothing may give up early: a busy machine is silent, too.
    storage = open_storage(s3_root, replace(HASTY, timeout=2.0) if fault in (stall, trickle) else HASTY)
    s3.faults, s3.bytes = [fault], 0
    with caplog.at_level(logging.WARNING):
        assert storage.read("x", 1000, 150_000) == DATA[1000:151_000]
    warned = [record for record in caplog.records if record.name == "shards.files.object_storage"]  # not that it is http://
    assert [record.levelname for record in warned] == ["WARNING"]
    assert f"{s3_root}/x (offset 1000): try 1 of 5 failed" in caplog.text and "1 retries in this process" in caplog.text
    if fault is cut:
        assert "after 75000 of 150000 bytes" in caplog.text
        assert s3.bytes < 150_000 + 75_000 + 5000, "the second request asked only for what was missing"


def test_a_burst_of_faults_is_survived_and_too_long_a_one_is_an_error(s3: FaultyProxy, s3_root: str) -> None:
    storage = open_storage(s3_root, HASTY)
    storage.write("x", DATA)
    s3.faults = [unavailable, cut, internal_error, short]
    assert storage.read("x", 0, len(DATA)) == DATA
    s3.faults = [unavailable] * 5
    with pytest.raises(StorageError, match=rf"{s3_root}/x \(offset 7\): failed after 5 tries after 0 of 9 bytes.*503"):
        storage.read("x", 7, 9)


def test_lasting_errors_are_clear_and_quick(s3: FaultyProxy, s3_root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage(s3_root, HASTY)
    storage.write("x", DATA)
    s3.requests = 0
    with pytest.raises(FileNotFoundError, match=rf"{s3_root}/y \(offset 3\): there is no such object or bucket"):
        storage.read("y", 3, 1)
    with pytest.raises(ShardError, match=r"does not exist.*no such object or bucket"):
        load_manifest("s3://no-such-bucket/set")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StorageError, match=rf"{s3_root}/x \(offset 0\): failed: .*SignatureDoesNotMatch"):
        open_storage(s3_root, HASTY).read("x", 0, 1)
    assert s3.requests == 3, "none was tried twice"


def test_large_objects_come_in_pieces_and_whole_ones_have_a_limit(
    s3: FaultyProxy, s3_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shards.files import object_storage as module

    storage = open_storage(s3_root, HASTY)
    storage.write("x", DATA)
    monkeypatch.setattr(module, "_PIECE", 10_000)
    s3.requests, s3.faults = 0, [cut, unavailable]
    assert storage.read("x") == DATA
    assert s3.requests == 1 + -(-len(DATA) // 10_000) + 2
    monkeypatch.setattr(module, "LARGEST_WHOLE", 1000)
    with pytest.raises(StorageError, match="legal: at most 1000 for a file read into memory"):
        storage.read("x")


def test_writes_are_whole_and_created_only_once(s3: FaultyProxy, s3_root: str, tmp_path: Path) -> None:
    large = tmp_path / "large"
    large.write_bytes(os.urandom(12 << 20))  # more than one part
    for storage in (open_storage(s3_root), open_storage(tmp_path / "folder")):
        storage.upload("large", large)
        storage.write("small", b"1", create=True)
        with pytest.raises(StorageError, match="small already exists"):
            storage.write("small", b"2", create=True)
        assert storage.read("large") == large.read_bytes() and storage.read("small") == b"1"
        assert storage.sizes() == {"large": 12 << 20, "small": 1}
        storage.delete("small")
        storage.delete("small")
        assert storage.sizes() == {"large": 12 << 20}
    parts = {path.partition("partNumber=")[2].partition("&")[0] for path in s3.writes if "partNumber" in path}
    assert len(parts) > 1, "in parts"


def _read_in_child(root: str, environment: dict[str, str], answers: multiprocessing.Queue) -> None:  # type: ignore[type-arg]
    os.environ.update(environment)  # the fork server may have been started by another test
    try:
        answers.put(load_manifest(root).dataset)
    except ShardError as error:
        answers.put(str(error))


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_processes_started_after_use_answer_or_say_why_not(s3_shards: str, method: str) -> None:
    dataset = load_manifest(s3_shards).dataset
    context = multiprocessing.get_context(method)
    answers = context.Queue()
    child = context.Process(target=_read_in_child, args=(s3_shards, dict(os.environ), answers))
    child.start()
    answer = answers.get(timeout=60)
    child.join(60)
    assert not child.is_alive()
    assert answer == dataset if method != "fork" else "multiprocessing_context='forkserver'" in answer


# A set on object storage


def test_samples_equal_those_of_the_folder(s3_shards: str, scene_shards: Path) -> None:
    for split in ("train", "val"):
        for remote, local in zip(iter_samples(s3_shards, split), iter_samples(scene_shards, split), strict=True):
            assert (remote.key, remote.image_bytes, remote.record) == (local.key, local.image_bytes, local.record)
    assert verify(s3_shards) == []
    assert "sound" in python("-m", "shards", "verify", s3_shards).stdout
    assert "5 images" in python("-m", "shards", "info", s3_shards).stdout


def test_a_web_server_is_read_and_never_written(
    s3_server: S3Server, s3_shards: str, scene_shards: Path, tmp_path: Path
) -> None:
    url = f"{s3_server.web}/buckets/{s3_shards.removeprefix('s3://')}"
    assert [sample.image_bytes for sample in iter_samples(url, "train")] == [
        sample.image_bytes for sample in iter_samples(scene_shards, "train")]
    assert verify(url) == []
    assert copy_set(url, tmp_path / "mirror") > 0
    with pytest.raises(ConfigError, match="is read-only"):
        copy_set(scene_shards, f"{url}-new")
    with pytest.raises(ShardError, match=r"nowhere/manifest\.json does not exist"):
        load_manifest(f"{s3_server.web}/nowhere")


def test_stored_bits_that_flip_on_the_way_are_fetched_again(
    s3: FaultyProxy, s3_shards: str, scene_shards: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reader, local = ShardReader(s3_shards, "train"), ShardReader(scene_shards, "train")
    s3.faults = [flip, flip]
    with caplog.at_level(logging.WARNING):
        assert reader.read(3).image_bytes == local.read(3).image_bytes
    assert caplog.text.count("CRC-32 differs from the index") == caplog.text.count("fetching it again") == 2
    s3.faults = [flip, cut, flip]  # of the manifest, and of the index
    assert ShardReader(s3_shards, "train").info == local.info
    s3.faults = [flip] * 4
    with pytest.raises(CorruptShardError, match=r"train-000000\.tar, sample 3 \(offset \d+\): CRC-32 differs"):
        reader.read(3)


def test_missing_replaced_and_newer_sets_are_refused(s3_shards: str, scene_shards: Path) -> None:
    storage = open_storage(s3_shards)
    reader, name = ShardReader(s3_shards, "train"), "train-000001.tar"
    data = bytearray(storage.read(name))
    storage.write(name, bytes(255 - byte for byte in data))  # replaced while it is being read
    number = int(reader.table.samples[0])
    with pytest.raises(CorruptShardError, match=f"{s3_shards}/{name}, sample 0 .*was replaced"):
        reader.read(number)
    storage.delete(name)
    with pytest.raises(StorageError, match=rf"{s3_shards}/{name} \(offset 0\): the manifest lists this shard, but"):
        reader.read(number)
    with pytest.raises(ShardError, match=f"{s3_shards}/{name} is missing, but the manifest lists it"):
        ShardReader(s3_shards, "train")
    storage.write(name, bytes(data[:-512]))
    with pytest.raises(CorruptShardError, match=f"{name} has {len(data) - 512} bytes, the manifest says {len(data)}"):
        ShardReader(s3_shards, "train")
    newer = manifest_bytes(load_manifest(s3_shards)).replace(b'"format_version": 3', b'"format_version": 9')
    storage.write(MANIFEST_NAME, newer)
    with pytest.raises(FormatVersionError, match=f"{s3_shards}/manifest.json has format_version 9"):
        load_manifest(s3_shards)


# The cache


def test_the_cache_answers_instead_of_the_server(s3: FaultyProxy, s3_shards: str, tmp_path: Path) -> None:
    cache = DiskCache(folder=tmp_path / "cache", limit=10**9)
    expected = [sample.image_bytes for sample in iter_samples(s3_shards, "train")]
    for turn in range(2):
        reader = ShardReader(s3_shards, "train", cache=cache)
        s3.bytes = 0
        assert [reader.read(number).image_bytes for number in range(len(reader))] == expected
        assert (s3.bytes > 0) == (turn == 0)
    for entry in (tmp_path / "cache").glob("??/*"):
        entry.write_bytes(entry.read_bytes()[:-3])  # a disk that lost something
    assert [reader.read(number).image_bytes for number in range(len(reader))] == expected


def test_damage_that_came_with_a_fetch_does_not_stay_in_the_cache(
    s3: FaultyProxy, s3_shards: str, tmp_path: Path
) -> None:
    reader = ShardReader(s3_shards, "train", cache=DiskCache(folder=tmp_path / "cache", limit=10**9))
    s3.faults = [flip]
    first = reader.read(0).image_bytes
    assert not s3.faults
    s3.faults = [flip] * 9
    assert reader.read(0).image_bytes == first, "the good bytes are cached, under the range that was read"


def test_the_cache_drops_the_least_recently_used_and_keeps_to_its_limit(tmp_path: Path) -> None:
    cache = DiskCache(folder=tmp_path, limit=100_000)

    def size() -> int:
        return sum(path.stat().st_size for path in tmp_path.glob("??/*"))

    def absent() -> bytes:
        raise AssertionError("it should be there")

    cache.get("dear", lambda: b"d" * 1000)
    for number in range(300):
        cache.get(f"{number}", lambda: bytes(1000))
        assert cache.get("dear", absent) == b"d" * 1000
        assert size() <= 1.1 * 100_000
    assert cache.get("299", absent) == bytes(1000)
    with pytest.raises(AssertionError, match="should be there"):
        cache.get("0", absent)
    cache.get("299", lambda: pytest.fail("still there"))
    stale = next(tmp_path.glob("??")) / ".x.tmp"
    stale.write_bytes(b"left by a kill")
    os.utime(stale, (0, 0))
    for number in range(300, 320):
        cache.get(f"{number}", lambda: bytes(1000))
    assert not stale.exists()


def _use_cache(folder: str, seed: int) -> None:
    cache = DiskCache(folder=Path(folder), limit=60_000)
    number = seed
    while True:
        number = (number * 48271) % 2147483647
        key = number % 100
        assert cache.get(str(key), lambda key=key: bytes([key]) * 1500) == bytes([key]) * 1500  # type: ignore[misc]


def test_the_cache_survives_kills_and_is_shared(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    for turn in range(3):
        users = [context.Process(target=_use_cache, args=(str(tmp_path), seed)) for seed in (1 + turn, 77 + turn)]
        for user in users:
            user.start()
        time.sleep(2.0)
        assert all(user.is_alive() for user in users), "an entry was wrong"
        for user in users:
            os.kill(user.pid or 0, signal.SIGKILL)
            user.join()
    cache = DiskCache(folder=tmp_path, limit=60_000)
    for key in range(100):
        assert cache.get(str(key), lambda key=key: bytes([key]) * 1500) == bytes([key]) * 1500  # type: ignore[misc]


def test_a_full_disk_costs_the_cache_only(tmp_path: Path) -> None:
    (tmp_path / "cache").write_bytes(b"a file where the folder should be")
    assert DiskCache(folder=tmp_path / "cache", limit=1000).get("x", lambda: b"abc") == b"abc"


# Mirrors


def test_a_set_is_mirrored_between_any_places(s3_root: str, scene_shards: Path, tmp_path: Path) -> None:
    there, elsewhere, back = s3_root, f"{s3_root}-too", tmp_path / "back"
    files = sum(1 for _ in files_of(LocalStorage(scene_shards), load_manifest(scene_shards)))
    for source, destination in ((scene_shards, there), (there, elsewhere), (elsewhere, back)):
        assert copy_set(source, destination) == files
        assert copy_set(source, destination) == 0
        assert verify(destination) == []
    for path in scene_shards.iterdir():
        if path.is_file():
            assert (back / path.name).read_bytes() == path.read_bytes()
    done = python("-m", "shards", "copy", str(scene_shards), str(tmp_path / "cli"))
    assert done.returncode == 0 and f"{files} files copied, all verified" in done.stdout


def test_a_mirror_copies_what_is_missing_or_wrong_and_refuses_another_set(
    s3_root: str, scene_shards: Path, tmp_path: Path
) -> None:
    storage = open_storage(s3_root)
    copy_set(scene_shards, s3_root)
    storage.delete(MANIFEST_NAME)
    storage.delete("train-000000.tar")
    storage.write("train-000001.tar", bytes(255 - byte for byte in storage.read("train-000001.tar")))
    assert copy_set(scene_shards, s3_root) == 2
    assert verify(s3_root) == []
    broken = Path(shutil.copytree(scene_shards, tmp_path / "broken"))
    (broken / "train-000000.tar").write_bytes(bytes((broken / "train-000000.tar").stat().st_size))
    with pytest.raises(CorruptShardError, match=r"train-000000\.tar does not match its sha256.*the source is damaged"):
        copy_set(broken, f"{s3_root}-new")
    with pytest.raises(ShardError, match="does not exist"):
        load_manifest(f"{s3_root}-new")
    other = manifest_bytes(load_manifest(scene_shards)).replace(b'"seed": 0', b'"seed": 1')
    storage.write(MANIFEST_NAME, other)
    with pytest.raises(ConfigError, match="holds another complete shard set"):
        copy_set(scene_shards, s3_root)


def tars(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"precious")


@pytest.fixture(params=["folder", "object storage"])
def foreign(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """A place for files of others."""
    if request.param == "folder":
        return open_storage(tmp_path / "foreign")
    return open_storage(request.getfixturevalue("s3_root"))


@pytest.mark.parametrize(("name", "message"), [
    ("notes.txt", "holds 'notes.txt', which is not of this set"),
    ("train-000007.tar", "holds 'train-000007.tar', which is not of this set"),  # of a larger set
    ("train-000000.tar", "train-000000.tar is of another set than .*, or damaged, as train.shards there is not"),
    ("train.shards", "train.shards is of another set"), ("val.index", "val.index is of another set"),
    ("manifest.json", "manifest.json is another one, so .* holds another complete shard set")])
def test_a_set_is_not_copied_among_files_of_others(foreign: Storage, scene_shards: Path, name: str, message: str
                                                   ) -> None:
    foreign.write(name, b"precious")
    with pytest.raises(ConfigError, match=message):
        copy_set(scene_shards, foreign)
    assert foreign.sizes() == {name: 8} and foreign.read(name) == b"precious"


def test_a_copy_of_another_set_is_not_overwritten(foreign: Storage, scene_shards: Path, scenes: Path, tmp_path: Path
                                                  ) -> None:
    """Files of both have the same names; where splits are equal, these are left as they are, too."""
    other = make_shards(tmp_path / "other", scenes, "seed=1")  # the same validation images
    copy_set(other, foreign)
    foreign.delete(MANIFEST_NAME)
    before = foreign.sizes()
    with pytest.raises(ConfigError, match=r"train\.shards is of another set than"):
        copy_set(scene_shards, foreign)
    assert foreign.sizes() == before
    for file in files_of(LocalStorage(other), load_manifest(other)):
        if file.name.startswith("train"):
            foreign.delete(file.name)
    assert copy_set(scene_shards, foreign) == 8  # only the validation images were there, and they are the same
    assert verify(foreign) == []


def test_an_interrupted_copy_goes_on_wherever_it_stopped(foreign: Storage, scene_shards: Path) -> None:
    class Stopped(Exception):
        pass

    files = list(files_of(LocalStorage(scene_shards), load_manifest(scene_shards)))
    for last in files[1:]:

        def stop(file: object, last: object = last) -> None:
            if file == last:
                raise Stopped

        with pytest.raises(Stopped):
            copy_set(scene_shards, foreign, progress=stop)
    assert copy_set(scene_shards, foreign) == 0 and verify(foreign) == []


def test_a_folder_of_folders_or_a_file_is_no_destination(scene_shards: Path, tmp_path: Path) -> None:
    tars(tmp_path, "sets/one/train-000000.tar", "file")
    with pytest.raises(ConfigError, match="holds 'one', which is not of this set; legal: a new or an empty folder"):
        copy_set(scene_shards, tmp_path / "sets")
    with pytest.raises(ConfigError, match="file is a file, legal: a folder"):
        copy_set(scene_shards, tmp_path / "file")
    assert [path.name for path in (tmp_path / "sets").iterdir()] == ["one"]


def test_shards_are_not_made_among_others_in_object_storage(s3_root: str, scenes: Path, tmp_path: Path) -> None:
    """train-000000.tar would be overwritten, and train-000123.tar removed as a leftover."""
    storage = open_storage(s3_root)
    for name in ("train-000000.tar", "train-000123.tar"):
        storage.write(name, b"precious")
    for settings in ("seed=0", "seed=1"):
        with pytest.raises(ConfigError, match="is not empty and is not an unfinished shard set, it has 'train-000000"):
            make_shards(s3_root, scenes, settings, f"staging={tmp_path}")  # type: ignore[arg-type]
    assert storage.sizes() == {"train-000000.tar": 8, "train-000123.tar": 8}
    assert storage.read("train-000000.tar") == b"precious" and not any(tmp_path.iterdir())


def test_a_killed_upload_is_never_taken_for_a_set_and_goes_on(
    s3: FaultyProxy, s3_root: str, scene_shards: Path
) -> None:
    s3.delay = 0.15
    upload = subprocess.Popen([sys.executable, "-m", "shards", "copy", str(scene_shards), s3_root], cwd=REPOSITORY)
    deadline = time.monotonic() + 60
    storage = ObjectStorage(s3_root, HASTY)
    while len(storage.sizes() or {}) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    upload.send_signal(signal.SIGKILL)
    upload.wait()
    s3.delay = 0.0
    there = len(storage.sizes() or {})
    files = sum(1 for _ in files_of(LocalStorage(scene_shards), load_manifest(scene_shards)))
    assert 2 <= there < files
    with pytest.raises(ShardError, match="was not finished"):
        load_manifest(s3_root)
    assert copy_set(scene_shards, s3_root) == files - there
    assert verify(s3_root) == []


def test_two_uploads_at_once_end_with_one_set(s3_root: str, scene_shards: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: copy_set(scene_shards, s3_root), range(2)))
    assert verify(s3_root) == []


@pytest.mark.parametrize("kind", ["object storage", "folder"])
def test_a_set_that_another_process_published_meanwhile_is_not_overwritten(
    kind: str, s3_root: str, scene_shards: Path, tmp_path: Path
) -> None:
    storage = open_storage(s3_root if kind == "object storage" else tmp_path / "set")
    other = manifest_bytes(load_manifest(scene_shards)).replace(b'"seed": 0', b'"seed": 1')
    last = list(files_of(LocalStorage(scene_shards), load_manifest(scene_shards)))[-1]

    def publish(file: object) -> None:
        if file == last:  # all files are there, the manifest would be next
            storage.write(MANIFEST_NAME, other)

    with pytest.raises(StorageError, match=r"manifest\.json already exists"):
        copy_set(scene_shards, storage, progress=publish)
    assert storage.read(MANIFEST_NAME) == other


def test_a_set_whose_publishing_was_not_answered_is_published(scene_shards: Path, tmp_path: Path) -> None:
    class Unanswered(LocalStorage):
        def write(self, name: str, data: bytes, *, create: bool = False) -> None:
            super().write(name, data, create=create)
            super().write(name, data, create=create)  # tried again

    copy_set(scene_shards, Unanswered(tmp_path / "set"))
    assert verify(tmp_path / "set") == []


def test_preprocessing_publishes_to_object_storage(
    s3: FaultyProxy, s3_root: str, scenes: Path, scene_shards: Path, tmp_path: Path
) -> None:
    command = ["preprocess/make_shards.py", "--dataset", "folder", "--root", str(scenes), "--output", s3_root,
               "--workers", "0", "crops.size=64", "crops.per_image=2", "images_per_shard=6",
               f"staging={tmp_path / 'staging'}"]
    done = python(*command)
    assert done.returncode == 0, done.stderr
    assert verify(s3_root) == []
    assert load_manifest(s3_root) == load_manifest(scene_shards)
    assert not list((tmp_path / "staging").iterdir()), "nothing stays behind"
    again = python(*command)
    assert "already complete, nothing to do" in again.stdout
    open_storage(s3_root).delete(MANIFEST_NAME)
    with pytest.raises(ShardError, match="was not finished"):
        load_manifest(s3_root)
    refused = python(*command)  # shards without a record of who made them
    assert refused.returncode == 2 and "is not empty and is not an unfinished shard set, it has 't" in refused.stderr
    command = [f"{word}-too" if word == s3_root else word for word in command]
    part = python(*command, "--part", "0/3")  # of three blocks
    assert part.returncode == 0, part.stderr
    s3.writes.clear()
    assert python(*command).returncode == 0 and verify(f"{s3_root}-too") == []
    written = {path.partition("?")[0].rpartition("/")[2] for path in s3.writes}
    assert "train-000002.tar" in written and not written & {"train-000000.tar", "train-000001.tar"}
    other = python(*command, "crops.per_image=3")
    assert other.returncode == 2 and "already holds a complete shard set made with other settings" in other.stderr


def test_audit_counts_every_sample_once(scene_shards: Path, s3_shards: str) -> None:
    for root in (str(scene_shards), s3_shards):
        done = python("-m", "shards", "audit", root, "--ranks", "3", "--workers", "2", "--batch", "1", "--lanes", "6",
                      "--span-samples", "2")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "each of 24 samples seen once" in done.stdout
        assert "3 ranks x 2 workers, 8 micro-batches of 1 per rank" in done.stdout
        assert "12 spans of consecutive samples, 0 of them read by more than one worker" in done.stdout


@pytest.mark.parametrize(("options", "line"), [
    (("--ranks", "1000000"), "24 samples, 1000000 ranks x 1 workers, 1 micro-batches of 2 per rank"),
    (("--ranks", "7", "--workers", "1000000", "--batch", "1000000"), "7 ranks x 1000000 workers, 1 micro-batches"),
    (("--ranks", "2", "--accumulation", "500000", "--batch", "1"), "2 ranks x 1 workers, 500000 micro-batches of 1")])
def test_an_audit_of_far_too_many_ranks_takes_seconds(scene_shards: Path, options: tuple[str, ...], line: str) -> None:
    done = python("-m", "shards", "audit", str(scene_shards), *options)  # within two minutes; it would take hours
    assert done.returncode == 0, done.stdout + done.stderr
    assert line in done.stdout and "each of 24 samples seen once" in done.stdout


@pytest.mark.parametrize(("words", "message"), [
    (("audit", "--ranks", "1000001"), "--ranks 1000001 x --accumulation 1 are 1000001 micro-batches per step, legal"),
    (("audit", "--ranks", "10000", "--accumulation", "101"), "are 1010000 micro-batches per step, legal: at most"),
    (("audit", "--batch", "9" * 5000), "legal: a whole number from 1 to 1000000000000000000"),
    (("verify", "--workers", "4097"), "argument --workers: '4097', legal: a whole number from 1 to 4096"),
    (("verify", "--workers", "0"), "argument --workers: '0', legal: a whole number from 1 to 4096")])
def test_numbers_too_large_for_a_command_are_named(scene_shards: Path, words: tuple[str, ...], message: str) -> None:
    done = python("-m", "shards", words[0], str(scene_shards), *words[1:])
    assert done.returncode == 2 and message in " ".join(done.stderr.split())


def test_local_reads_stay_in_the_folder(scene_shards: Path) -> None:
    storage = open_storage(scene_shards)
    assert isinstance(storage, LocalStorage)
    assert storage.read(MANIFEST_NAME, 0, 5) == (scene_shards / MANIFEST_NAME).read_bytes()[:5]
    storage.close()


def test_no_changed_byte_breaks_a_decoder(scene_shards: Path) -> None:
    from tests.stress.fuzz import fuzz

    outcomes = fuzz(scene_shards, 300)
    assert sum(outcomes.values()) == 1200
    assert all(outcomes[f"{name}: refused"] > 30 for name in ("manifest", "index", "sample", "payload")), outcomes


def test_a_set_is_never_copied_onto_itself(scene_shards: Path, tmp_path: Path) -> None:
    shutil.copytree(scene_shards, tmp_path / "set")
    (tmp_path / "link").symlink_to(tmp_path / "set")
    shard = next((tmp_path / "set").glob("train-*.tar"))
    shard.write_bytes(b"XXXX" + shard.read_bytes()[4:])
    for destination in ("set", "set/../set", "link"):
        with pytest.raises(ConfigError, match="is the source itself"):
            copy_set(tmp_path / "set", tmp_path / destination)
    assert shard.exists(), "damaged, but all there is"
