"""Runs that meet signals, dead or hanging processes, lack of memory, bad numbers: their messages, and recovery."""

from __future__ import annotations

import datetime
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from shards.errors import ConfigError, RunError
from tests.conftest import REPOSITORY
from tests.support.training_run import TINY, TrainingRun, assert_equal_states, assert_same_end, final_state, newest_step
from tests.support.zygote import run_forked
from trainer import loop, stopping
from trainer.config import load_run_config
from trainer.data.loader import LoaderError
from trainer.distributed import DistContext, agree_on_start
from trainer.loop import train
from trainer.out_of_memory import OutOfMemory
from trainer.reporting.run_logger import read_metrics
from trainer.reporting.state import STATE_NAME, read_state
from trainer.run.failures import RankLost, explain_failures
from trainer.run.folder import FolderInUse, lock_run_folder, record_start
from trainer.run.non_finite import TrainingDiverged
from trainer.run.run import build_run, run_places
from trainer.stopping import EXIT_TO_BE_CONTINUED, RunStopped, StopRequest, stop_on_signals
from trainer.watchdog import EXIT_HUNG, PHASES, LastHeard, Watchdog, describe_hang

ALONE = DistContext(rank=0, world_size=1, device=torch.device("cpu"))


# Stopping


def test_signals_are_noted_and_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        request = StopRequest()
        with stop_on_signals(request):
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), signal.SIGTERM)  # again: nothing new
            assert request.signal_name == signal.Signals(number).name and request.requested
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_interrupt_ends_it_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("trainer.stopping.time.monotonic", lambda: now)
    with stop_on_signals(StopRequest()):
        os.kill(os.getpid(), signal.SIGINT)
        now += 0.3
        os.kill(os.getpid(), signal.SIGINT)  # the same Ctrl-C, passed on by torchrun
        now += 2
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_stop_while_evaluating_is_made_up_for(scene_shards: Path, tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    def config(name: str) -> Any:
        return load_run_config(TINY, [f"data.root={scene_shards}", f"output_dir={tmp_path / name}",
                                      "train.total_steps=4", "train.eval_every=2", "train.checkpoint_every=100"])

    train(config("whole"), ALONE)
    real = loop.evaluate

    def interrupted(*arguments: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGUSR1)
        return real(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(RunStopped, match="SIGUSR1: stopped after step 2 of 4"):
        patch.setattr(loop, "evaluate", interrupted)
        train(config("stopped"), ALONE)
    state = final_state(tmp_path / "stopped")
    assert state.step == 2 and not state.evaluated
    train(config("stopped"), ALONE)
    assert_same_end(tmp_path / "whole", tmp_path / "stopped")
    whole, stopped = ([(record["step"], record["mIoU"]) for record in read_metrics(tmp_path / name)
                       if record["kind"] == "val"] for name in ("whole", "stopped"))
    assert whole == stopped
    assert final_state(tmp_path / "whole").best_miou == final_state(tmp_path / "stopped").best_miou


STEPS = 60
SETTINGS = (f"train.total_steps={STEPS}", "train.checkpoint_every=5", "train.eval_every=30", "data.workers=1")


@pytest.fixture(scope="module")
def undisturbed(scene_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of SETTINGS on two ranks that nobody disturbs, without loader processes, which change no batch."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(scene_shards, folder, *SETTINGS, "data.workers=0")
    return folder


def finish(root: Path, folder: Path, *settings: str) -> str:
    """Train, or go on, on two ranks to the end; what was printed."""
    done = run_forked(REPOSITORY / "trainer/train.py", "--config", TINY, f"data.root={root}", f"output_dir={folder}",
                      *settings, ranks=2)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 75)])
