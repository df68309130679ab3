"""Runs on several sets: equal batches for any ranks and workers, bit-equal when resumed, refused with other sets."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest

from shards.errors import ConfigError
from shards.manifest import load_manifest
from tests.conftest import REPOSITORY
from tests.runs.test_end_to_end import losses
from tests.support.training_run import TINY, assert_same_end, final_state
from tests.support.zygote import run_forked
from tests.unit.test_trainer_loss_class_weights import ALONE
from trainer import train as train_program
from trainer.config import load_run_config
from trainer.data.batch import Batch
from trainer.loop import train
from trainer.reporting.report import write_report
from trainer.reporting.run_logger import read_metrics
from trainer.run.run import Run, open_crops

SMALL = ("decoder_head.type=linear", "eval.max_images=1", "eval.panels=0", "train.checkpoint_every=2")
OTHER = Path("RENAMED")
pytestmark = pytest.mark.usefixtures("no_pictures")


def mixture(other: Path, weight: float = 1, classes: str = "{extra: grass, sky: null}") -> str:
    return f"data.sources=[{{weight: 3}}, {{root: {other}, weight: {weight}, classes: {classes}}}]"


def trained(root: Path, folder: Path, *settings: str) -> Run:
    return train(load_run_config(TINY, [f"data.root={root}", f"output_dir={folder}", *SMALL, *settings]), ALONE)


@pytest.fixture(scope="module")
def whole(scene_shards: Path, renamed_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps on two sets."""
    folder = tmp_path_factory.mktemp("mixing") / "whole"
    trained(scene_shards, folder, mixture(renamed_shards), "loss.class_weights=inverse_log")
    return folder


def killed_at_step_2(run: Path, copy: Path) -> Path:
    shutil.copytree(run, copy)
    for name in ("step-00000004.pt", "best.pt"):
        (copy / "checkpoints" / name).unlink()
    return copy


def test_a_killed_run_goes_on_bit_for_bit(scene_shards: Path, renamed_shards: Path, whole: Path, tmp_path: Path
                                          ) -> None:
    run = killed_at_step_2(whole, tmp_path / "run")
    moved = Path(shutil.copytree(renamed_shards, tmp_path / "moved"))  # the same set in another place
    trained(scene_shards, run, mixture(moved), "loss.class_weights=inverse_log")
    assert_same_end(whole, run)
    assert losses(run) == losses(whole)
    assert final_state(whole).source_hashes == [load_manifest(root).sha256 for root in (scene_shards, renamed_shards)]


@pytest.mark.parametrize(("sources", "message"), [
    ("data.sources=[]", r"data\.sources\[1\]\.weight was 1\.0 and is not given"),
    (mixture(OTHER, weight=2), r"data\.sources\[1\]\.weight was 1\.0 and is 2\.0"),
    (mixture(OTHER, classes="{extra: grass}"), r"data\.sources\[1\]\.classes\.sky was None and is not given"),
    (mixture(OTHER, classes="{extra: road, sky: ~}"), r"data\.sources\[1\]\.classes\.extra was grass and is road"),
    ("data.sources=[{weight: 3}, {}]", r"data\.sources\[1\] \(manifest_sha256\) was \w+ and is"),
])
def test_a_resume_with_other_sources_is_refused(scene_shards: Path, renamed_shards: Path, whole: Path, sources: str,
                                                message: str) -> None:
    with pytest.raises(ConfigError, match=f"cannot resume .*{message}"):
        trained(scene_shards, whole, sources.replace(str(OTHER), str(renamed_shards)), "train.total_steps=6")


def test_a_run_without_sources_does_not_continue_with_them(scene_shards: Path, tmp_path: Path) -> None:
    trained(scene_shards, tmp_path / "run", "train.total_steps=2")
    assert final_state(tmp_path / "run").source_hashes == []
    with pytest.raises(ConfigError, match=r"data\.sources\[0\]\.weight was not given and is 1\.0"):
        trained(scene_shards, tmp_path / "run", "data.sources=[{}]", "train.total_steps=4")


def digest(batch: Batch) -> str:
    """Everything in a batch."""
    tensors = (batch.images, batch.segment_maps, batch.labels, batch.photometric)
    parts = [tensor.contiguous().numpy().tobytes() for tensor in tensors if tensor is not None]
    return repr((hashlib.sha256(b"".join(parts)).hexdigest(), batch.keys, batch.counts, batch.moves, batch.valid))


_RECORD = """
import sys
from pathlib import Path

def recorded(run, micro_batches):
    for batch in micro_batches:
        (folder / str(batch.number)).write_text(digest(batch))
    return real(run, micro_batches)

if __name__ == "__main__":  # not in the loader's processes
    sys.path.insert(0, "REPOSITORY")
    from shards.cli.command_line import run_entry_point
    from tests.runs.test_mixing import digest
    from trainer import loop
    from trainer.run import reporter
    from trainer.train import main

    reporter.write_report = reporter.draw_curves = lambda *_: None
    folder, real, loop.train_step = Path(sys.argv.pop()), loop.train_step, recorded
    sys.argv[0] = "trainer/train.py"
    run_entry_point(main)
"""


@pytest.mark.slow
def test_two_ranks_with_three_workers_train_on_the_batches_of_one_process(scene_shards: Path, renamed_shards: Path,
                                                                          tmp_path: Path) -> None:
    program = tmp_path / "record.py"
    program.write_text(_RECORD.replace("REPOSITORY", str(REPOSITORY)))
    settings = (f"data.root={scene_shards}", f"output_dir={tmp_path / 'run'}", mixture(renamed_shards, 2), *SMALL,
                "train.micro_batch_size=1")
    ended = run_forked(program, "--config", TINY, *settings, "data.workers=3", tmp_path, ranks=2)
    assert ended.returncode == 0, ended.stderr
    config = load_run_config(TINY, list(settings))
    crops = open_crops(config, load_manifest(scene_shards))
    for number in range(16):
        assert (tmp_path / str(number)).read_text() == digest(crops[number])


def test_a_run_says_what_it_trains_on(scene_shards: Path, renamed_shards: Path, whole: Path, tmp_path: Path,
                                      capsys: pytest.CaptureFixture[str]) -> None:
    line = (f"data.sources[1]: {renamed_shards}, split train: 24 samples, 25.00% of the training samples, 0.17 epochs; "
            "8 classes: 6 of the same name, 1 mapped (extra → grass), 1 ignored (sky)")
    assert line in [record.get("what") for record in read_metrics(whole)]
    config = final_state(whole).run_config
    train_program._dry_run(config)
    shown = capsys.readouterr().out
    assert line in shown and "48 training samples in 8 shards" in shown
    assert "4 steps of 4; 2 micro-batches per step" in shown and "class weights from" in shown
    write_report(tmp_path, config, load_manifest(scene_shards), ALONE)
    page = (tmp_path / "report.html").read_text()
    assert f"{renamed_shards}, split train: 25.00% of the training samples" in page
