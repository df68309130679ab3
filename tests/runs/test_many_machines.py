"""A shard set made in parts, in pieces, on a Ray cluster, with workers killed at random: always the same bytes."""

from __future__ import annotations

import contextlib
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from preprocess import pipeline
from preprocess.config import PreprocessConfig
from preprocess.execution import ray_address
from preprocess.execution.block_store import BlockStore
from preprocess.execution.tasks import Job, WriteBlock
from preprocess.pairs import open_dataset
from preprocess.pipeline import Part, finish, write_part, write_shards
from shards.cli.config_file import load_config
from shards.errors import ConfigError, ShardError
from shards.files import locks
from shards.files.storage import open_storage
from shards.manifest import MANIFEST_NAME, load_manifest
from shards.mirror import files_of
from shards.verify import verify
from tests.conftest import REPOSITORY, make_shards
from tests.support.object_storage import FaultyProxy

SETTINGS = ("dataset.kind=folder", "crops.size=64", "crops.per_image=3", "images_per_shard=4", "workers=0")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """38 training and 5 validation scenes: 10 blocks and 2."""
    from preprocess.make_scenes import write_scenes

    root = tmp_path_factory.mktemp("drawn")
    write_scenes(root, {"train": 38, "val": 5}, seed=3)
    return root