def test_one_process_stops_after_a_whole_step_and_leaves_nothing(scene_shards: Path, tmp_path: Path,
                                                                 number: signal.Signals, code: int) -> None:
    assert code == EXIT_TO_BE_CONTINUED
    run = TrainingRun(scene_shards, tmp_path / "run", "train.total_steps=100000", "train.checkpoint_every=100000",
                      "data.workers=2", "train.eval_every=2")
    run.wait_for_step(5)
    assert not run.zombies(), "evaluations have come and gone, with their loader processes"
    os.killpg(run.process.pid, number)  # all its processes, as a terminal and torchrun do
    assert run.wait(60) == code, run.text
    assert f"stopped on request: {number.name}: stopped after step" in run.text and "Traceback" not in run.text
    assert final_state(run.folder).step == newest_step(run.folder)
    run.assert_gone()


@pytest.mark.slow
def test_a_second_interrupt_ends_the_program_in_the_middle_of_a_step(scene_shards: Path, tmp_path: Path) -> None:
    run = TrainingRun(scene_shards, tmp_path / "run", "train.global_batch_size=4000", "data.workers=1")
    deadline = time.monotonic() + 120
    while "new run" not in run.text:
        assert run.process.poll() is None and time.monotonic() < deadline, run.text
        time.sleep(0.1)
    time.sleep(1.0)  # its first step takes minutes
    run.process.send_signal(signal.SIGINT)
    while "SIGINT: stopping after this step; press Ctrl-C again" not in run.text:
        assert run.process.poll() is None and time.monotonic() < deadline, run.text
        time.sleep(0.1)
    time.sleep(1.5)  # sooner it would count as the same key press
    assert run.process.poll() is None, run.text
    run.process.send_signal(signal.SIGINT)
    assert run.wait(60) == 130, run.text
    run.assert_gone()
    state = read_state(run.folder)
    assert state is not None and (state.status, state.step) == ("stopped", 0)
    assert state.message == "interrupted without a checkpoint"


@pytest.mark.slow
def test_ranks_that_stop_or_die_go_on_bit_for_bit(scene_shards: Path, tmp_path: Path, undisturbed: Path) -> None:
    """Stopped by a signal to the launcher; gone on with, and restarted by torchrun when a rank is killed."""
    run = TrainingRun(scene_shards, tmp_path / "run", *SETTINGS, ranks=2,
                      launcher=("--standalone", "--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1"))
    run.wait_for_step(7)
    os.kill(run.process.pid, signal.SIGUSR1)
    assert run.wait() != 0
    run.assert_gone()
    stopped = final_state(run.folder).step
    assert stopped == newest_step(run.folder) < STEPS, run.text
    state = read_state(run.folder)
    assert state is not None and state.status == "stopped" and state.step == stopped
    run = TrainingRun(scene_shards, tmp_path / "run", *SETTINGS, "data.workers=0", ranks=2,
                      launcher=("--standalone", "--max-restarts", "1"))
    run.wait_for_step(stopped + 7)
    os.kill(run.ranks()[0], signal.SIGKILL)
    assert run.wait() == 0, run.text
    assert f"continuing at step {stopped}" in run.text and run.text.count("continuing at step") == 2
    assert_same_end(undisturbed, run.folder)
    run.assert_gone()


@pytest.mark.stress
def test_ranks_stop_together_and_go_on_bit_for_bit(scene_shards: Path, tmp_path: Path, undisturbed: Path) -> None:
    """Stopped three times, by signals to the launcher and to one rank, and gone on with each time."""
    stopped = 0
    for target, number, workers in (("launcher", signal.SIGTERM, 1), ("launcher", signal.SIGUSR1, 0),
                                    ("rank 1", signal.SIGTERM, 0)):
        run = TrainingRun(scene_shards, tmp_path / "run", *SETTINGS, f"data.workers={workers}", ranks=2,
                          launcher=("--standalone", "--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1"))
        run.wait_for_step(stopped + 7)
        os.kill(run.process.pid if target == "launcher" else run.ranks()[1], number)
        assert run.wait() != 0
        run.assert_gone()
        assert not stopped or f"continuing at step {stopped}" in run.text
        stopped = final_state(run.folder).step
        assert stopped == newest_step(run.folder) < STEPS, run.text
        state = read_state(run.folder)
        assert state is not None and state.status == "stopped" and state.step == stopped
    assert f"continuing at step {stopped}" in finish(scene_shards, tmp_path / "run", *SETTINGS)
    assert_same_end(undisturbed, tmp_path / "run")


