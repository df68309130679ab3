"""Publishing on the hub: what is uploaded loads back by id, nothing gated goes along unasked, errors are one line.

As docs/export.md says.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from shards.cli.config_file import override_config
from shards.errors import ConfigError
from shards.files.strict_json import to_json
from shards.manifest import ClassInfo
from tests.conftest import REPOSITORY
from tests.runs.test_end_to_end import ALONE, run_program, tiny
from tests.support.fake_hub import TOKEN, FakeHub, fake_hub
from trainer.build import build_model
from trainer.config import load_run_config
from trainer.evaluation.record import Measured
from trainer.exporting.directory import write_directory
from trainer.exporting.hub_upload import Publication, backbone_to_name
from trainer.exporting.model_card import CardFacts, model_card
from trainer.loop import train
from trainer.pretrained import Pretrained, load_pretrained

LINEAR = ("decoder_head.type=linear", "train.total_steps=2")
VIT = "facebook/dinov3-tiny"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub for this process, and for those it starts. The client has read its environment already."""
    with fake_hub() as server:
        for name, value in server.environment(str(tmp_path / "cache")).items():
            monkeypatch.setenv(name, value)
        template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in (("ENDPOINT", server.address), ("HF_HUB_CACHE", str(tmp_path / "cache")),
                            ("HUGGINGFACE_CO_URL_TEMPLATE", template)):
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        yield server
        huggingface_hub.close_session()


class Said(NamedTuple):
    """What a program printed, and its exit code."""

    code: int
    out: str
    error: str


Export = Callable[..., Said]


