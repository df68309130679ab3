"""Monitoring a run: log lines, state.json, status.py, recorded events, Weights & Biases and report.html."""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from PIL import Image

from shards.errors import ConfigError
from shards.manifest import ClassInfo, load_manifest
from tests.conftest import REPOSITORY
from tests.runs.test_end_to_end import run_program
from trainer.config import RunConfig, load_run_config
from trainer.data.crops import open_reader
from trainer.data.whole_images import WholeImages
from trainer.distributed import DistContext
from trainer.evaluation.evaluation import Predictor
from trainer.loop import train
from trainer.pretrained import restore_model
from trainer.reporting.charts import Chart, Series, smooth, svg_uri, usual_top
from trainer.reporting.plots import draw_curves
from trainer.reporting.report import write_report
from trainer.reporting.run_logger import RunLogger, read_evaluation, read_metrics
from trainer.reporting.state import STATE_NAME, RunState, format_duration, read_state, write_state
from trainer.reporting.wandb_run import WandbRun
from trainer.run.checkpoint import load_checkpoint
from trainer.run.folder import lock_run_folder
from trainer.run.loss_scaling import LossScaler
from trainer.run.reporter import RunReporter, interval_line

ALONE = DistContext(rank=0, world_size=1, device=torch.device("cpu"))
STATE = RunState(status="running", step=30, total_steps=120, world_size=2, host=socket.gethostname(), pid=1,
                 started=1000.0, updated=2000.0, seconds_per_step=41.4, best_miou=0.25, checkpoint="step-00000020.pt",
                 message="")


def tiny(root: Path, run: Path, *overrides: str) -> RunConfig:
    return load_run_config(REPOSITORY / "tests" / "support" / "tiny.yaml",
                           [f"data.root={root}", f"output_dir={run}", *overrides])