# Dead and hanging processes


def test_each_start_of_the_ranks_has_keys_of_its_own() -> None:
    """With a store that holds what dead ranks wrote: one greeting that was answered and one that was not."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    stale = store.add("greetings/1", 1)
    store.set(f"answers/1/{stale}", "start-1")
    store.add("starts", 1)
    store.add("greetings/1", 1)  # killed before it was answered
    for expected in ("start-2", "start-3"):
        found: dict[int, str] = {}

        def start(rank: int, found: dict[int, str] = found) -> None:
            mine = dist.TCPStore("localhost", store.port, is_master=False)
            time.sleep(0.1 * (2 - rank))  # rank 0 is the last to come
            found[rank] = agree_on_start(mine, rank, 3)

        threads = [threading.Thread(target=start, args=(rank,)) for rank in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert found == dict.fromkeys(range(3), expected)


@pytest.mark.stress
def test_torchrun_restarts_after_a_killed_rank(scene_shards: Path, tmp_path: Path, undisturbed: Path) -> None:
    run = TrainingRun(scene_shards, tmp_path / "run", *SETTINGS, "data.workers=0", ranks=2,
                      launcher=("--standalone", "--max-restarts", "2"))
    for step, rank in ((8, 1), (25, 0)):
        run.wait_for_step(step)
        os.kill(run.ranks()[rank], signal.SIGKILL)
        time.sleep(1)
    assert run.wait() == 0, run.text
    assert run.text.count("continuing at step") == 2
    assert_same_end(undisturbed, run.folder)
    run.assert_gone()


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["rank 1", "loader worker", pytest.param("launcher", marks=pytest.mark.stress)])
def test_a_death_ends_the_run_soon_and_leaves_nothing(scene_shards: Path, tmp_path: Path, victim: str) -> None:
    run = TrainingRun(scene_shards, tmp_path / "run", "train.total_steps=100000", "train.checkpoint_every=5",
                      "data.workers=1", ranks=2)
    run.wait_for_step(3)
    pid = {"rank 1": run.ranks()[1], "loader worker": run.loader_workers()[0], "launcher": run.process.pid}[victim]
    os.kill(pid, signal.SIGKILL)
    assert run.wait(90) != 0
    run.assert_gone()
    expected = {"rank 1": r"rank 0 on \S+, step \d+: another rank died or became unreachable",
                "loader worker": r"rank [01] on \S+, step \d+: loader processes died .*one was killed by SIGKILL",
                "launcher": ""}[victim]  # the kernel ends them at once
    assert re.search(expected, run.text), run.text


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_in_bounded_time(scene_shards: Path, tmp_path: Path) -> None:
    run = TrainingRun(scene_shards, tmp_path / "run", "train.total_steps=100000", "train.hang_timeout=10",
                      "train.checkpoint_every=100000", ranks=2)
    run.wait_for_step(3)
    hung = run.ranks()[1]
    os.kill(hung, signal.SIGSTOP)
    deadline = time.monotonic() + 60
    while "no progress for 10 s" not in run.text:
        assert time.monotonic() < deadline, run.text
        time.sleep(0.1)
    os.kill(hung, signal.SIGCONT)  # so that torchrun need not wait half a minute before it kills
    assert run.wait(90) != 0
    assert "rank 1 on" in run.text and "does not answer, last seen at step" in run.text
    assert "1 other rank(s) wait for it" in run.text
    run.assert_gone()


@pytest.mark.stress
def test_loader_processes_that_stand_still_end_the_run_in_bounded_time(scene_shards: Path, tmp_path: Path) -> None:
    run = TrainingRun(scene_shards, tmp_path / "run", "train.total_steps=100000", "train.hang_timeout=8",
                      "train.checkpoint_every=100000", "data.workers=1")
    run.wait_for_step(3)
    for pid in run.loader_workers():
        os.kill(pid, signal.SIGSTOP)
    assert run.wait(60) == EXIT_HUNG, run.text
    assert "no progress for 8 s" in run.text and "waiting for data, for" in run.text
    run.assert_gone()


def test_the_rank_that_is_behind_is_blamed() -> None:
    data, backward = PHASES.index("waiting for data"), PHASES.index("backward pass")
    ranks = {0: LastHeard(0, "a", 11, backward, 70.0, 5), 1: LastHeard(1, "b", 11, data, 75.0, 5),
             2: LastHeard(2, "b", 11, backward, 1.0, 5)}
    later = {rank: progress._replace(published=6, age=75.0) for rank, progress in ranks.items()}
    text = str(describe_hang(ranks, later, 60))
    assert "rank 1 on b is at step 12, waiting for data, for 75 s; 2 other rank(s) wait for it" in text
    silent = str(describe_hang(ranks, {**later, 2: ranks[2]}, 60))
    assert "rank 2 on b does not answer, last seen at step 12, backward pass" in silent
    assert describe_hang(ranks, {**later, 2: later[2]._replace(age=1.0)}, 60) is None, "one still evaluates"


def test_loading_may_take_any_time_but_silence_may_not() -> None:
    loading = PHASES.index("loading")
    ranks = {0: LastHeard(0, "a", 0, loading, 500.0, 5), 1: LastHeard(1, "b", 0, loading, 500.0, 5)}
    later = {rank: progress._replace(published=9, age=520.0) for rank, progress in ranks.items()}
    assert describe_hang(ranks, later, 60) is None
    text = str(describe_hang(ranks, {**later, 1: ranks[1]}, 60))
    assert "rank 1 on b does not answer, last seen at step 1, loading" in text


def wait_for_lock(run: TrainingRun) -> None:
    """Wait until a rank holds the run's folder and starts loading data and model."""
    deadline = time.monotonic() + 90
    while not (run.folder / ".lock").exists():
        assert time.monotonic() < deadline and run.process.poll() is None, run.text
        time.sleep(0.01)


