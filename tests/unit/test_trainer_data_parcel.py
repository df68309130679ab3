"""Everything requested from a loader process arrives, in order, or the run ends with one line saying why."""

from __future__ import annotations

import dataclasses
import errno
import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.conftest import REPOSITORY
from trainer.data import loader, parcel
from trainer.data.batch import Batch
from trainer.data.crops import open_reader
from trainer.data.geometry import Move
from trainer.data.loader import LoaderError, validation_loader
from trainer.data.parcel import Parcel
from trainer.data.whole_images import LabelledImage, WholeImages
from trainer.data_config import DataConfig

CPU = torch.device("cpu")


def batch_of(*, dense: bool, labels: int = 3) -> Batch:
    torch.manual_seed(0)
    images = torch.randint(0, 256, (2, 5, 7, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    maps = torch.randint(0, max(1, labels), (2, 5, 7), dtype=torch.uint8)
    return Batch(number=4, keys=["a", "b"], images=images, segment_maps=None if dense else maps,
                 masks=[torch.rand(labels, 5, 7) > 0.5 for _ in range(2)] if dense else None,
                 labels=torch.arange(2 * labels), counts=[labels, labels], photometric=torch.rand(2, 6),
                 valid=[(5, 7), (4, 7)], moves=[Move(mirrored=True), Move()], skipped=[])


receive = pickle.loads  # as a queue does it


def send(item: Any) -> Any:
    return receive(pickle.dumps(Parcel(item)))


def assert_equal_items(one: Any, other: Any) -> None:
    for field in dataclasses.fields(one):
        ours, theirs = getattr(one, field.name), getattr(other, field.name)
        if isinstance(ours, Tensor):
            assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype and ours.stride() == theirs.stride()
        elif field.name == "masks" and ours is not None:
            assert all(map(torch.equal, ours, theirs))
        else:
            assert ours == theirs


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("labels", [3, 0])
def test_an_item_arrives_as_it_was(dense: bool, labels: int) -> None:
    item = batch_of(dense=dense, labels=labels)
    received = send(item)
    assert_equal_items(item, received)
    received.images.add_(1)  # its own memory, writable


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_label_maps_are_sent_narrow(dtype: type) -> None:
    label_map = torch.from_numpy(np.array([[1, 2], [200, 255]], dtype))
    item = LabelledImage(number=1, key="a", image=torch.zeros(3, 2, 2, dtype=torch.uint8), label_map=label_map)
    received = send(item)
    assert len(pickle.dumps(Parcel(item))) < 2000
    assert received.label_map.dtype == label_map.dtype
    assert received.label_map.long().tolist() == [[1, 2], [200, 255]]


def test_what_is_queued_is_a_descriptor_and_not_the_pixels() -> None:
    """Short messages are written to the pipe at once: a killed worker never leaves half a message."""
    large = dataclasses.replace(batch_of(dense=False), images=torch.zeros(2, 3, 512, 512, dtype=torch.uint8))
    assert len(pickle.dumps(Parcel(large))) < 2000


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EFBIG, errno.EMFILE, errno.EPERM, errno.ENOMEM])
@pytest.mark.parametrize("name", ["memfd_create", "writev", "dup"])
def test_without_shared_memory_the_bytes_go_through_the_pipe(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int, name: str
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    item = batch_of(dense=False)
    with monkeypatch.context() as patch:
        patch.setattr(os, name, fail)
        message = pickle.dumps(Parcel(item))
    parcel._warn_once.cache_clear()
    assert_equal_items(item, receive(message))
    receive(message)
    assert caplog.text.count(os.strerror(code)) == 1  # said once
    assert all(word in caplog.text for word in ("/dev/shm free", "--shm-size", "data.workers=0"))


def test_short_writes_are_completed(monkeypatch: pytest.MonkeyPatch) -> None:
    writev = os.writev
    monkeypatch.setattr(os, "writev", lambda descriptor, pieces: writev(descriptor, [pieces[0][:13]]))
    item = batch_of(dense=True)
    assert_equal_items(item, send(item))


def test_descriptors_are_closed() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        send(batch_of(dense=False))
    assert len(os.listdir("/proc/self/fd")) <= before + 3  # the sharer's own listener and thread


def limited(root: Path, limit: Callable[[], None] | None, number: int = 40, prefix: Sequence[str] = ()) -> list[str]:
    """Keys of validation images, in order, from loader processes that live under a limit; `prefix`: of the command."""
    script = ("import sys, torch; from trainer.data_config import DataConfig; from trainer.data.crops import *; "
              "from trainer.data.whole_images import *; "
              "from trainer.data.loader import validation_loader as load\n"
              "if __name__ == '__main__':\n"
              " reader = open_reader(DataConfig(root=sys.argv[1], workers=2), 'val')\n"
              " numbers = [n % len(reader) for n in range(int(sys.argv[2]))]\n"
              " for item in load(WholeImages(reader, DataConfig(root=sys.argv[1], workers=2)), numbers, "
              "torch.device('cpu')): print(item.key, int(item.image.sum()), int(item.label_map.long().sum()))\n")
    done = subprocess.run([*prefix, sys.executable, "-c", script, str(root), str(number)], capture_output=True,
                          text=True, cwd=REPOSITORY, timeout=300, preexec_fn=limit)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout.splitlines()


TINY_SHM = ("unshare", "-m", "bash", "-c", 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"', "-")


@pytest.mark.slow
@pytest.mark.parametrize("small", ["files", "/dev/shm"])
def test_every_image_arrives_where_there_is_no_room_to_share(scene_shards: Path, small: str) -> None:
    """torch's own transfer loses images there, and the evaluation would end with exit code 0."""
    reader = open_reader(DataConfig(root=str(scene_shards), workers=0), "val")
    images = [WholeImages(reader, DataConfig())[number % len(reader)] for number in range(40)]
    expected = [f"{item.key} {int(item.image.sum())} {int(item.label_map.long().sum())}" for item in images]
    if small == "files":
        assert limited(scene_shards, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))) == expected
        return
    if subprocess.run([*TINY_SHM, "true"], capture_output=True, check=False).returncode:
        pytest.skip("a small /dev/shm cannot be mounted here")
    assert limited(scene_shards, None, prefix=TINY_SHM) == expected