@pytest.fixture(scope="module")
def finished(scene_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of four steps with two evaluations."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    train(tiny(scene_shards, run, "train.eval_every=2"), ALONE)
    return run


# -- the log line and state.json ----------------------------------------------------------------------------


@pytest.mark.parametrize(("seconds", "text"), [(0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (185, "3m05s"),
                                               (3725, "1h02m"), (200000, "2d07h"), (-1, "0s")])
def test_durations_have_two_units(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_a_board_that_cannot_be_closed_holds_up_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard's thread dies on a full disk, and closing would wait for it forever."""
    import threading

    monkeypatch.setattr("trainer.reporting.run_logger._BOARD_SECONDS", 0.1)
    logger, for_ever = RunLogger(tmp_path, 0), threading.Event()
    close, logger._board.close = logger._board.close, for_ever.wait  # type: ignore[assignment]
    logger.close()
    for_ever.set()
    close()


def test_an_evaluation_that_repeats_the_last_one_is_not_logged_again(tmp_path: Path) -> None:
    logger = RunLogger(tmp_path, 0)
    metrics = {"mIoU": 1 / 3, "ECE": float("nan"), "images": 2}
    for step, miou in ((4, 1 / 3), (4, 1 / 3), (4, 0.5), (8, 0.5), (8, 0.5)):
        logger.evaluation(step, {"averaged": {**metrics, "mIoU": miou}, "raw": {**metrics, "mIoU": 0.25}})
    logger.close()
    found = {kind: [(record["step"], record["mIoU"]) for record in read_metrics(tmp_path) if record["kind"] == kind]
             for kind in ("val", "val_raw")}
    assert found == {"val": [(4, 1 / 3), (4, 0.5), (8, 0.5)], "val_raw": [(4, 0.25), (8, 0.25)]}


def test_the_line_says_it_all_once() -> None:
    values = {"loss": 12.34567, "lr": 1e-4, "grad_norm": 3.456, "images_per_second": 98.76, "data_wait_share": 0.034,
              "seconds_per_step": 0.1625, "memory_gb": 41.26}
    assert interval_line(STATE, values) == (
        "step 30/120  loss 12.3457  lr 1.00e-04  grad 3.46  98.8 images/s  waiting for data 3%  0.163 s/step  "
        "41.3 GB  ETA 1h02m")


@pytest.mark.parametrize(("host", "in_use", "old", "lost"), [
    ("here", True, True, False), ("here", True, False, False),  # a held lock means that it runs, however silent it is
    ("here", False, True, True), ("here", False, False, True),
    ("elsewhere", True, True, False),
    ("elsewhere", False, True, True), ("elsewhere", None, True, True),  # another host's locks may not be seen
    ("elsewhere", False, False, False),
])
def test_a_held_lock_means_that_it_runs(host: str, in_use: bool | None, old: bool, lost: bool) -> None:
    state = dataclasses.replace(STATE, status="running", host=socket.gethostname() if host == "here" else host,
                                pid=os.getpid(), updated=0.0)
    assert state.is_lost(1, now=1e6 if old else 10.0, in_use=in_use) == lost


def test_a_run_that_evaluates_for_hours_is_not_lost(tmp_path: Path) -> None:
    """The exit codes that a job scheduling script sees."""
    state = dataclasses.replace(STATE, status="running", host=socket.gethostname(), pid=os.getpid(), updated=1e9)
    with lock_run_folder(tmp_path):
        write_state(tmp_path, state)
        result = run_program("trainer/status.py", tmp_path)
        assert result.returncode == 0 and "running" in result.stdout
    result = run_program("trainer/status.py", tmp_path)
    assert result.returncode == 75 and "has exited or hangs, and has been silent for" in result.stdout
    write_state(tmp_path, dataclasses.replace(state, host="elsewhere"))
    result = run_program("trainer/status.py", tmp_path)
    assert result.returncode == 75 and "is on another host, and has been silent for" in result.stdout


def test_waiting_refreshes_the_state_now_and_then(tmp_path: Path) -> None:
    run = SimpleNamespace(step=3, config=tiny(tmp_path, tmp_path), context=ALONE, folder=tmp_path, best_miou=None,
                          writer=SimpleNamespace(newest=None))
    logger, now = RunLogger(tmp_path, 0), [100.0]
    reporter = RunReporter(run, logger, clock=lambda: now[0])
    (tmp_path / "state.json").unlink()
    for now[0] in (100.0, 110.0, 129.9):
        reporter.still_alive()
    assert read_state(tmp_path) is None, "writing it costs something"
    now[0] = 130.0
    reporter.still_alive()
    state = read_state(tmp_path)
    assert state is not None and (state.status, state.step) == ("running", 3)
    logger.close()


def test_an_interval_is_timed_without_the_evaluation_and_the_eta_with_it(tmp_path: Path) -> None:
    config = tiny(tmp_path, tmp_path, "train.log_every=2", "train.total_steps=10")
    run = SimpleNamespace(step=0, config=config, context=ALONE, folder=tmp_path, best_miou=None,
                          writer=SimpleNamespace(newest="step-00000001.pt"),
                          optimizer=SimpleNamespace(param_groups=[{"lr": 0.5}]),
                          scaler=LossScaler(enabled=False, device=ALONE.device))
    logger, now = RunLogger(tmp_path, 0), [100.0]
    reporter = RunReporter(run, logger, clock=lambda: now[0])
    for number in range(4):
        with reporter.waiting():
            now[0] += 1
        now[0] += 3
        run.step += 1
        reporter.step_done({"loss": 1.0, "grad_norm": 2.0})
        if number == 2:
            with reporter.paused():
                now[0] += 24
    logger.close()
    first, second = read_metrics(tmp_path)
    for record in (first, second):
        assert record["seconds_per_step"] == 4 and record["data_wait_share"] == 0.25 and record["lr"] == 0.5
        assert record["images_per_second"] == 1 and record["memory_gb"] > 0.1
    state = read_state(tmp_path)
    assert state is not None and state.step == 4 and state.seconds_per_step == (4 * 4 + 24) / 4
    assert state.seconds_left == 60 and state.checkpoint == "step-00000001.pt"


def test_a_state_comes_back_as_it_was_written(tmp_path: Path) -> None:
    assert read_state(tmp_path) is None and read_state(tmp_path / "nowhere") is None
    for state in (STATE, dataclasses.replace(STATE, status="failed", seconds_per_step=None, best_miou=None,
                                             checkpoint=None, message="it diverged: ½")):
        write_state(tmp_path, state)
        assert read_state(tmp_path) == state
    content = json.loads((tmp_path / STATE_NAME).read_text()) | {"of_a_newer_version": 1, "started": 7}
    (tmp_path / STATE_NAME).write_text(json.dumps(content))
    assert read_state(tmp_path) == dataclasses.replace(state, started=7)


@pytest.mark.parametrize(("content", "message"), [
    (b"{", "not valid JSON"), (b"\xff", "not valid JSON"), (b"[1]", "must hold a JSON object"),
    ({"status": "asleep"}, "'status' is 'asleep', legal: running, stopped, failed, finished"),
    ({"step": "3"}, "field 'step' is '3', legal: int"), ({"step": True}, "field 'step' is True"),
    ({"total_steps": 0}, "'total_steps' is 0, legal: from 1 to"), ({"updated": float("nan")}, "legal: from 0 to"),
    ({"seconds_per_step": float("inf")}, "legal: from 0 to"), ({"step": 10**400}, "field 'step' is 1000"),
    ({"updated": -1e308}, "legal: from 0 to"),
    ({"seconds_per_step": "x"}, r"legal: float \| None"), ({"pid": None}, "field 'pid' is None"),
])
def test_a_malformed_state_is_one_clear_error(tmp_path: Path, content: Any, message: str) -> None:
    if isinstance(content, dict):
        content = json.dumps(dataclasses.asdict(STATE) | content).encode()
    (tmp_path / STATE_NAME).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_state(tmp_path)


def test_what_cannot_be_written_is_a_warning(finished: Path, scene_shards: Path, tmp_path: Path) -> None:
    for name in (STATE_NAME, "report.html"):
        (tmp_path / name).mkdir()  # not to be replaced by a file
    with pytest.warns(UserWarning, match=r"state\.json could not be written"):
        write_state(tmp_path, STATE)
    (tmp_path / STATE_NAME).rmdir()
    with pytest.warns(UserWarning, match=r"report\.html could not be written"):
        write_report(tmp_path, tiny(scene_shards, tmp_path), load_manifest(scene_shards), ALONE)
    shutil.copy(finished / "metrics.jsonl", tmp_path)
    (tmp_path / "curves.png").mkdir()
    with pytest.warns(UserWarning, match=r"curves\.png could not be written"):
        assert draw_curves(tmp_path) is None
    (tmp_path / "curves.png").rmdir()
    (tmp_path / "report.html").rmdir()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "kind": "val"}\n')
    assert draw_curves(tmp_path) is not None, "a record without the value is left out"
    with pytest.warns(UserWarning, match=r"report\.html could not be written: KeyError"):
        write_report(tmp_path, tiny(scene_shards, tmp_path), load_manifest(scene_shards), ALONE)
    shutil.copytree(finished / "pictures", tmp_path / "pictures")
    shutil.copy(finished / "metrics.jsonl", tmp_path)
    picture = max((tmp_path / "pictures").glob("val-panels-*.png"))
    picture.write_bytes(picture.read_bytes()[:900] + bytes(2000))  # what a host that crashed may leave
    write_report(tmp_path, tiny(scene_shards, tmp_path), load_manifest(scene_shards), ALONE)
    assert f"{picture.name} cannot be read" in (tmp_path / "report.html").read_text()


def test_the_report_is_there_from_the_first_evaluation_on(scene_shards: Path, tmp_path: Path,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer import loop

    seen, real = [], loop.evaluate

    def evaluate(*arguments: Any, **options: Any) -> Any:
        seen.append((tmp_path / "run" / "report.html").exists())
        return real(*arguments, **options)

    monkeypatch.setattr(loop, "evaluate", evaluate)
    train(tiny(scene_shards, tmp_path / "run", "train.total_steps=4", "train.eval_every=2"), ALONE)
    assert seen == [False, True]


def test_targets_that_no_query_was_left_for_are_told_once(scene_shards: Path, tmp_path: Path) -> None:
    train(tiny(scene_shards, tmp_path / "run", "train.total_steps=3", "decoder_head.num_queries=1"), ALONE)
    events = [record["what"] for record in read_metrics(tmp_path / "run") if record["kind"] == "event"]
    assert len(events) == 1 and re.match(r"step 1: \d+ targets stayed unmatched, in images with more", events[0])


def test_a_finished_run_says_so(finished: Path) -> None:
    state = read_state(finished)
    assert state is not None and (state.status, state.step, state.total_steps) == ("finished", 4, 4)
    assert state.checkpoint == "step-00000004.pt" and state.host == socket.gethostname() and state.best_miou is not None
    assert state.seconds_per_step is not None and 0 < state.seconds_per_step < state.updated - state.started


# -- status.py ----------------------------------------------------------------------------------------------


def status_of(run: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(REPOSITORY / "trainer/status.py"), str(run), *arguments],
                          capture_output=True, text=True, check=False)


def gone_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize(("changes", "code", "text"), [
    ({}, 0, r"running for 1h00m, last update 1\ds ago"),
    ({"host": "elsewhere", "pid": 999999999}, 0, "running"),
    ({"status": "finished", "step": 120}, 0, r"finished 1\ds ago"),
    ({"status": "stopped", "message": "SIGTERM"}, 75, r"stopped 1\ds ago: SIGTERM; resume with the same command"),
    ({"status": "failed", "message": "loss is nan"}, 1, r"failed 1\ds ago: loss is nan"),
    ({"pid": "gone"}, 75, "lost: "),
    ({"host": "elsewhere", "updated": -5000}, 75, "silent for 1h23m; resume with the same command"),
])
def test_status_tells_people_and_scripts(tmp_path: Path, changes: dict[str, Any], code: int, text: str) -> None:
    now = time.time()
    changes = {"started": now - 3600, "updated": now - 10, **changes}
    changes |= {"updated": now - 5000} if changes["updated"] < 0 else {}
    changes |= {"pid": gone_process()} if changes.get("pid") == "gone" else {}
    write_state(tmp_path, dataclasses.replace(STATE, **changes))
    told, as_json = status_of(tmp_path), status_of(tmp_path, "--json")
    assert told.returncode == as_json.returncode == code and re.search(text, told.stdout), told
    assert json.loads(as_json.stdout)["status"] == text.split(" ")[0].strip(":;") or "silent" in text


def test_a_process_that_has_the_number_of_a_dead_run_is_not_the_run(tmp_path: Path) -> None:
    write_state(tmp_path, dataclasses.replace(STATE, pid=1, started=time.time(), updated=time.time()))
    assert status_of(tmp_path).returncode == 0
    with lock_run_folder(tmp_path):
        assert status_of(tmp_path).returncode == 0
    assert status_of(tmp_path).returncode == 75


def test_status_of_odd_text_and_numbers_is_no_traceback(tmp_path: Path) -> None:
    state = dataclasses.asdict(STATE) | {"status": "stopped", "message": "\ud800", "started": 0, "updated": 0}
    (tmp_path / STATE_NAME).write_text(json.dumps(state))
    assert status_of(tmp_path).returncode == 75
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "kind": "val", "mIoU": 1' + "0" * 400 + "}\n")
    told = status_of(tmp_path)
    assert told.returncode == 2 and "Traceback" not in told.stderr


def test_status_shows_how_far_and_how_well(tmp_path: Path) -> None:
    write_state(tmp_path, dataclasses.replace(STATE, started=time.time() - 50, updated=time.time()))
    logger = RunLogger(tmp_path, 0)
    speed = {"lr": 0.1, "images_per_second": 12.0}
    logger.scalars(30, "train", {"loss": 2.5, "grad_norm": 1.25, **speed})
    logger.evaluation(20, {"raw": {"mIoU": 0.2, "per_class_iou": [0.2]}})
    for number in range(5):
        logger.event(number, f"happening {number}")
    logger.close()
    told = status_of(tmp_path).stdout
    assert "30/120 (25.0%), 41.4 s/step, ETA 1h02m" in told and "step-00000020.pt" in told
    assert "2.5000, gradient norm 1.25" in told and "0.2000 at step 20, best 0.2500" in told
    assert "happening 4" in told and "happening 1" not in told


@pytest.mark.parametrize("line", ['{"step": 1, "kind": "train"}', '{"step": 1, "kind": "val"}', '{"step": "1"}'])
def test_records_that_are_none_of_a_run_are_one_clear_line(tmp_path: Path, line: str) -> None:
    write_state(tmp_path, dataclasses.replace(STATE, started=time.time(), updated=time.time()))
    (tmp_path / "metrics.jsonl").write_text(line + "\n")
    told = status_of(tmp_path)
    assert "Traceback" not in told.stderr and told.returncode == (0 if "kind" not in line else 2)


def test_status_without_a_run_is_one_line_and_costs_no_torch(tmp_path: Path) -> None:
    told = status_of(tmp_path)
    assert told.returncode == 2 and told.stdout == ""
    assert re.fullmatch(r"error: .*state\.json does not exist: no run was started in .*\n", told.stderr)
    code = "import sys, trainer.status; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0


def test_silence_counts_in_intervals_but_not_below_half_an_hour() -> None:
    state = dataclasses.replace(STATE, host="elsewhere", updated=0.0, seconds_per_step=1.0)
    assert not state.is_lost(50, now=1790) and state.is_lost(50, now=1810)
    assert not state.is_lost(1000, now=9990) and state.is_lost(1000, now=10010)
    assert not dataclasses.replace(state, status="stopped").is_lost(50, now=1e9)


# -- the record, TensorBoard, Weights & Biases --------------------------------------------------------------


def test_events_stay_when_a_run_is_continued(tmp_path: Path) -> None:
    logger = RunLogger(tmp_path, 0)
    for step in (1, 2, 3):
        logger.scalars(step, "train", {"loss": 1.0})
        logger.event(step, f"batch {step} skipped")
    logger.close()
    RunLogger(tmp_path, 1).close()
    assert [(record["step"], record["kind"]) for record in read_metrics(tmp_path)] == [
        (1, "train"), (1, "event"), (2, "event"), (3, "event")]


def test_a_full_disk_costs_records_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # TensorBoard writes in a thread, which would notice at a moment of its own.
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", MagicMock())
    logger = RunLogger(tmp_path, 0)
    logger.event(1, "before")
    allowed = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.warns(UserWarning, match="the record in .* could not be written: .*File too large. Training continues"):
        resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "metrics.jsonl").stat().st_size, allowed[1]))
        try:
            logger.scalars(2, "train", {"loss": 1.0})
            logger.evaluation(2, {"raw": {"mIoU": 0.5, "per_class_iou": [0.5] * 1000}})
            logger.picture(2, "noise", Image.effect_noise((64, 64), 50).convert("RGB"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, allowed)
    logger.event(3, "after")
    logger.close()
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 2, 3], "what was held back came after"
    assert read_evaluation(tmp_path) is None