@pytest.mark.slow
def test_a_launcher_that_dies_while_ranks_load_leaves_nothing(scene_shards: Path, tmp_path: Path) -> None:
    settings = ("train.total_steps=4", "data.workers=1")
    run = TrainingRun(scene_shards, tmp_path / "run", *settings, ranks=2)
    wait_for_lock(run)
    run.process.kill()
    run.process.wait()
    run.assert_gone(timeout=15)
    assert run_status(tmp_path / "run") == EXIT_TO_BE_CONTINUED
    assert "is in use by a run" not in finish(scene_shards, tmp_path / "run", *settings)


def test_a_start_that_died_before_its_first_word_is_lost(tmp_path: Path) -> None:
    assert run_status(tmp_path) == 2
    (tmp_path / ".lock").touch()
    assert run_status(tmp_path) == EXIT_TO_BE_CONTINUED
    with lock_run_folder(tmp_path):
        assert run_status(tmp_path) == 0


def run_status(folder: Path) -> int:
    return subprocess.run([sys.executable, str(REPOSITORY / "trainer/status.py"), str(folder)], check=False).returncode


@pytest.mark.stress
def test_a_rank_that_is_stopped_while_loading_is_named(scene_shards: Path, tmp_path: Path) -> None:
    run = TrainingRun(scene_shards, tmp_path / "run", "train.total_steps=100000", "train.hang_timeout=10", ranks=2)
    wait_for_lock(run)
    stopped = run.ranks()[1]
    os.kill(stopped, signal.SIGSTOP)
    deadline = time.monotonic() + 100
    while "does not answer" not in run.text:
        assert time.monotonic() < deadline, run.text
        time.sleep(0.2)
    os.kill(stopped, signal.SIGCONT)  # so that torchrun need not wait half a minute before it kills
    assert run.wait(60) != 0
    assert re.search(r"rank 1 on \S+ does not answer, last seen at step 1, loading", run.text), run.text
    run.assert_gone()


