"""`trainer/eval.py` from shards and folders, on one and several processes, killed and continued; what it writes."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from shards.errors import ConfigError
from shards.looking.image_scores import read_scores
from tests.conftest import REPOSITORY
from tests.runs.test_end_to_end import ALONE, run_program, tiny
from trainer.distributed import DistContext
from trainer.eval import main
from trainer.evaluation import results
from trainer.loop import train


@pytest.fixture(scope="module")
def finished(scene_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "finished"
    train(tiny(scene_shards, run), ALONE)
    return run


def command(finished: Path, output: Path, *arguments: object) -> list[object]:
    return ["--config", finished / "config.yaml", "--checkpoint", finished / "checkpoints/best.pt", "--output", output,
            "eval.max_images=null", "eval.window_batch=2", *arguments]


def evaluated(finished: Path, output: Path, *arguments: object, ranks: int = 0) -> dict[str, Any]:
    result = run_program("trainer/eval.py", *command(finished, output, *arguments), ranks=ranks)
    assert result.returncode == 0, result.stderr
    metrics: dict[str, Any] = json.loads((output / "metrics.json").read_text())
    assert metrics.pop("source") == ("folder" if "--images" in arguments else "shards")
    return metrics


def folder_of(scenes: Path) -> list[object]:
    return ["--images", scenes / "images/val", "--labels", scenes / "annotations/val"]


@pytest.mark.slow
def test_shards_and_folder_on_one_and_three_processes_agree_to_the_last_digit(finished: Path, scenes: Path,
                                                                              tmp_path: Path) -> None:
    found = [evaluated(finished, tmp_path / "shards"),
             evaluated(finished, tmp_path / "shards-3", ranks=3),
             evaluated(finished, tmp_path / "folder", *folder_of(scenes)),
             evaluated(finished, tmp_path / "folder-3", *folder_of(scenes), "data.workers=2", ranks=3)]
    assert found[0]["images"] == 5
    assert [json.dumps(metrics) for metrics in found[1:]] == [json.dumps(found[0])] * 3
    tables = [(tmp_path / name / "images.csv").read_text() for name in ("folder", "folder-3")]
    assert tables[0] == tables[1]


@pytest.mark.slow
def test_what_an_evaluation_writes(finished: Path, tmp_path: Path) -> None:
    metrics = evaluated(finished, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.json", "classes.csv", "images.jsonl", "images.csv",
                                                          "images.parquet", "panels.png", "calibration.png"}
    low, high = metrics["mIoU_95"]
    assert low <= metrics["mIoU"] <= high
    assert sum(share for share, _, _ in metrics["calibration"] if share) == pytest.approx(1)
    with (tmp_path / "classes.csv").open(newline="") as file:
        classes = list(csv.DictReader(file))
    assert [int(row["id"]) for row in classes] == list(range(8))
    for row, iou in zip(classes, metrics["per_class_iou"], strict=True):
        assert (row["IoU"] == "") == (iou is None) and (iou is None or float(row["IoU"]) == iou)
    with (tmp_path / "images.csv").open(newline="") as file:
        images = list(csv.DictReader(file))
    scores = list(read_scores(tmp_path))
    assert [(row["key"], float(row["mIoU"])) for row in images] == [(score.key, score.miou) for score in scores]
    table = pyarrow.parquet.read_table(tmp_path / "images.parquet").to_pylist()
    assert [row["mIoU"] for row in table] == [score.miou for score in scores] and len(table[0]) == 6 + 8
    columns = [name for name in table[0] if name.startswith("IoU ")]
    for row, score in zip(table, scores, strict=True):
        assert np.mean([row[name] for name in columns if row[name] is not None]) == pytest.approx(score.miou)
    with Image.open(tmp_path / "panels.png") as panels:
        assert panels.width > 3 * 320 and panels.height > 2 * 300  # the worst and the best, with legends


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_with_what_is_done(finished: Path, scenes: Path, tmp_path: Path) -> None:
    images = tmp_path / "set"
    for number in range(12):
        for kind, suffix in (("images", ".jpg"), ("annotations", ".png")):
            (source, *_) = sorted((scenes / kind / "val").iterdir())[number % 5 :]
            (images / kind).mkdir(parents=True, exist_ok=True)
            shutil.copy(source, images / kind / f"{number:02d}{suffix}")
    slow = ["--images", images / "images", "--labels", images / "annotations", "eval.stride=16"]
    expected = evaluated(finished, tmp_path / "whole", *slow)
    output = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, REPOSITORY / "trainer/eval.py",
                                *map(str, command(finished, output, *slow))], start_new_session=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while len(_journal_lines(output)) < 2:
        assert time.monotonic() < deadline and process.poll() is None, "it should be killed before its end"
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = _journal_lines(output)
    assert 2 <= len(done) < 6 and not (output / "metrics.json").exists()
    for line in done:  # what is done is not read again
        for image in json.loads(line)["images"]:
            path = images / f"images/{image['number']:02d}.jpg"
            facts = path.stat()
            path.write_bytes(bytes(facts.st_size))
            os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    continued = evaluated(finished, output, *slow, "eval.panels=0", ranks=2)
    assert json.dumps(continued) == json.dumps(expected)
    assert not (output / "unfinished").exists()


def _journal_lines(output: Path) -> list[str]:
    return [line for path in output.glob("unfinished/*/*.jsonl") for line in path.read_text().splitlines(True)
            if line.endswith("\n")]


@pytest.mark.parametrize(("change", "message"), [
    ("no label", r"1 of 5 images have no label map in \S+annotations/val, for example \S+jpg; expected"),
    ("broken image", r"\S+\.jpg"),
    ("broken label", r"\S+\.png"),
    ("other size", r"must have the same size"),
    ("value", r"holds the value 77 \(4 such pixels\), legal: 0 to 7, and 255 for unlabelled.*--reduce-zero-label"),
    ("colours", r"has 3 channels, legal: one"),
    ("no images", r"contains no image, legal suffixes: \.jpg"),
])
def test_an_image_that_cannot_be_delivered_ends_it(finished: Path, scenes: Path, tmp_path: Path, change: str,
                                                   message: str) -> None:
    copy = tmp_path / "scenes"
    shutil.copytree(scenes, copy)
    image, label = (sorted((copy / kind / "val").iterdir())[2] for kind in ("images", "annotations"))
    ids = np.asarray(Image.open(label)).copy()
    if change == "no label":
        label.unlink()
    elif change == "broken image":
        image.write_bytes(image.read_bytes()[:500])
    elif change == "broken label":
        label.write_bytes(label.read_bytes()[:100])
    elif change == "other size":
        Image.fromarray(ids[:-1]).save(label)
    elif change == "value":
        ids[:2, :2] = 77
        Image.fromarray(ids).save(label)
    elif change == "colours":
        Image.fromarray(np.stack([ids] * 3, 2)).save(label)
    else:
        shutil.rmtree(image.parent)
        image.parent.mkdir()
    result = run_program("trainer/eval.py", *command(finished, tmp_path / "out", *folder_of(copy)))
    assert result.returncode != 0 and "Traceback" not in result.stderr
    assert re.search(message, result.stderr), result.stderr
    assert not (tmp_path / "out/metrics.json").exists()


@pytest.mark.slow
def test_a_rank_that_fails_is_one_line_on_each(finished: Path, scenes: Path, tmp_path: Path) -> None:
    copy = tmp_path / "scenes"
    shutil.copytree(scenes, copy)
    label = sorted((copy / "annotations/val").iterdir())[-1]
    label.write_bytes(b"junk")
    result = run_program("trainer/eval.py", *command(finished, tmp_path / "out", *folder_of(copy)), ranks=2)
    assert result.returncode != 0 and "Traceback" not in result.stderr, result.stderr
    assert f"error: {label} is not a readable PNG" in result.stderr
    assert re.search(r"error: rank \d on \S+: another rank died .* The same command goes on with", result.stderr)


def test_labels_from_one_are_reduced(finished: Path, scenes: Path, tmp_path: Path) -> None:
    expected = evaluated(finished, tmp_path / "plain", *folder_of(scenes))
    copy = tmp_path / "scenes"
    shutil.copytree(scenes, copy)
    for path in (copy / "annotations/val").iterdir():
        ids = np.asarray(Image.open(path)).astype(np.int64)
        Image.fromarray(np.where(ids == 255, 0, ids + 1).astype(np.uint8)).save(path)
    assert evaluated(finished, tmp_path / "reduced", *folder_of(copy), "--reduce-zero-label") == expected


@pytest.fixture
def evaluate_here(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """trainer/eval.py in this process."""

    def call(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["trainer/eval.py", *map(str, arguments)])
        return main()

    return call


def test_class_tables_that_differ_are_named(finished: Path, scene_shards: Path, tmp_path: Path,
                                            evaluate_here: Callable[..., int]) -> None:
    checkpoint = torch.load(finished / "checkpoints/best.pt", weights_only=True)
    checkpoint["classes"][3]["name"] = "cloud"
    torch.save(checkpoint, tmp_path / "best.pt")
    with pytest.raises(ConfigError, match=r"different class tables \(8 and 8 classes\): class 3 is '\w+' of colour .* "
                       "and 'cloud' of colour"):
        evaluate_here("--config", finished / "config.yaml", "--checkpoint", tmp_path / "best.pt")
    assert not (tmp_path / "evaluation").exists()


def test_results_have_a_folder_before_anything_is_computed(finished: Path, tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch,
                                                           evaluate_here: Callable[..., int]) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"ORG/NAME does not exist here; if it is .* hub, also give --output"):
        evaluate_here("--checkpoint", "ORG/NAME", "data.root=shards")
    (tmp_path / "run").touch()
    with pytest.raises(ConfigError, match=r"--output is run/out, but run is a file, legal: a folder"):
        evaluate_here(*command(finished, Path("run/out")))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_watchdog_hears_of_each_picture_that_is_drawn(finished: Path, tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch,
                                                          evaluate_here: Callable[..., int]) -> None:
    """Its images are predicted again, by rank 0 alone, after the others are done."""
    heard: list[str] = []
    write = results.write_results
    monkeypatch.setattr(DistContext, "beat", lambda *_: heard.append("beat"))
    monkeypatch.setattr(results, "write_results", lambda *given: heard.append("results") or write(*given))
    assert evaluate_here(*command(finished, tmp_path / "out"), "eval.panels=2") == 0
    assert heard[heard.index("results") :].count("beat") == 4


def test_options_that_need_each_other(finished: Path, scenes: Path, tmp_path: Path) -> None:
    for arguments, message in ((["--images", scenes], "--images and --labels belong together"),
                               (["--reduce-zero-label"], "--reduce-zero-label is for --images and --labels"),
                               (["--output", "s3://bucket/x"], "--output is 's3://bucket/x', legal: a local folder"),
                               (["--output", scenes / "classes.txt"], "classes.txt is a file, legal: a folder"),
                               (["--output", ""], "--output is '', legal: a local folder")):
        result = run_program("trainer/eval.py", *command(finished, tmp_path / "out", *arguments))
        assert result.returncode == 2 and message in result.stderr