def test_a_continued_run_records_that_it_was(finished: Path, scene_shards: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    train(tiny(scene_shards, run, "train.total_steps=5"), ALONE)
    (event,) = [record for record in read_metrics(run) if record["kind"] == "event"]
    assert event == {"step": 4, "kind": "event",
                     "what": "continued with 1 rank(s); train.total_steps was 4 and is 5; "
                             "train.eval_every was 2 and is 100"}
    assert "continued with 1 rank(s)" in (run / "report.html").read_text()


def test_tensorboard_has_losses_per_layer_speed_validation_and_pictures(finished: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(finished / "tensorboard"))
    board.Reload()
    tags = set(board.Tags()["scalars"])
    assert {f"train/{name}" for name in ("loss", "loss_mask", "loss_mask_0", "loss_dice_1", "loss_cross_entropy_1",
                                         "grad_norm", "lr", "images_per_second", "data_wait_share", "seconds_per_step",
                                         "memory_gb")} <= tags
    assert [event.step for event in board.Scalars("val/mIoU")] == [2, 4]
    assert {"first-batch", "val-panels"} <= set(board.Tags()["images"])


class FakeWandb(ModuleType):
    """The part of wandb's API that is used; records what it receives."""

    class Error(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("wandb")
        self.runs: list[dict[str, Any]] = []
        self.logged: list[dict[str, Any]] = []
        self.Image = lambda picture: picture.size
        self.finished = 0

    def init(self, **settings: Any) -> FakeWandb:
        if settings["project"] == "forbidden":
            raise self.Error("no API key.")
        self.runs.append(settings)
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "step")

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        self.finished += 1


def test_wandb_gets_scalars_and_pictures_of_one_run(
    finished: Path, scene_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    for steps in (5, 6):
        train(tiny(scene_shards, run, f"train.total_steps={steps}", "train.wandb_project=demo"), ALONE)
    first, second = fake.runs
    assert first["id"] == second["id"] and first["resume"] == "allow" and first["project"] == "demo"
    assert first["config"]["train"]["total_steps"] == 5 and first["dir"] == str(run) and fake.finished == 2
    losses = [(values["step"], values["train/loss_mask_0"]) for values in fake.logged if "train/loss" in values]
    assert losses == [(record["step"], record["loss_mask_0"]) for record in read_metrics(run)
                      if record["kind"] == "train"][-2:]
    assert [values["step"] for values in fake.logged if "val/mIoU" in values] == [5, 6]
    assert [values["step"] for values in fake.logged if "val-panels" in values] == [5, 6]


def test_wandb_that_is_absent_or_refuses_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"wandb_project is 'demo' .*pip install maskstream\[wandb\]"):
        WandbRun(tmp_path, "demo", {})
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb())
    with pytest.raises(ConfigError, match=r"no API key\. Run `wandb login`, or set WANDB_MODE=offline"):
        WandbRun(tmp_path, "forbidden", {})