def test_a_store_that_cannot_be_reached_ends_the_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer.distributed import _join

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", str(port))):
        monkeypatch.setenv(name, value)
    with pytest.raises(RunError, match=rf"rank 1 could not join .* store at localhost:{port} within 2 s"):
        _join(datetime.timedelta(seconds=2))


def test_a_rank_whose_launcher_died_before_it_began_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the kernel was asked to watch the launcher; nobody listens at its store any more."""
    monkeypatch.setattr(stopping, "die_with_parent", lambda: None)
    with socket.create_server(("localhost", 0)) as store:
        for name, value in (("LOCAL_RANK", "0"), ("RANK", "0"), ("TORCHELASTIC_USE_AGENT_STORE", "True"),
                            ("MASTER_ADDR", "localhost"), ("MASTER_PORT", str(store.getsockname()[1]))):
            monkeypatch.setenv(name, value)
        stopping.die_with_launcher()
    with pytest.raises(stopping.LauncherGone, match=r"rank 0 exits: the launcher .* refuses connections"):
        stopping.die_with_launcher()
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    stopping.die_with_launcher()  # rank 0 holds the store, and may start later than this one


@pytest.mark.stress
def test_an_evaluation_whose_loader_stands_still_ends(scene_shards: Path, undisturbed: Path, tmp_path: Path) -> None:
    run = TrainingRun(scene_shards, tmp_path / "eval", "--checkpoint", str(undisturbed / "checkpoints/best.pt"),
                      "--output", str(tmp_path / "out"), "train.hang_timeout=8", "data.workers=1",
                      program=REPOSITORY / "trainer/eval.py")
    deadline = time.monotonic() + 90
    while not run.loader_workers():
        assert time.monotonic() < deadline and run.process.poll() is None, run.text
        time.sleep(0.01)
    for pid in run.loader_workers():
        os.kill(pid, signal.SIGSTOP)
    assert run.wait(90) == EXIT_HUNG, run.text
    assert re.search(r"no progress for 8 s .* rank 0 on \S+ is at step 1, evaluation", run.text), run.text
    run.assert_gone()


def test_a_single_process_that_hangs_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    stopped = threading.Event()

    def end(code: int) -> None:
        ended.append(code)
        stopped.set()
        raise SystemExit

    monkeypatch.setattr("trainer.watchdog.os._exit", end)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    with Watchdog(0, 1, None, timeout=2.0) as watchdog:
        for _ in range(10):  # progress
            watchdog.beat("forward pass", 3)
            assert not stopped.wait(0.05)
        assert stopped.wait(30)
    assert ended[0] == EXIT_HUNG


@pytest.mark.stress
def test_other_nodes_continue_the_same_batches(scene_shards: Path, tmp_path: Path) -> None:
    """`torchrun --nnodes 1:2`: two nodes start, one is lost, the other continues alone with twice the accumulation."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launcher = ("--nnodes", "1:2", "--max-restarts", "3", "--rdzv-backend", "c10d", "--rdzv-endpoint",
                f"localhost:{port}", "--rdzv-id", "elastic",
                "--rdzv-conf", "join_timeout=60,last_call_timeout=1,timeout=60")
    settings = ("train.total_steps=100", "train.checkpoint_every=2")
    alone = TrainingRun(scene_shards, tmp_path / "alone", *settings)
    assert alone.wait() == 0, alone.text
    first = TrainingRun(scene_shards, tmp_path / "run", *settings, ranks=1, launcher=launcher)
    time.sleep(0.5)
    second = TrainingRun(scene_shards, tmp_path / "run", *settings, ranks=1, launcher=launcher)
    first.wait_for_step(6)
    both = first.text + second.text
    os.killpg(second.process.pid, signal.SIGKILL)
    for pid in second.processes():
        os.kill(pid, signal.SIGKILL)
    second.wait()
    assert first.wait(240) == 0, first.text
    assert "2 rank(s) on cpu" in both and "1 rank(s) on cpu" in first.text + second.text, both
    ours, theirs = ({record["step"]: record["loss"] for record in read_metrics(tmp_path / name)
                     if record["kind"] == "train"} for name in ("alone", "run"))
    assert ours.keys() == theirs.keys() == set(range(1, 101))
    assert list(theirs.values()) == pytest.approx(list(ours.values()), rel=5e-3)  # batch norm on a CPU is per process