class _Losing(WholeImages):
    """Loses, repeats or reorders numbers in transit."""

    damage: Callable[[list[int]], list[int]]

    def __iter__(self) -> Iterator[LabelledImage]:
        yield from map(self.__getitem__, self.damage(list(self.numbers)))


@pytest.mark.parametrize("damage", [lambda n: n[:-1], lambda n: n[1:], lambda n: [*n, 0], lambda n: [*n[1:], n[0]],
                                    lambda n: [n[0], *n]])
def test_an_item_that_is_missing_or_out_of_order_is_an_error(scene_shards: Path, damage: Any) -> None:
    config = DataConfig(root=str(scene_shards), workers=0)
    images = _Losing(open_reader(config, "val"), config)
    images.damage = damage
    with pytest.raises((LoaderError, ValueError), match=r"was expected|zip\(\) argument"):
        list(validation_loader(images, range(4), CPU))


def test_loader_processes_that_cannot_start_are_an_error(scene_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(loader, "DataLoader", fail)
    config = DataConfig(root=str(scene_shards), workers=1)
    with pytest.raises(LoaderError, match=r"No space left on device.*/dev/shm"):
        list(validation_loader(WholeImages(open_reader(config, "val"), config), range(2), CPU))


def test_the_advice_names_the_size_of_dev_shm() -> None:
    assert "--shm-size" in parcel.shared_memory_advice() and "MB of /dev/shm free" in parcel.shared_memory_advice()


@pytest.mark.slow
def test_a_long_tmpdir_is_no_obstacle(scene_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("scratch-of-job-" * 8)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    assert len(limited(scene_shards, None, 4)) == 4


class _Sleeping(WholeImages):
    """Storage that never answers."""

    def __iter__(self) -> Iterator[LabelledImage]:
        time.sleep(600)
        yield from ()


@pytest.mark.parametrize(("codes", "said"), [
    ([-9, 0], " (one was killed by SIGKILL, as the kernel does when memory runs out)"), ([None, 1], ""),
    ([-7], " (one was killed by SIGBUS, as when memory runs out)"), ([-11], " (one was killed by SIGSEGV)"), ([], "")])
def test_how_loader_processes_ended_is_said(codes: list[int | None], said: str) -> None:
    assert loader._deaths([types.SimpleNamespace(exitcode=code) for code in codes]) == said


@pytest.mark.slow
def test_a_loader_process_that_dies_before_its_first_item_is_noticed(scene_shards: Path) -> None:
    config = DataConfig(root=str(scene_shards), workers=2)
    images = _Sleeping(open_reader(config, "val"), config)
    killed: list[float] = []

    def kill() -> None:
        while len(multiprocessing.active_children()) < config.workers:
            time.sleep(0.1)
        time.sleep(2)  # now the trainer waits
        os.kill(max(child.pid or 0 for child in multiprocessing.active_children()), signal.SIGKILL)
        killed.append(time.monotonic())

    items = validation_loader(images, range(4), CPU)
    threading.Thread(target=kill, daemon=True).start()
    with pytest.raises(LoaderError, match="SIGKILL, as the kernel does when memory runs out"):
        next(items)
    assert time.monotonic() - killed[0] < 10