@pytest.fixture
def export(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Export:
    """trainer/export.py in this process."""

    def run(*arguments: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["trainer/export.py", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            runpy.run_path(str(REPOSITORY / "trainer/export.py"), run_name="__main__")
        printed = capsys.readouterr()
        assert TOKEN not in printed.out + printed.err, "the token is never shown"
        return Said(int(left.value.code or 0), printed.out, printed.err)

    return run


def one_line(said: Said) -> str:
    assert said.code == 2, said
    lines = [line for line in said.error.splitlines() if line.strip() and "exporting" not in line]
    assert len(lines) == 1, said.error
    return lines[0]


def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (70, 100, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def run(scene_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a random ViT, evaluated."""
    folder = tmp_path_factory.mktemp("hub") / "run"
    train(tiny(scene_shards, folder, *LINEAR), ALONE)
    result = run_program("trainer/eval.py", "--config", folder / "config.yaml", "--checkpoint",
                         folder / "checkpoints/best.pt")
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DINOv3 as published, tiny."""
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(1)
    DINOv3ViTModel(DINOv3ViTConfig(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32,
                                   num_register_tokens=4)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dinov3_run(scene_shards: Path, vit: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dinov3") / "run"
    train(tiny(scene_shards, folder, *LINEAR, f"backbone.source={vit}", "backbone.random.hidden_size=null"), ALONE)
    return folder / "checkpoints/best.pt"


def publish_vit(hub: FakeHub, vit: Path) -> None:
    hub.repositories[VIT] = {path.name: path.read_bytes() for path in vit.iterdir()}
    hub.private[VIT] = False


# -- what is uploaded --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_is_uploaded_loads_back_by_its_id(hub: FakeHub, run: Path, export: Export, tmp_path: Path) -> None:
    checkpoint = run / "checkpoints/best.pt"
    said = export("--checkpoint", checkpoint, "--output", tmp_path / "out", "--push-to-hub", "tester/seg",
                  "--license", "cc-by-4.0", "--dataset", "me/scenes")
    assert said.code == 0, said.error
    assert 'uploaded: http' in said.out and 'load_pretrained("tester/seg")' in said.out
    files = hub.repositories["tester/seg"]
    assert files.keys() == {".gitattributes", "README.md", "config.json", "model.safetensors",
                            "model.safetensors.sha256"}
    assert hub.private["tester/seg"] and all(TOKEN.encode() not in data for data in files.values())
    expected = load_pretrained(checkpoint).predict(picture()).label_map
    again = load_pretrained("tester/seg")
    assert np.array_equal(again.predict(picture()).label_map, expected)
    np.save(tmp_path / "picture.npy", picture())
    script = ("import numpy as np\nfrom trainer.pretrained import load_pretrained\n"
              "np.save('found', load_pretrained('tester/seg').predict(np.load('picture.npy')).label_map)")
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path,
                   env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
    assert np.array_equal(np.load(tmp_path / "found.npy"), expected)

    card = ModelCard(files["README.md"].decode())
    data = card.data.to_dict()
    assert data["license"] == "cc-by-4.0" and data["library_name"] == "maskstream"
    assert data["pipeline_tag"] == "image-segmentation" and data["datasets"] == ["me/scenes"]
    assert data["metrics"] == ["mean_iou"] and "base_model" not in data
    results = {result.metric_name: result for result in card.data.eval_results or []}
    assert results.keys() == {"mIoU", "aAcc", "mAcc"} and results["mIoU"].metric_type == "mean_iou"
    assert results["mIoU"].dataset_split == "val" and 0 <= results["mIoU"].metric_value <= 1
    assert f"| mIoU | {results['mIoU'].metric_value:.4f} |" in card.text
    for words in ("8 classes, 12 images in train, 5 images in val", "0. sky", "| steps | 2 of 2 |", "head | linear",
                  "windows of 64 pixels", 'load_pretrained("tester/seg")', "`cc-by-4.0`", "ViT's weights are random"):
        assert words in card.text, words
    assert str(tmp_path) not in card.content and str(run) not in card.content


@pytest.mark.slow
def test_a_second_upload_replaces_the_weights_and_keeps_the_card(
    hub: FakeHub, run: Path, export: Export, tmp_path: Path
) -> None:
    checkpoint = run / "checkpoints/best.pt"
    arguments = ("--checkpoint", checkpoint, "--push-to-hub", "tester/seg", "--public")
    first = export(*arguments, "--output", tmp_path / "a", "--formats", "directory", "meta")
    assert first.code == 0 and not hub.private["tester/seg"], first.error
    files = hub.repositories["tester/seg"]
    assert "meta/head.pth" in files
    files["README.md"] += b"\nEdited by hand.\n"
    files["LICENSE"] = b"mine"
    second = export(*arguments, "--output", tmp_path / "b")
    assert second.code == 0 and f"the README.md there was kept, the new one is in {tmp_path / 'b'}" in second.out
    assert b"Edited by hand." in files["README.md"] and files["LICENSE"] == b"mine"
    assert not [name for name in files if name.startswith("meta/")], "what it no longer writes is gone"
    assert load_pretrained("tester/seg").classes == load_pretrained(checkpoint).classes


def test_a_dry_run_asks_the_hub_nothing(hub: FakeHub, run: Path, export: Export, tmp_path: Path) -> None:
    said = export("--checkpoint", run / "checkpoints/best.pt", "--output", tmp_path / "out", "--push-to-hub",
                  "tester/seg", "--dry-run")
    assert said.code == 0, said.error
    assert "dry run, nothing was uploaded. Without --dry-run, 4 files (" in said.out
    assert "go to tester/seg (private if it is new): README.md, config.json, model.safetensors" in said.out
    assert hub.requests == []
    card = (tmp_path / "out/README.md").read_text()
    assert "license:" not in card.split("---")[1] and "**Not chosen yet.** Set `license:` at the top" in card


def test_metrics_of_other_weights_are_not_in_the_card(run: Path, export: Export, tmp_path: Path) -> None:
    path = run / "evaluation/metrics.json"
    before = path.read_bytes()
    try:
        head = json.loads(before)["model"]["head"].encode()
        for number, content in enumerate((before.replace(head, b"0" * 64), b"nothing", b"[]",
                                          to_json({"mIoU": 0.5, "step": 2, "checkpoint": "best.pt"}).encode())):
            path.write_bytes(content)
            said = export("--checkpoint", run / "checkpoints/best.pt", "--output", tmp_path / f"{number}",
                          "--push-to-hub", "tester/seg", "--dry-run")
            assert said.code == 0, said.error
            card = ModelCard.load(tmp_path / f"{number}/README.md")
            assert card.data.eval_results is None and "There was no evaluation" in card.text
    finally:
        path.write_bytes(before)


def test_the_card_says_how_the_metrics_were_measured(run: Path, export: Export, tmp_path: Path) -> None:
    """Not how the model would be evaluated by its own settings."""
    path = run / "evaluation/metrics.json"
    before = path.read_bytes()
    record = json.loads(before)
    record["model"]["eval"] |= {"tta_flip": True, "crop_size": 96, "stride": 32}
    try:
        path.write_text(to_json({**record, "images": 3, "split": "`te|st`"}))
        said = export("--checkpoint", run / "checkpoints/best.pt", "--output", tmp_path / "out", "--push-to-hub",
                      "tester/seg", "--dry-run")
    finally:
        path.write_bytes(before)
    assert said.code == 0, said.error
    card = ModelCard.load(tmp_path / "out/README.md")
    assert "3 images of the split \\`te\\|st\\`, windows of 96 pixels, 32 apart, flipped as well." in card.text
    assert card.data.eval_results is not None and card.data.eval_results[0].dataset_split == "`te|st`"


@pytest.mark.parametrize("name", ["a/b.", "a/.b", "a/b.git", "a/-b", "a/b--c", "a/b..c", "a/" + "b" * 95, "a/b/c",
                                  "../b", "a/b\n", "a/b c", "https://a/b", "a"])
def test_ids_that_the_hub_would_refuse_are_refused_first(name: str) -> None:
    with pytest.raises(ConfigError, match=r"--push-to-hub is .*, legal: ORGANISATION/NAME"):
        Publication(repo_id=name, formats=["directory"])


def test_an_export_without_its_vit_takes_it_from_where_it_is_now(vit: Path, tmp_path: Path,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    """As trainer/eval.py gives it: backbone.source of the configuration."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    config = load_run_config(REPOSITORY / "tests/support/tiny.yaml", [
        "decoder_head.type=linear", f"backbone.source={vit}", "backbone.random.hidden_size=null"])
    classes = [ClassInfo(name=name, color=(9, 9, 9)) for name in "ab"]
    model = build_model(config, 2).eval()
    original = Pretrained(model=model, config=config, classes=classes)
    write_directory(original, tmp_path / "named", backbone_source=VIT)
    write_directory(original, tmp_path / "whole")
    expected = original.predict(picture()).label_map
    for name, source in (("named", str(vit)), ("whole", str(vit)), ("whole", "no/such-vit")):
        again = load_pretrained(tmp_path / name, backbone_source=source)
        assert np.array_equal(again.predict(picture()).label_map, expected)
    with pytest.raises(ConfigError, match=f"{VIT} cannot be loaded from the hub"):
        load_pretrained(tmp_path / "named")


def test_names_in_a_card_mean_nothing_in_markdown_or_yaml(run: Path) -> None:
    pretrained = load_pretrained(run / "checkpoints/best.pt")
    classes = [replace(info, name=f"<b>`{info.name}`|*x*") for info in pretrained.classes]
    strange = replace(pretrained, classes=classes)
    measured = Measured(metrics={"mIoU": 0.5}, images=3, split="val\n---\n", settings=pretrained.config.eval)
    text = model_card(strange, CardFacts(repo_id="a/b", formats=["directory", "onnx"], contains_backbone=True,
                                         dataset="x\n---\nlicense: mit", measured=measured))
    card = ModelCard(text)
    assert card.data.license is None and "\\<b\\>\\`sky\\`\\|\\*x\\*" in card.text
    assert card.data.eval_results is not None and "\n" not in card.data.eval_results[0].dataset_name
    assert "`model.onnx` runs in onnxruntime" in card.text


def test_a_card_names_the_sets_of_a_mixture_without_their_places(run: Path) -> None:
    pretrained = load_pretrained(run / "checkpoints/best.pt")
    config = override_config(pretrained.config, [
        "data.sources=[{weight: 3}, {root: 's3://user:secret@bucket/secret/stu_ff?key=secret'}]"])
    facts = CardFacts(repo_id="a/b", formats=["directory"], contains_backbone=True)
    text = model_card(replace(pretrained, config=config), facts)
    (row,) = (line for line in text.splitlines() if line.startswith("| trained on"))
    assert row == f"| trained on | {Path(str(config.data.root)).name} (75.00%), stu\\_ff (25.00%) |"
    assert "secret" not in text and "trained on |" not in model_card(pretrained, facts)


# -- weights with a licence to accept ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_gated_weights_are_named_and_come_from_where_they_were_published(
    hub: FakeHub, vit: Path, dinov3_run: Path, export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_vit(hub, vit)
    arguments = ("--checkpoint", dinov3_run, "--push-to-hub", "tester/seg", "--set", f"backbone.source={VIT}")
    said = export(*arguments, "--output", tmp_path / "out")
    assert said.code == 0, said.error
    assert f"the DINOv3 ViT's weights are not part of the export: load_pretrained gets them from {VIT}" in said.out
    assert not [key for key in load_file(tmp_path / "out/model.safetensors") if "feature_model" in key]
    expected = load_pretrained(dinov3_run).predict(picture()).label_map
    assert np.array_equal(load_pretrained("tester/seg").predict(picture()).label_map, expected)
    local = load_pretrained(tmp_path / "out", overrides=[f"backbone.source={vit}"])
    assert np.array_equal(local.predict(picture()).label_map, expected), "a copy of the ViT does too"
    card = ModelCard((tmp_path / "out/README.md").read_text())
    assert card.data.base_model == VIT and "The ViT is not in this repository." in card.text

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    hub.gated.add(VIT)
    with pytest.raises(ConfigError, match=f"(?s){VIT} cannot be loaded from the hub .*DINOv3 weights are gated"):
        load_pretrained("tester/seg")
    hub.gated.clear()
    torch.manual_seed(2)
    DINOv3ViTModel(DINOv3ViTConfig.from_pretrained(vit)).save_pretrained(tmp_path / "other")
    publish_vit(hub, tmp_path / "other")
    with pytest.raises(ConfigError, match="was trained on another ViT"):
        load_pretrained("tester/seg")


@pytest.mark.slow
def test_gated_weights_are_published_only_when_asked_for(
    hub: FakeHub, dinov3_run: Path, export: Export, tmp_path: Path
) -> None:
    arguments = ("--checkpoint", dinov3_run, "--output", tmp_path / "out", "--push-to-hub", "tester/seg")
    line = one_line(export(*arguments))
    for words in ("a DINOv3 ViT, whose weights are published under the DINOv3 License", "legal: a hub id",
                  "--set backbone.source=ORG/NAME", "give --include-backbone"):
        assert words in line, words
    line = one_line(export(*arguments, "--formats", "directory", "program"))
    assert "--formats program would contain them; leave these out" in line
    assert not hub.repositories and not (tmp_path / "out").exists()
    said = export(*arguments, "--include-backbone")
    assert said.code == 0 and "the export contains weights of DINOv3: their licence" in said.out
    expected = load_pretrained(dinov3_run).predict(picture()).label_map
    assert np.array_equal(load_pretrained("tester/seg").predict(picture()).label_map, expected)
    card = hub.repositories["tester/seg"]["README.md"].decode()
    assert "contains weights of DINOv3, to which their own licence applies" in card and "enclose a copy" in card


def test_which_weights_may_be_published(run: Path, dinov3_run: Path) -> None:
    publication = Publication(repo_id="a/b", formats=["directory"])
    assert backbone_to_name(load_pretrained(run / "checkpoints/best.pt"), publication) is None, "random weights"

    def changed(**settings: Any) -> Pretrained:
        pretrained = load_pretrained(dinov3_run)
        backbone = replace(pretrained.config.backbone, **settings)
        return replace(pretrained, config=replace(pretrained.config, backbone=backbone))

    assert backbone_to_name(changed(source=VIT), publication) == VIT
    for settings, message in (({"trainable": True}, "trained further, so they cannot be left out; to publish them"),
                              ({"source": None}, "backbone.source is None, legal: a hub id"),
                              ({"source": "a/b.pth"}, r"backbone.source is a/b\.pth, legal: a hub id")):
        with pytest.raises(ConfigError, match=message):
            backbone_to_name(changed(**settings), publication)
        assert backbone_to_name(changed(**settings), replace(publication, include_backbone=True)) is None


@pytest.mark.parametrize("named", [None, "facebook/x", {"source": "/etc/x", "sha256": "0" * 64}, {"source": VIT},
                                   {"source": "../x/y", "sha256": "0" * 64}, {"source": VIT, "sha256": "0"}], ids=str)
def test_an_export_cannot_name_a_file_of_this_machine(run: Path, export: Export, tmp_path: Path, named: Any) -> None:
    said = export("--checkpoint", run / "checkpoints/best.pt", "--output", tmp_path / "out", "--formats", "directory")
    assert said.code == 0, said.error
    path = tmp_path / "out/config.json"
    content = {**json.loads(path.read_text()), "backbone": named}
    del content["sha256"]  # as whoever edits it does
    path.write_text(to_json(content))
    with pytest.raises(ConfigError, match=r"config\.json: backbone is .*, legal: an object with source, a hub id, and"):
        load_pretrained(tmp_path / "out")


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def test_errors_of_the_hub_are_one_line_and_say_what_to_do(
    hub: FakeHub, run: Path, export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--checkpoint", run / "checkpoints/best.pt", "--push-to-hub", "tester/seg", "--output")
    hub.broken["/api/repos/create"] = 403
    line = one_line(export(*arguments, tmp_path / "a"))
    assert line.startswith("error: --push-to-hub tester/seg: ") and "403" in line
    assert f"The export is complete in {tmp_path / 'a'}" in line and f"hf upload tester/seg {tmp_path / 'a'}" in line
    hub.broken = {"*/commit/main": 413}
    line = one_line(export(*arguments, tmp_path / "b"))
    assert "413" in line and (tmp_path / "b/model.safetensors").is_file()
    hub.broken = {"/api/whoami-v2": 401}
    line = one_line(export(*arguments, tmp_path / "c"))
    assert "Log in with `hf auth login`" in line and not (tmp_path / "c").exists()
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert "Log in with `hf auth login`" in one_line(export(*arguments, tmp_path / "c"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "check the network" in one_line(export(*arguments, tmp_path / "c"))


@pytest.mark.parametrize(("options", "message"), [
    (("--push-to-hub", "seg"), "--push-to-hub is 'seg', legal: ORGANISATION/NAME or USER/NAME"),
    (("--push-to-hub", "a/b", "--formats", "program"), "--formats is program, legal with --push-to-hub: directory"),
    (("--push-to-hub", "a/b", "--license", "My Licence"), "--license is 'My Licence', legal: an id of https://"),
    (("--push-to-hub", "a/b", "--dataset", "x y"), "--dataset is 'x y', legal: the id of a data set on the hub"),
    (("--dry-run",), "--dry-run is given, legal only with --push-to-hub ORG/NAME"),
    (("--include-backbone",), "--include-backbone is given, legal only with --push-to-hub ORG/NAME"),
])  # fmt: skip
def test_options_that_do_not_fit_are_refused_first(options: tuple[str, ...], message: str, export: Export,
                                                   tmp_path: Path) -> None:
    assert message in one_line(export("--checkpoint", tmp_path / "no.pt", "--output", tmp_path / "out", *options))