def test_ranks_that_cannot_share_the_global_batch_are_refused_at_once(scene_shards: Path, tmp_path: Path) -> None:
    three = DistContext(rank=0, world_size=3, device=torch.device("cpu"))
    config = load_run_config(TINY, [f"data.root={scene_shards}", f"output_dir={tmp_path / 'run'}"])
    with pytest.raises(ConfigError, match=r"train.global_batch_size is 4, legal: a multiple of .* = 2 x 3 = 6"):
        train(config, three)
    state = read_state(tmp_path / "run")  # "failed", or scripts that queue stopped runs again would never end
    assert state is not None and state.status == "failed" and state.step == 0


# What errors say


@pytest.mark.parametrize(("error", "kind", "text"), [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), OutOfMemory,
     "out of memory .*micro_batch_size .now 2; the global batch stays 4.*gradient_checkpointing=true .now false"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), OutOfMemory,
     r"loss.num_points \(now 64\)"),
    (MemoryError(), OutOfMemory, r"data.workers \(now 0\)"),
    (RuntimeError("[pair.cc:534] Connection closed by peer [127.0.0.1]:1"), RankLost, "another rank died"),
    (LoaderError("a loader process died"), LoaderError, "step 8: a loader process died"),
])
def test_errors_name_rank_host_step_and_what_to_turn(scene_shards: Path, tmp_path: Path, error: Exception,
                                                     kind: type[Exception], text: str) -> None:
    run = tiny_run(scene_shards, tmp_path)
    run.step = 7
    with pytest.raises(kind, match=f"rank 0 on {socket.gethostname()}, step 8: .*") as caught, explain_failures(run):
        raise error
    assert caught.match(text) and getattr(caught.value, "exit_code", None) == 1


def test_other_errors_pass_as_they_are(scene_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"^a bug$"), explain_failures(tiny_run(scene_shards, tmp_path)):
        raise RuntimeError("a bug")


def tiny_run(root: Path, folder: Path) -> Any:
    config = load_run_config(TINY, [f"data.root={root}", f"output_dir={folder / 'run'}"])
    return build_run(config, ALONE, run_places(config))


# Numbers that are not finite


def with_bad_image(monkeypatch: pytest.MonkeyPatch, micro_batch: int) -> None:
    """The pixels of one micro-batch are NaN, whenever it is computed."""
    real = loop.prepare_images

    def prepare(batch: Any, config: Any) -> torch.Tensor:
        images = real(batch, config)
        return images * torch.nan if batch.number == micro_batch else images

    monkeypatch.setattr(loop, "prepare_images", prepare)


def bad_run(root: Path, folder: Path, *overrides: str) -> Any:
    config = load_run_config(TINY, [f"data.root={root}", f"output_dir={folder}", "train.total_steps=8", *overrides])
    return train(config, ALONE)


