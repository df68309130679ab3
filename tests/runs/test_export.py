"""Exported models reproduce the same numbers through every way of loading them."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from shards.cli.config_file import load_config
from shards.errors import ConfigError
from tests.conftest import REPOSITORY
from tests.runs.test_end_to_end import ALONE, EOMT, PMT, run_program, tiny
from trainer.build import build_model
from trainer.config import RunConfig, load_run_config
from trainer.exporting.program import InferenceGraph
from trainer.loop import train
from trainer.models.weights import read_weights
from trainer.pretrained import Pretrained, export_config, load_pretrained

HEADS = {"m2f": (), "linear": ("decoder_head.type=linear",), "eomt": EOMT, "pmt": PMT}


@pytest.fixture(scope="module", params=HEADS)
def exported(request: pytest.FixtureRequest, scene_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with run/ (two training steps) and exported/, made by the command line."""
    folder = tmp_path_factory.mktemp(f"export-{request.param}")
    train(tiny(scene_shards, folder / "run", "train.total_steps=2", *HEADS[request.param]), ALONE)
    result = run_program("trainer/export.py", "--checkpoint", folder / "run/checkpoints/best.pt", "--output",
                         folder / "exported")
    assert result.returncode == 0, result.stderr
    return folder


def original(folder: Path) -> Pretrained:
    return load_pretrained(folder / "run/checkpoints/best.pt")


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.slow
def test_the_directory_predicts_what_the_checkpoint_predicts(exported: Path, tmp_path: Path) -> None:
    again = load_pretrained(exported / "exported")
    expected = original(exported).predict(picture(70, 100)).label_map
    assert np.array_equal(again.predict(picture(70, 100)).label_map, expected) and expected.dtype == np.uint8
    assert again.classes == original(exported).classes
    with pytest.raises(ValueError, match=r"legal: uint8 \[H, W, 3\]"):
        again.predict(picture(70, 100).astype(np.float32))
    text = (exported / "exported/config.json").read_text()
    assert str(exported) not in text and "/tmp" not in text, "no path of this machine goes along"
    for path in sorted((exported / "exported").rglob("*")):
        content = path.read_bytes() if path.is_file() else b""
        if path.suffix == ".pt2":
            with zipfile.ZipFile(path) as archive:
                content += b"".join(map(archive.read, archive.namelist()))
        for place in (str(exported), str(REPOSITORY), sys.prefix):
            assert place.encode() not in content, f"{path.name} names {place}"
    Image.fromarray(picture(70, 100)).save(tmp_path / "a.png")
    result = run_program("trainer/predict.py", "--checkpoint", exported / "exported", "--output", tmp_path / "out",
                         tmp_path / "a.png")
    assert result.returncode == 0, result.stderr
    with Image.open(tmp_path / "out/a.png") as found:
        assert np.array_equal(np.asarray(found), expected)


@pytest.mark.slow
def test_the_program_needs_no_code_of_ours(exported: Path, tmp_path: Path) -> None:
    """In another process, without the repository on its path, at sizes that were not traced."""
    script = (
        "import sys, torch\n"
        "program = torch.export.load(sys.argv[1]).module()\n"
        "with torch.no_grad():\n"
        "    found = [program(torch.load(path, weights_only=True)) for path in sys.argv[2:-1]]\n"
        "torch.save(found, sys.argv[-1])\n"
        "assert 'trainer' not in sys.modules\n"
    )
    sizes = [(1, 64, 64), (2, 64, 128), (3, 160, 96)]
    images = [torch.randint(0, 256, (count, 3, h, w), generator=torch.Generator().manual_seed(h)).to(torch.uint8)
              for count, h, w in sizes]
    for number, image in enumerate(images):
        torch.save(image, tmp_path / f"{number}.pt")
    inputs = [tmp_path / f"{number}.pt" for number in range(len(images))]
    subprocess.run([sys.executable, "-c", script, exported / "exported/program.pt2", *inputs, tmp_path / "out.pt"],
                   check=True, cwd=tmp_path)
    graph = InferenceGraph(original(exported))
    with torch.no_grad():
        for image, found in zip(images, torch.load(tmp_path / "out.pt", weights_only=True), strict=True):
            torch.testing.assert_close(found, graph(image), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_metas_files_load_as_metas(exported: Path) -> None:
    trained = original(exported)
    meta = exported / "exported/meta"
    head = read_weights(meta / "head.pth")
    assert not head.vit and head.backbone_sha256 is None, "bare, like the released head"
    backbone = trained.model.backbone
    config = load_run_config(REPOSITORY / "tests/support/tiny.yaml", [
        *HEADS[trained.config.decoder_head.type], "backbone.random.hidden_size=null",
        f"backbone.source={meta / 'backbone.pth'}"])
    model = build_model(config, len(trained.classes)).eval()
    model.load_weights(head)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for name, value in model(image).items():
            assert torch.equal(value, trained.model(image)[name]), name
    assert model.backbone.weights_sha256() == backbone.weights_sha256()


@pytest.mark.slow
def test_a_damaged_or_foreign_export_is_refused(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="without settings and classes"):
        load_pretrained(exported / "exported/meta/head.pth")
    (tmp_path / "model.safetensors").write_bytes((exported / "exported/model.safetensors").read_bytes())
    with pytest.raises(ConfigError, match=r"a folder without config\.json"):
        load_pretrained(tmp_path)  # as an export that was killed leaves it
    config = json.loads((exported / "exported/config.json").read_text())
    del config["sha256"]  # what is changed by hand
    for change, message in (
        ({"layer_norm_eps": None}, "layer_norm_eps is None"), ({"format": 99}, "format is 99, legal: 1"),
        ({"classes": [{}]}, "is incomplete"), ({"classes": config["classes"][:-1]}, "do not fit"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ConfigError, match=message):
            load_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="not a readable safetensors"):
        load_pretrained(tmp_path)
    result = run_program("trainer/export.py", "--checkpoint", exported / "run/checkpoints/best.pt", "--output",
                         exported / "exported")
    assert result.returncode == 2 and "is not empty; choose a new folder" in result.stderr


def test_no_setting_that_names_a_place_is_exported(tmp_path: Path) -> None:
    """Every new text setting must have choices, be listed here as naming no place, or be unset in exports."""
    harmless = {"data.train_split", "data.val_split", "load.base_sha256"}
    overrides = {f"{prefix}{field.name}": "/secret/place" for prefix, field in text_fields(RunConfig())
                 if f"{prefix}{field.name}" not in harmless}
    overrides["load.ignore"] = ["/secret/place"]
    overrides["data.sources"] = [{"root": "/secret/place", "weight": 2}]
    config = load_config(RunConfig, [], [], overrides)
    model = build_model(load_run_config(REPOSITORY / "tests/support/tiny.yaml", ["decoder_head.type=linear"]), 2)
    content = export_config(Pretrained(model=model, config=config, classes=[]))
    assert "/secret/place" not in json.dumps(content) and len(overrides) >= 8
    assert content["settings"]["data"]["sources"][0]["weight"] == 2


def text_fields(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from text_fields(value, f"{prefix}{field.name}.")
        elif "str" in str(field.type) and "list" not in str(field.type) and not field.metadata["choices"]:
            yield prefix, field