# -- report.html --------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Tags, attributes and text of an HTML page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"


def assert_self_contained(page: Page) -> None:
    assert not page.tags.keys() & {"script", "link", "iframe", "object", "embed", "form", "base"}
    for name, value in page.attributes:
        assert not name.startswith("on")
        assert name not in ("src", "href", "data", "srcset") or value.startswith(("data:image/", "#")), (name, value)
    assert "url(" not in page.source and "@import" not in page.source
    assert "default-src 'none'" in page.source.split("<style>")[0], "the policy comes before what it governs"


def test_the_report_holds_everything_and_points_nowhere(finished: Path, scene_shards: Path) -> None:
    page, manifest = Page(finished / "report.html"), load_manifest(scene_shards)
    assert_self_contained(page)
    assert "http://" not in page.source and "https://" not in page.source
    titles = {value for name, value in page.attributes if name == "alt"}
    for text in ("mask loss, by layer", "dice loss", "cross entropy loss", "learning rate", "gradient norm",
                 "validation mIoU", "images per second"):
        assert any(text in title for title in titles), text
    for text in (manifest.sha256, str(scene_shards), "num_queries: 8",
                 str(torch.__version__), "finished", *(info.name for info in manifest.classes)):
        assert text in page.text, text
    assert page.tags["img"] == 12, "ten charts and two pictures"
    anchors = {value for name, value in page.attributes if name == "href"}
    assert anchors == {f"#{value}" for name, value in page.attributes if name == "id"} and len(anchors) == 8