def test_bad_numbers_stop_the_run_with_a_record(scene_shards: Path, tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    with_bad_image(monkeypatch, 7)  # the second of step 4
    with pytest.raises(TrainingDiverged, match=r"step 4, rank 0: .* holds NaN .*; samples: scene_.*\. The weights"):
        bad_run(scene_shards, tmp_path / "run")
    record = json.loads((tmp_path / "run/non-finite/step-00000004-rank-0.json").read_text())
    good, bad = record["micro_batches"]
    assert (good["number"], bad["number"]) == (6, 7) and len(bad["keys"]) == 2
    assert good["problem"] is None and "NaN or infinite logits" in bad["problem"]
    assert isinstance(good["losses"]["loss_mask_1"], float) and bad["losses"]["loss_mask_1"] == "nan"
    assert {"segmentation_model.1.predictor", "segmentation_model.1.pixel_decoder"} < record["gradient_norms"].keys()
    assert set(record["gradient_norms"].values()) == {"nan"}
    assert final_state(tmp_path / "run").step == 2


def test_a_bad_step_is_left_out_and_rolling_back_comes_to_the_same(scene_shards: Path, tmp_path: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    with_bad_image(monkeypatch, 9)  # of step 5; checkpoints are of 2, 4, 6, 8
    for policy in ("skip", "rollback"):
        bad_run(scene_shards, tmp_path / policy, f"train.on_non_finite={policy}")
        state = final_state(tmp_path / policy)
        assert state.step == 8 and state.skipped_steps == [5]
        assert all(bool(torch.isfinite(tensor).all()) for tensor in state.model.values())  # batch norm's too
        steps = [record["step"] for record in read_metrics(tmp_path / policy)]
        assert 5 not in steps and 6 in steps
    assert_same_end(tmp_path / "skip", tmp_path / "rollback")


def test_skipping_survives_a_resume_and_has_a_budget(scene_shards: Path, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    with_bad_image(monkeypatch, 9)
    bad_run(scene_shards, tmp_path / "whole", "train.on_non_finite=skip")
    bad_run(scene_shards, tmp_path / "resumed", "train.on_non_finite=skip", "train.checkpoint_every=1",
            "train.keep_checkpoints=8")
    for killed_after in (4, 6):  # before the bad step, and when it was left out already
        run = Path(shutil.copytree(tmp_path / "resumed", tmp_path / f"after-{killed_after}"))
        for path in (run / "checkpoints").glob("step-*.pt"):
            if int(path.stem[5:]) > killed_after:
                path.unlink()
        (run / "checkpoints/best.pt").unlink()
        bad_run(scene_shards, run, "train.on_non_finite=skip")
        assert_same_end(tmp_path / "whole", run)
        assert final_state(run).skipped_steps == [5]
    with_bad_image(monkeypatch, 17)  # of step 9
    with pytest.raises(TrainingDiverged, match=r"step 9, .* Steps \[5, 9\] were skipped, .*non_finite_budget is 1"):
        bad_run(scene_shards, run, "train.total_steps=10", "train.on_non_finite=skip", "train.non_finite_budget=1")


def test_a_rollback_without_a_checkpoint_says_so(scene_shards: Path, tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    with_bad_image(monkeypatch, 0)
    with pytest.raises(TrainingDiverged, match=r"no checkpoint yet to roll back to; lower train.checkpoint_every"):
        bad_run(scene_shards, tmp_path / "run", "train.on_non_finite=rollback")


_BAD_ON_ONE_RANK = """
import sys
import torch
from trainer import loop

real = loop.prepare_images
loop.prepare_images = lambda batch, config: real(batch, config) * (torch.nan if batch.number == 9 else 1)
sys.argv[0] = "trainer/train.py"
from trainer.train import main
from shards.cli.command_line import run_entry_point
run_entry_point(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["stop", "skip", "rollback"])
def test_ranks_decide_alike_when_one_sees_bad_numbers(scene_shards: Path, tmp_path: Path, policy: str) -> None:
    program = tmp_path / "bad.py"
    program.write_text(_BAD_ON_ONE_RANK)
    folder = tmp_path / "run"
    ended = run_forked(program, "--config", TINY, f"data.root={scene_shards}", f"output_dir={folder}",
                       "train.total_steps=8", f"train.on_non_finite={policy}", ranks=2)
    records = sorted(path.name for path in (folder / "non-finite").iterdir())
    assert records == [f"step-00000005-rank-{rank}.json" for rank in (0, 1)]
    problems = [json.loads((folder / "non-finite" / name).read_text())["micro_batches"][0]["problem"]
                for name in records]
    assert problems[0] is None and problems[1], "micro-batch 9 is rank 1's"
    if policy == "stop":
        assert ended.returncode != 0 and "holds NaN" in ended.stderr
        return
    assert ended.returncode == 0, ended.stderr
    assert final_state(folder).skipped_steps == [5]


def test_states_that_differ_are_noticed() -> None:
    with pytest.raises(AssertionError, match=r"a\[0\]"):
        assert_equal_states({"a": [torch.zeros(2)]}, {"a": [torch.tensor([0.0, 1e-30])]})


# One run in a folder, from its first moment


def test_a_folder_holds_one_run_at_a_time(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    holder = f"process {os.getpid()} on .*choose another output_dir"
    with lock_run_folder(folder), pytest.raises(FolderInUse, match=holder), lock_run_folder(folder, wait_seconds=0.7):
        pytest.fail("two runs in one folder")
    assert capfd.readouterr().out.count("waiting for its end") == 1
    with lock_run_folder(folder, wait_seconds=0.0):
        pass  # let go


def test_a_run_waits_for_the_one_before_to_end(tmp_path: Path) -> None:
    entered = threading.Event()

    def first() -> None:
        with lock_run_folder(tmp_path):
            entered.set()
            time.sleep(0.3)

    thread = threading.Thread(target=first)
    thread.start()
    entered.wait(10)
    with lock_run_folder(tmp_path, wait_seconds=60):
        assert not thread.is_alive() or thread.join(10) is None
    thread.join()


def test_what_happens_while_a_run_starts_is_in_its_state(tmp_path: Path) -> None:
    with record_start(tmp_path, 10, 2):
        state = read_state(tmp_path)
        assert state is not None and (state.status, state.step, state.total_steps) == ("running", 0, 10)
    with pytest.raises(ConfigError), record_start(tmp_path, 10, 2):
        raise ConfigError("no such data")
    state = read_state(tmp_path)
    assert state is not None and (state.status, state.message) == ("failed", "ConfigError: no such data")
    with pytest.raises(KeyboardInterrupt), record_start(tmp_path, 10, 2):
        raise KeyboardInterrupt
    state = read_state(tmp_path)
    assert state is not None and state.status == "stopped"
    (tmp_path / STATE_NAME).write_text("damaged")
    with record_start(tmp_path, 10, 2):
        assert read_state(tmp_path) is not None


def test_a_continued_run_that_cannot_start_has_failed_not_stopped(scene_shards: Path, tmp_path: Path) -> None:
    settings = [f"data.root={scene_shards}", f"output_dir={tmp_path}", "train.total_steps=2",
                "train.checkpoint_every=1"]
    train(load_run_config(TINY, settings), ALONE)
    with pytest.raises(ConfigError, match="seed was"):
        train(load_run_config(TINY, [*settings, "seed=5"]), ALONE)
    state = read_state(tmp_path)
    assert state is not None and state.status == "failed" and "seed was" in state.message and state.step == 2
    with pytest.raises(ConfigError, match=r"train\.total_steps is 1, but .* has already been trained for 2 steps"):
        train(load_run_config(TINY, [*settings, "train.total_steps=1"]), ALONE)