@pytest.fixture(scope="module")
def one_run(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a set made by one process."""
    return contents(make_shards(tmp_path_factory.mktemp("one") / "set", drawn, *SETTINGS))


def contents(output: Path | str) -> dict[str, bytes]:
    """The files of a set, by name; nothing else may be there."""
    storage = open_storage(output)
    names = {MANIFEST_NAME, *(file.name for file in files_of(storage, load_manifest(storage)))}
    assert set(storage.sizes() or ()) == names
    if not str(output).startswith("s3:"):
        assert {path.name for path in Path(output).iterdir()} == names, "something is left beside the set"
    return {name: storage.read(name) for name in sorted(names)}


def config_of(drawn: Path, output: Path | str, *overrides: str) -> PreprocessConfig:
    return load_config(PreprocessConfig, None, [*SETTINGS, f"dataset.root={drawn}", f"output={output}", *overrides])


def command(drawn: Path, output: Path | str, *arguments: str) -> list[str]:
    return [sys.executable, str(REPOSITORY / "preprocess/make_shards.py"), *SETTINGS, "--root", str(drawn), "--output",
            str(output), *arguments]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, check=False)


# -- pieces -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 3])
def test_blocks_in_pieces_give_the_same_bytes(drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                              workers: int) -> None:
    options = ("images_per_shard=19", f"workers={workers}")
    expected = contents(make_shards(tmp_path / "whole", drawn, *SETTINGS, "images_per_shard=19"))
    joined: list[int] = []
    real = pipeline._joins

    def joins(*arguments: Any) -> Any:
        joined.append(len(arguments[1]))
        return real(*arguments)

    monkeypatch.setattr(pipeline, "_joins", joins)
    monkeypatch.setattr(pipeline, "_LEAST_PIECE", 2)
    assert contents(make_shards(tmp_path / "pieces", drawn, *SETTINGS, *options)) == expected
    assert max(joined) > 1, "nothing was made in pieces"


@pytest.mark.slow
def test_images_skipped_in_a_piece_are_recorded_as_in_a_whole_block(drawn: Path, tmp_path: Path,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    root = Path(shutil.copytree(drawn, tmp_path / "scenes"))
    for number in (3, 17):
        (root / f"images/train/scene_train_{number:05d}.jpg").write_bytes(b"no image")
    options = (*SETTINGS, "images_per_shard=19", "on_error=skip")
    expected = contents(make_shards(tmp_path / "whole", root, *options))
    monkeypatch.setattr(pipeline, "_LEAST_PIECE", 2)
    assert contents(make_shards(tmp_path / "pieces", root, *options, "workers=2")) == expected
    skipped = load_manifest(tmp_path / "pieces").splits["train"].skipped_images
    assert [Path(item["image"]).stem for item in skipped] == ["scene_train_00003", "scene_train_00017"]


# -- parts --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("total", [1, 3, 20])
def test_parts_in_any_order_and_again_give_the_same_bytes(drawn: Path, one_run: dict[str, bytes], tmp_path: Path,
                                                          total: int) -> None:
    config = config_of(drawn, tmp_path / "set")
    dataset = open_dataset(config.dataset, "fail")
    parts = [*range(total), *range(0, total, 2)]
    random.Random(total).shuffle(parts)
    images = {part: write_part(config, dataset, Part(part, total)) for part in parts}
    assert sum(images.values()) == 43
    assert not (tmp_path / "set" / MANIFEST_NAME).exists()
    assert finish(config, dataset, total)[1]
    assert contents(tmp_path / "set") == one_run
    assert finish(config, dataset, total)[1] is False and write_part(config, dataset, Part(0, total)) == images[0]
    assert contents(tmp_path / "set") == one_run


@pytest.mark.slow
def test_a_part_that_was_done_is_not_done_again(drawn: Path, tmp_path: Path) -> None:
    config = config_of(drawn, tmp_path / "set")
    dataset = open_dataset(config.dataset, "fail")
    write_part(config, dataset, Part(0, 2))
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "set").glob("*.tar")}
    assert times
    write_part(config, dataset, Part(0, 2))
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "set").glob("*.tar")} == times


@pytest.mark.slow
def test_finishing_too_early_names_the_parts_to_run_again(drawn: Path, one_run: dict[str, bytes], tmp_path: Path
                                                          ) -> None:
    for part in ("0/5", "1/5", "3/5"):
        done = run(*command(drawn, tmp_path / "set", "--part", part))
        assert done.returncode == 0 and "once all parts are, run the same command with --finish" in done.stdout
    early = run(*command(drawn, tmp_path / "set", "--part", "0/5", "--finish"))
    assert early.returncode == 2 and "is not finished: 4 of 12 blocks are missing" in early.stderr
    assert "run these parts again: [2, 4]" in early.stderr and not (tmp_path / "set" / MANIFEST_NAME).exists()
    for words in (["--part", "2/5"], ["--finish"]):
        other = run(*command(drawn, tmp_path / "set", *words, "crops.jpeg_quality=50"))
        assert other.returncode == 2 and "holds parts made with other settings, classes or encoders" in other.stderr
    for part in ("2/5", "4/5"):
        assert run(*command(drawn, tmp_path / "set", "--part", part)).returncode == 0
    done = run(*command(drawn, tmp_path / "set", "--finish"))
    assert done.returncode == 0 and "written" in done.stdout, done.stderr
    assert contents(tmp_path / "set") == one_run


@pytest.mark.slow
def test_blocks_of_other_settings_are_not_taken_for_these(drawn: Path, one_run: dict[str, bytes], tmp_path: Path
                                                          ) -> None:
    """A run with other settings overwrites shards of other blocks; their records must not outlive that."""
    first = config_of(drawn, tmp_path / "set")
    dataset = open_dataset(first.dataset, "fail")
    write_part(first, dataset, Part(0, 1))
    other = config_of(drawn, tmp_path / "set", "crops.per_image=2", "on_error=fail", "dataset.limit=8")
    plan = pipeline._planned(other, open_dataset(other.dataset, "fail"))
    with pipeline._alone(plan):  # as if it were killed before it published
        plan.store.replace_settings(plan.settings)
        pipeline._write_missing(plan, plan.blocks)
    assert contents(make_shards(tmp_path / "set", drawn, *SETTINGS)) == one_run


def test_a_block_that_is_done_again_has_no_record_meanwhile(drawn: Path, tmp_path: Path,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between its shards, it would otherwise keep a record of shards that are no longer there."""
    config = config_of(drawn, tmp_path / "set")
    dataset = open_dataset(config.dataset, "fail")
    write_part(config, dataset, Part(0, 1))
    record = tmp_path / "set/.progress/train-000000.json"
    assert record.exists()
    monkeypatch.setattr(pipeline, "_changed", lambda plan, blocks, known: blocks[:1])
    monkeypatch.setattr(pipeline, "_written", lambda *_: iter(()))  # as if it were killed at once
    write_part(config, dataset, Part(0, 1))
    assert not record.exists() and (tmp_path / "set/.progress/train-000001.json").exists()


@pytest.mark.slow
def test_the_same_part_twice_at_once_in_pieces(drawn: Path, tmp_path: Path) -> None:
    options = ("images_per_shard=100", "crops.per_image=20", "--workers", "2")
    expected = contents(make_shards(tmp_path / "one", drawn, *SETTINGS, "images_per_shard=100", "crops.per_image=20"))
    both = [subprocess.Popen(command(drawn, tmp_path / "set", "--part", "0/1", *options), stdout=subprocess.DEVNULL,
                             stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for one in both:
        assert one.wait(120) == 0, one.stderr.read()
        one.stderr.close()
    assert run(*command(drawn, tmp_path / "set", "--finish", *options)).returncode == 0
    assert contents(tmp_path / "set") == expected


def test_one_command_completes_what_parts_began(drawn: Path, one_run: dict[str, bytes], tmp_path: Path) -> None:
    config = config_of(drawn, tmp_path / "set")
    write_part(config, open_dataset(config.dataset, "fail"), Part(1, 4))
    assert contents(make_shards(tmp_path / "set", drawn, *SETTINGS)) == one_run


def test_finishing_nothing_says_so(drawn: Path, tmp_path: Path) -> None:
    config = config_of(drawn, tmp_path / "set")
    with pytest.raises(ShardError, match="12 of 12 blocks are missing"):
        finish(config, open_dataset(config.dataset, "fail"), None)


@pytest.mark.parametrize("part", ["3", "3/3", "-1/3", "a/b", "1/0", "1/3/5", "²/3", f"1/{'9' * 5000}"])
def test_a_part_that_cannot_be_is_refused(drawn: Path, tmp_path: Path, part: str) -> None:
    done = run(*command(drawn, tmp_path / "set", f"--part={part}"))
    assert done.returncode == 2 and "legal: I/N with I from 0 to N-1" in done.stderr and not any(tmp_path.iterdir())


@pytest.mark.slow
def test_parts_killed_at_random_and_run_twice_at_once(drawn: Path, one_run: dict[str, bytes], tmp_path: Path) -> None:
    """Two processes for each part, all at the same time, killed and started again, as a cluster might."""
    rng = random.Random(0)
    output = tmp_path / "set"
    for round_ in range(3):
        running = [subprocess.Popen(command(drawn, output, "--part", f"{part}/2"), stdout=subprocess.DEVNULL,
                                    stderr=subprocess.DEVNULL, start_new_session=True)
                   for part in (0, 1) for _ in range(2)]
        if round_ < 2:
            records = output / ".progress"
            before = len(list(records.glob("*.json")))
            deadline = time.monotonic() + 60
            while len(list(records.glob("*.json"))) < before + 2 and any(one.poll() is None for one in running):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            rng.shuffle(running)
            for one in running[:3]:
                os.killpg(one.pid, signal.SIGKILL)
        for one in running:
            one.wait(120)
    done = run(*command(drawn, output, "--part", "0/2", "--finish"))
    assert done.returncode == 0, done.stderr
    assert contents(output) == one_run and verify(output) == []


@pytest.mark.slow
def test_parts_meet_in_object_storage(s3: FaultyProxy, s3_root: str, drawn: Path, one_run: dict[str, bytes],
                                      tmp_path: Path) -> None:
    options = (f"staging={tmp_path / 'staging'}",)
    storage = open_storage(s3_root)
    storage.write("marker", b"")  # makes the bucket
    storage.delete("marker")
    first = subprocess.Popen(command(drawn, s3_root, "--part", "0/2", *options), start_new_session=True,
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not any(name.endswith(".tar") for name in storage.sizes() or ()):
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    both = [subprocess.Popen(command(drawn, s3_root, "--part", part, *options), stdout=subprocess.DEVNULL)
            for part in ("0/2", "1/2", "1/2")]
    assert [one.wait(120) for one in both] == [0, 0, 0]
    done = run(*command(drawn, s3_root, "--finish", *options))
    assert done.returncode == 0, done.stderr
    assert contents(s3_root) == one_run
    assert not any(open_storage(f"{s3_root}/.progress").sizes() or ()), "records stay behind"
    assert not list(tmp_path.glob("staging/*/*")), "a killed run's staging folder stays behind"


@pytest.mark.parametrize("late", ["a part", "a part of other settings", "one command", "finish"])
def test_a_run_that_starts_while_another_finishes_touches_nothing(drawn: Path, one_run: dict[str, bytes],
                                                                  tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                  late: str) -> None:
    """It has seen that there is no set, and has opened the lock; then the other one publishes and removes the lock."""
    config = config_of(drawn, tmp_path / "set")
    dataset = open_dataset(config.dataset, "fail")
    write_part(config, dataset, Part(0, 1))
    real, finished = locks.open_lock, list[bool]()

    def open_lock(path: Path) -> Any:
        file = real(path)
        if not finished:
            finished.append(True)
            finish(config, dataset, 1)
        return file

    monkeypatch.setattr(locks, "open_lock", open_lock)
    other = config_of(drawn, tmp_path / "set", "crops.jpeg_quality=50")
    if late == "a part of other settings":
        with pytest.raises(ConfigError, match="already holds a complete shard set made with other settings"):
            write_part(other, open_dataset(other.dataset, "fail"), Part(0, 1))
    elif late == "a part":
        assert write_part(config, dataset, Part(0, 1)) == 43
    else:
        assert (write_shards(config, dataset) if late == "one command" else finish(config, dataset, 1))[1] is False
    assert finished and contents(tmp_path / "set") == one_run


def test_what_a_killed_run_left_is_removed_only_by_one_of_the_same_settings(drawn: Path, one_run: dict[str, bytes],
                                                                            tmp_path: Path) -> None:
    """To another, most shards of the set would look like leftovers."""
    output = make_shards(tmp_path / "set", drawn, *SETTINGS)
    (output / ".progress").mkdir()  # as if killed after publishing
    with pytest.raises(ConfigError, match="already holds a complete shard set made with other settings"):
        make_shards(output, drawn, *SETTINGS, "crops.per_image=1", "images_per_shard=40")
    assert verify(output) == []
    make_shards(output, drawn, *SETTINGS)
    assert contents(output) == one_run


# -- Ray ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A Ray cluster on the loopback interface, with two workers."""
    ray = pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    yield ray
    ray.shutdown()


@pytest.mark.slow
def test_ray_gives_the_same_bytes(cluster: Any, drawn: Path, one_run: dict[str, bytes], tmp_path: Path) -> None:
    assert contents(make_shards(tmp_path / "set", drawn, *SETTINGS, "executor=ray", "workers=2")) == one_run


@pytest.mark.slow
def test_ray_workers_may_be_killed(cluster: Any, drawn: Path, one_run: dict[str, bytes], tmp_path: Path,
                                   monkeypatch: pytest.MonkeyPatch) -> None:
    from preprocess.execution.ray_executor import RayExecutor

    real, killed = RayExecutor.finished, list[int]()

    def finished(self: RayExecutor, report: Any) -> Iterator[Any]:
        for found in real(self, report):
            if len(killed) < 4:
                for worker in workers_of_ray():
                    killed.append(worker)
                    os.kill(worker, signal.SIGKILL)
            yield found

    monkeypatch.setattr(RayExecutor, "finished", finished)
    assert contents(make_shards(tmp_path / "set", drawn, *SETTINGS, "executor=ray", "workers=2")) == one_run
    assert killed, "no worker was killed"


def workers_of_ray() -> list[int]:
    """Processes that run a task now."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (entry / "cmdline").read_bytes().startswith(b"ray::_run"):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


@pytest.mark.slow
def test_an_error_in_a_ray_task_is_the_same_one_line(cluster: Any, drawn: Path, tmp_path: Path) -> None:
    import shutil

    from shards.errors import DatasetError

    root = Path(shutil.copytree(drawn, tmp_path / "scenes"))
    (root / "images/train/scene_train_00003.jpg").write_bytes(b"no image")
    with pytest.raises(DatasetError, match=r"^images/train/scene_train_00003\.jpg is not a readable"):
        make_shards(tmp_path / "set", root, *SETTINGS, "executor=ray")


def test_a_task_hands_back_no_shard(drawn: Path, tmp_path: Path) -> None:
    """What Ray carries: the task in, its record out."""
    config = config_of(drawn, tmp_path)
    dataset = open_dataset(config.dataset, "fail")
    block = pipeline.plan_blocks(config, dataset)[0]

    class Silent:
        def image_done(self, failed: bool = False) -> None:
            pass

    record = WriteBlock(block).run(Job(config, dataset, BlockStore(str(tmp_path), ".staging")), Silent())
    shards = sum((tmp_path / shard["name"]).stat().st_size for shard in record["shards"])
    assert len(pickle.dumps(record)) < shards / 20
    assert len(record["index"]) == 16 * sum(shard["samples"] for shard in record["shards"])


@contextlib.contextmanager
def answering(answer: bytes | None) -> Iterator[int]:
    """The port of a server that answers anybody so; None: not at all."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        open_connections = []

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    open_connections.append(connection)
                    if answer is not None:
                        connection.recv(100)
                        connection.sendall(answer)
                        connection.close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield int(server.getsockname()[1])
        server.shutdown(socket.SHUT_RDWR)
        thread.join(10)
        for connection in open_connections:
            connection.close()


DEAD = [("refused", "nobody answers at .* port {port} .*refused"), (b"", "at .* port {port} is no Ray cluster"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "at .* port {port} is no Ray cluster"),
        (None, "nobody answers at .* port {port} .*timed out")]


@pytest.mark.parametrize("scheme", ["", "ray://"])
@pytest.mark.parametrize(("answer", "message"), DEAD, ids=["refused", "closed", "web server", "silent"])
def test_a_ray_address_where_no_cluster_is_is_one_quick_error(drawn: Path, tmp_path: Path, scheme: str, answer: Any,
                                                              message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray itself goes on trying for minutes."""
    pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    monkeypatch.setattr(ray_address, "_SECONDS", 1.0)
    monkeypatch.setattr("ray._private.services.resolve_ip_for_localhost", lambda host: host)  # else another interface
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # a cluster of another test
    with answering(None if answer == "refused" else answer) as port:
        if answer == "refused":
            with socket.create_server(("127.0.0.1", 0)) as closed:
                port = int(closed.getsockname()[1])
        start = time.monotonic()
        address = f"{scheme}127.0.0.1:{port}"
        with pytest.raises(ConfigError, match=f"ray_address is '{address}': .*{message.format(port=port)}.*; legal: "):
            make_shards(tmp_path / "set", drawn, *SETTINGS, "executor=ray", f"ray_address={address}")
        assert time.monotonic() - start < 30
    assert list((tmp_path / "set").glob("*.tar")) == []


@pytest.mark.parametrize(("address", "message"), [
    ("auto", "Could not find any running Ray instance"), ("nonsense", "Invalid address format"),
    ("127.0.0.1:99999", "Port out of range"), ("ray://", "no host"), ("s3://bucket", "another kind of URL")])
def test_what_is_no_ray_address_is_named(address: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", lambda: set())
    monkeypatch.setattr("ray._private.services.find_bootstrap_address", lambda _: None)
    with pytest.raises(ConfigError, match=f"ray_address is '{address}': .*{message}.* legal: auto, HOST:PORT or ray://"):
        ray_address.check_ray_address(address)
    ray_address.check_ray_address(None)
    monkeypatch.setenv("RAY_ADDRESS", address)
    if address != "auto":
        with pytest.raises(ConfigError, match=f"ray_address is None and RAY_ADDRESS is '{address}'.*{message}"):
            ray_address.check_ray_address(None)


@pytest.mark.slow
def test_a_running_cluster_answers_at_its_address(cluster: Any) -> None:
    ray_address.check_ray_address(cluster.get_runtime_context().gcs_address)


def test_without_ray_the_extra_is_named(drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from shards.errors import ConfigError

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'maskstream\[ray\]'"):
        make_shards(tmp_path / "set", drawn, *SETTINGS, "executor=ray")