def test_hostile_names_stay_text(finished: Path, scene_shards: Path, tmp_path: Path) -> None:
    hostile = "</td></title><script src=https://evil></script><img onerror='x'>\"&amp;"
    run = Path(shutil.copytree(finished, tmp_path / hostile.replace("/", "")))
    logger = RunLogger(run, 4)
    logger.event(4, hostile)
    logger.close()
    state = read_state(run)
    assert state is not None
    write_state(run, dataclasses.replace(state, status="failed", message=hostile))
    manifest = load_manifest(scene_shards)
    classes = [ClassInfo(name=f"{hostile}{number}", color=(1, 2, 3)) for number in range(manifest.num_classes)]
    manifest = dataclasses.replace(manifest, classes=classes, dataset=hostile, producer={hostile: hostile},
                                   splits={**manifest.splits, hostile: manifest.split("train")})
    write_report(run, tiny(scene_shards, run, f"load.weights={hostile}"), manifest, ALONE)
    page, harmless = Page(run / "report.html"), Page(finished / "report.html")
    assert_self_contained(page)
    assert page.tags.keys() == harmless.tags.keys() and page.tags["img"] == 12
    assert page.text.count(hostile) > 5 + manifest.num_classes, "shown as they are"


def test_the_confused_pairs_equal_a_count_pixel_by_pixel(finished: Path, scene_shards: Path) -> None:
    config = tiny(scene_shards, finished)
    reader, checkpoint = open_reader(config.data, "val"), load_checkpoint(finished / "checkpoints/step-00000004.pt")
    model = restore_model(checkpoint, None)
    predict = Predictor(model, config, reader.manifest.num_classes, torch.device("cpu"))
    images = WholeImages(reader, config.data)
    pairs: Counter[tuple[int, int]] = Counter()
    for number in range(2):
        item = images[number]
        pairs.update(zip(item.label_map.flatten().tolist(), predict(item.image).flatten().tolist(), strict=True))
    wrong = Counter({pair: count for pair, count in pairs.items() if pair[0] not in (255, pair[1])})
    evaluation = read_evaluation(finished)
    assert evaluation is not None and evaluation["step"] == 4
    found = {(pair["truth"], pair["prediction"]): pair["pixels"] for pair in evaluation["confused_pairs"]}
    assert found and found.items() <= wrong.items()
    assert sorted(found.values()) == sorted(wrong.values())[-len(found):] and len(found) == min(30, len(wrong))
    shown = Page(finished / "report.html").text
    assert all(f"{pixels:,}" in shown for pixels in found.values())


def test_charts_leave_out_what_is_not_finite_and_stay_small() -> None:
    def svg(title: str, points: list[tuple[float, float]]) -> str | None:
        uri = svg_uri(Chart(title=title, series=[Series(name="a", points=points, color="red")]))
        return uri and base64.b64decode(uri.removeprefix("data:image/svg+xml;base64,")).decode()

    chart = svg("<loss>", list(enumerate([1.0, math.nan, math.inf, 2.0])))
    assert chart is not None and "&lt;loss&gt;" in chart and "nan" not in chart
    assert svg("empty", []) is None and svg("bad", [(1, math.nan)]) is None
    for value in (34.521, 1e16, 5e-324, -3.0):
        assert svg("constant", [(1, value), (2, value)]) is not None
    flat, spike = ([(step, 100.0 if step == at else 1.0) for step in range(100_000)] for at in (-1, 777))
    assert svg("long", flat) != svg("long", spike), "a spike of one step is drawn"
    assert len(svg("long", spike) or "") < 100_000


def test_a_smoothed_curve_starts_unbiased_and_axes_ignore_spikes() -> None:
    assert smooth([(0, 3.0), (1, 3.0)]) == [(0, 3.0), (1, pytest.approx(3.0))]
    assert smooth([(0, 0.0), (1, 1.0)])[1][1] == pytest.approx(0.2 / 0.36)
    assert usual_top([(step, 1.0) for step in range(999)] + [(999, 1e6), (1000, math.nan)]) == 1.5
    assert usual_top([]) is None and usual_top([(0, 0.0)]) is None


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not on the path")
def test_a_browser_without_network_shows_the_report(finished: Path, tmp_path: Path) -> None:
    alone = ["unshare", "--net"]  # where it may, else the page's policy has to do
    allowed = shutil.which("unshare") and subprocess.run([*alone, "true"], capture_output=True, check=False)
    browser = [*(alone if allowed and allowed.returncode == 0 else []), "chromium", "--headless", "--no-sandbox",
               "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
               "--no-first-run", "--enable-logging=stderr",
               f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,4000"]
    url = (finished / "report.html").as_uri()
    shown = subprocess.run([*browser, "--dump-dom", url], capture_output=True, text=True, check=True, timeout=120)
    assert shown.stdout.count("data:image/svg+xml") == 10 and "Confused pairs" in shown.stdout
    said = [line for line in shown.stderr.splitlines() if "CONSOLE" in line and "source: chrome://" not in line]
    assert not said, "nothing was refused by the page's own policy"
    (tmp_path / "other.html").write_text(shown.stdout.replace("<h1>", '<img src="https://example.org/x.png"><h1>'))
    refused = subprocess.run([*browser, "--dump-dom", (tmp_path / "other.html").as_uri()], capture_output=True,
                             text=True, check=True, timeout=120)
    assert "violates the following Content Security Policy" in refused.stderr, "it would have been said"
    picture = tmp_path / "report.png"
    subprocess.run([*browser, f"--screenshot={picture}", url], capture_output=True, check=True, timeout=120)
    pixels = Image.open(picture).convert("RGB")
    colors = {color: count for count, color in pixels.getcolors(1 << 24)}
    assert pixels.size == (1200, 4000) and colors[47, 133, 90] > 500, "the badge of a finished run"
    assert len(colors) > 5000, "curves and pictures were drawn"
