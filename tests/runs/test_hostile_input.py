"""Malicious or malformed input ends in one line that names it, without using much memory or time."""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from preprocess.layouts.pairing import Template, find_pairs
from shards.class_list import parse_classes
from shards.cli.config_file import load_config
from shards.errors import ConfigError, CorruptShardError, MaskStreamError
from shards.manifest import MANIFEST_NAME, ClassInfo, canonical_json, hash_of, load_manifest, manifest_bytes
from shards.manifest import parse_manifest as parse
from shards.reader import ShardReader
from tests.runs.test_end_to_end import run_program, tiny
from tests.support.hand_made import as_version_1
from tests.support.training_run import TINY
from tests.unit.test_trainer_run_checkpoint import state
from trainer.build import build_model
from trainer.config import RunConfig, load_run_config
from trainer.exporting.directory import write_directory
from trainer.exporting.meta import write_meta_files
from trainer.model_options import open_pretrained
from trainer.models.backbones.dinov3_keys import VitArchitecture, architecture_of
from trainer.models.backbones.sources import load_vit
from trainer.models.hub import directory_config
from trainer.pretrained import Pretrained, load_pretrained
from trainer.reporting.run_logger import read_evaluation, read_metrics
from trainer.reporting.state import read_state
from trainer.run.checkpoint import open_checkpoint

Content = dict[str, Any]
Change = Callable[[Content], object]


def change(*path: str | int, to: Any) -> Change:
    """Set the value at a path."""
    def apply(content: Any) -> None:
        for part in path[:-1]:
            content = content[part]
        content[path[-1]] = to
    return apply


def both(*changes: Change) -> Change:
    return lambda content: [apply(content) for apply in changes]


TRAIN = ("splits", "train")
HOSTILE: dict[str, Change] = {  # of version 1, which lists its shards
    "negative counts that sum right": both(change(*TRAIN, "shards", 0, "samples", to=-6),
                                           change(*TRAIN, "shards", 1, "samples", to=18)),
    "null samples": change(*TRAIN, "samples", to=None),
    "10**30 samples": change(*TRAIN, "shards", 0, "samples", to=10**30),
    "2**62 samples that sum right": both(change(*TRAIN, "shards", 0, "samples", to=2**62),
                                         change(*TRAIN, "samples", to=2**62 + 18)),
    "as many samples as fit no file": both(
        change(*TRAIN, "shards", 0, "samples", to=10**12), change(*TRAIN, "samples", to=10**12 + 18),
        change(*TRAIN, "index", "bytes", to=16 * (10**12 + 18))),
    "whole floats": change(*TRAIN, "shards", 0, "samples", to=6.0),
    "true for 1": change("seed", to=True),
    "text for a number": change(*TRAIN, "shards", 0, "bytes", to="65536"),
    "a number for text": change("dataset", to=3),
    "negative bytes": change(*TRAIN, "shards", 0, "bytes", to=-1),
    "NaN in the settings": change("config", to={"scale": math.nan}),
    "no splits": change("splits", to={}),
    "a split without shards": change(*TRAIN, "shards", to=[]),
    "a split named ../x": lambda content: content["splits"].update({"../x": content["splits"].pop("train")}),
    "a kind of its own": change(*TRAIN, "kind", to="movies"),
    "a shard twice": change(*TRAIN, "shards", 1, "name", to="train-000000.tar"),
    "a shard elsewhere": change(*TRAIN, "shards", 0, "name", to="../../etc/passwd.tar"),
    "an absolute index": change(*TRAIN, "index", "name", to="/train.index"),
    "a hash that is none": change(*TRAIN, "shards", 0, "sha256", to="../" * 21 + "x"),
    "two classes of one name": lambda content: content["classes"].append(dict(content["classes"][0])),
    "no class": both(change("classes", to=[]), change(*TRAIN, "class_pixels", to=[])),
    "a class that clears the screen": change("classes", 0, "name", to="\x1b[2Jsky"),
    "a colour of two": change("classes", 0, "color", to=[1, 2]),
    "more samples with a class than samples": change(*TRAIN, "class_samples", 0, to=10**9),
    "more pixels than any image has": change(*TRAIN, "ignored_pixels", to=2**61),
    "an unknown field": change("extra", to=1),
    "a list of skipped crops": change(*TRAIN, "skipped_crops", to=[1]),
    "settings nested too deep": change("crops", to=json.loads("[" * 200 + "]" * 200)),
    "a producer of numbers": change("producer", to={"pillow": 12}),
    "text of a megabyte": change("dataset", to="x" * 10**6),
}


HOSTILE_2: dict[str, Change] = {  # of version 2, beside those above that name no shard
    "no shards": change(*TRAIN, "shards", to=0),
    "more shards than samples": change(*TRAIN, "shards", to=25),
    "shards of version 1": change(*TRAIN, "shards", to=[]),
    "listed shards": change(*TRAIN, "listed", to=[]),
    "bytes that hold no sample": change(*TRAIN, "bytes", to=100),
    "10**30 bytes": change(*TRAIN, "bytes", to=10**30),
    "no table": change(*TRAIN, "table", to=None),
    "a table elsewhere": change(*TRAIN, "table", "name", to="../train.shards"),
    "a table for other shards": change(*TRAIN, "table", "bytes", to=53),
    "a table named as the index": change(*TRAIN, "table", "name", to="train.index"),
    "a table whose hash is none": change(*TRAIN, "table", "sha256", to="x" * 64),
    "a number for a table": change(*TRAIN, "table", to=5),
    "sources elsewhere": change(*TRAIN, "sources", "name", to="/etc/passwd.sources"),
    "sources of half a block": change(*TRAIN, "sources", "bytes", to=48),
    "skipped images without a name": change(*TRAIN, "skipped_images", to=[{"q": "w"}]),
    "sources of version 1": change("sources", to={"train-000000": "0" * 64}),
}
HOSTILE_2 |= {name: change for name, change in HOSTILE.items() if "shard" not in name and name not in (
    "negative counts that sum right", "10**30 samples", "2**62 samples that sum right",
    "as many samples as fit no file", "whole floats", "text for a number", "negative bytes", "a hash that is none")}


@pytest.mark.parametrize(("version", "name"), [*((1, name) for name in HOSTILE), *((2, name) for name in HOSTILE_2)])
def test_a_hostile_manifest_is_one_line(version: int, name: str, scene_shards: Path, tmp_path: Path) -> None:
    root = as_version_1(Path(shutil.copytree(scene_shards, tmp_path / "set"))) if version == 1 else scene_shards
    content = json.loads((root / MANIFEST_NAME).read_bytes())
    del content["manifest_sha256"]
    (HOSTILE if version == 1 else HOSTILE_2)[name](content)
    try:
        data = canonical_json({**content, "manifest_sha256": hash_of(content)}).encode()
    except ValueError:  # NaN has no canonical form
        data = json.dumps({**content, "manifest_sha256": "0" * 64}).encode()
    with pytest.raises(CorruptShardError) as error:
        parse(data, "manifest.json")
    text = str(error.value)
    assert text.startswith("manifest.json") and "\n" not in text and len(text) < 400 and "\x1b" not in text


def test_the_manifest_of_a_sound_set_is_taken_as_it_is(scene_shards: Path) -> None:
    assert manifest_bytes(load_manifest(scene_shards)) == (scene_shards / MANIFEST_NAME).read_bytes()


BOMBS = {"brackets": b"[" * 3000, "nested": b'{"a":' * 3000 + b"1" + b"}" * 3000,
         "digits": b'{"step": ' + b"9" * 5000 + b"}", "not text": b"\xff\xfe", "a list": b"[1]"}


@pytest.mark.parametrize("bomb", BOMBS)
def test_json_bombs_are_one_line_at_every_door(bomb: str, tmp_path: Path) -> None:
    for name in ("state.json", "evaluation.json", "config.json", "metrics.jsonl"):
        (tmp_path / name).write_bytes(BOMBS[bomb])
    doors: list[Callable[[], object]] = [
        lambda: parse(BOMBS[bomb], "manifest.json"), lambda: read_state(tmp_path), lambda: read_evaluation(tmp_path),
        lambda: directory_config(tmp_path)]
    for door in doors:
        try:
            door()
        except MaskStreamError as error:
            assert "json" in str(error) and "\n" not in str(error) and len(str(error)) < 400
        else:
            pytest.fail("it was taken")
    assert read_metrics(tmp_path) == []


@pytest.mark.parametrize("text", ["9" * 5000, "1" + "0" * 400, "-" + "9" * 30, "[" * 3000, "{a: " * 3000, "1e999"])
def test_numbers_and_brackets_in_settings_are_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(f"train: {{total_steps: {text}}}\n")
    for read in (lambda: load_config(RunConfig, tmp_path / "a.yaml"),
                 lambda: load_config(RunConfig, None, [f"train.total_steps={text}"]),
                 lambda: load_config(RunConfig, None, [f"optimizer.betas={text}"])):
        with pytest.raises(ConfigError) as error:
            read()
        assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("setting", [
    "backbone.random.hidden_size=1000000", "backbone.random.num_hidden_layers=1000000",
    "backbone.random.intermediate_size=1000000000", "backbone.random.num_register_tokens=1000000000",
    "decoder_head.hidden_dim=1048576", "decoder_head.num_queries=1000000000", "decoder_head.enc_layers=1000000",
    "decoder_head.dec_ffn=1000000000", "adapter.conv_inplane=1000000", "adapter.n_points=1000000",
    "adapter.cffn_ratio=1000000", "decoder_head.num_blocks=100000", "eval.crop_size=1048576",
])
def test_a_size_beyond_any_model_is_refused_before_it_is_allocated(setting: str) -> None:
    with pytest.raises(ConfigError, match=r"legal: (from|at most)"):
        load_run_config(None, [setting])


def test_sizes_that_are_legal_one_by_one_and_too_much_together_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"a ViT of .* parameters, legal: at most"):
        load_vit(load_run_config(None, ["backbone.random.hidden_size=16384", "backbone.random.num_hidden_layers=256",
                                        "backbone.random.num_attention_heads=128",
                                        "backbone.random.intermediate_size=65536"]).backbone)
    with pytest.raises(ConfigError, match=r"decoder_head has .* parameters, legal: at most"):
        load_run_config(None, ["decoder_head.hidden_dim=4096", "decoder_head.enc_layers=64",
                               "decoder_head.enc_ffn=65536"])


def test_a_vit_file_that_names_block_a_billion_is_refused() -> None:
    state = {"cls_token": torch.zeros(1, 1, 16), "rope_embed.periods": torch.ones(4),
             "blocks.0.mlp.fc1.weight": torch.zeros(32, 16), "storage_tokens": torch.zeros(1, 4, 16),
             "blocks.1000000000.norm1.weight": torch.zeros(16)}
    with pytest.raises(ConfigError, match=r"1000000001 blocks, legal: at most 256"):
        architecture_of(state, "the file").config()
    with pytest.raises(ConfigError, match="legal: at most"):
        VitArchitecture(dim=10**9, blocks=1, heads=1, ffn=1).config()


def test_class_names_with_control_characters_are_refused_at_every_door() -> None:
    for name in ("\x1b[31mred", "a\x00b", "two\nlines", "\u202eevil", "\x9b", ""):
        with pytest.raises(ValueError, match=r"legal: non-empty text without control characters"):
            ClassInfo(name=name, color=(0, 0, 0))
    with pytest.raises(ConfigError, match=r"line 2: class name 'a\\x1b\[2J', legal: non-empty text"):
        parse_classes("sky\na\x1b[2J\n", "classes.txt")
    assert ClassInfo(name="Ärger, نَعَم 🛣", color=(0, 0, 0)).name.startswith("Ä")


def test_a_sample_larger_than_its_whole_split_is_refused_before_it_is_decoded(scene_shards: Path) -> None:
    manifest = load_manifest(scene_shards)
    train = replace(manifest.splits["train"], class_pixels=[0] * manifest.num_classes, ignored_pixels=64 * 64 - 1)
    reader = ShardReader(scene_shards, "train", replace(manifest, splits={**manifest.splits, "train": train}))
    with pytest.raises(CorruptShardError, match=r"sample 0 .*: it is 64x64, but .* more than 4095 pixels"):
        reader.read(0)
    reader.close()
    reader = ShardReader(scene_shards, "train")
    assert reader.read(0).image.shape == (64, 64, 3)
    reader.close()


def test_an_image_named_by_dots_alone_is_left_over_with_a_reason() -> None:
    """Hidden files are skipped in a folder, but not everywhere."""
    class Tree:
        def files(self, folder: str) -> dict[str, int]:
            return {"images": {"images/...jpg": 1, "images/a.b.jpg": 1}, "labels": {"labels/a.b.png": 1}}[folder]

    found = find_pairs(Tree(), Template("images/{stem}", (".jpg",), ""), Template("labels/{stem}", (".png",), ""), "")
    assert [pair.key for pair in found.pairs] == ["a.b"]
    assert found.unpaired == [("images/...jpg", "its name consists only of dots and a suffix")]


@pytest.mark.slow
def test_an_image_named_by_dots_alone_is_predicted(tmp_path: Path) -> None:
    model = build_model(load_run_config(TINY, ["decoder_head.type=linear"]), 2).eval()
    classes = [ClassInfo(name=name, color=(9, 9, 9)) for name in ("a", "b")]
    write_directory(Pretrained(model=model, config=load_run_config(TINY, ["decoder_head.type=linear"]),
                               classes=classes), tmp_path / "model")
    Image.new("RGB", (64, 64)).save(tmp_path / "...jpg", "JPEG")
    result = run_program("trainer/predict.py", "--checkpoint", tmp_path / "model", "--output", tmp_path / "out",
                         tmp_path / "...jpg")
    assert result.returncode == 0, result.stderr
    with Image.open(tmp_path / "out/...png") as found:
        assert found.size == (64, 64)


def test_a_class_file_may_begin_with_a_byte_order_mark_and_must_be_a_file(tmp_path: Path) -> None:
    """Given beside weights of another program, as Windows' editors save it; a named pipe would hang."""
    config = load_run_config(TINY, ["decoder_head.type=linear"])
    model = build_model(config, 2).eval()
    classes = [ClassInfo(name=name, color=(9, 9, 9)) for name in ("a", "b")]
    head, _ = write_meta_files(Pretrained(model=model, config=config, classes=classes), tmp_path)
    (tmp_path / "classes.txt").write_bytes(b"\xef\xbb\xbfsky\r\nroad\r\n")
    os.mkfifo(tmp_path / "pipe")
    options = {"checkpoint": str(head), "configs": [str(TINY)], "overrides": ["decoder_head.type=linear"]}
    found = open_pretrained(argparse.Namespace(**options, classes=str(tmp_path / "classes.txt")))
    assert [info.name for info in found.classes] == ["sky", "road"]
    with pytest.raises(ConfigError, match=r"--classes \S+pipe cannot be read: .* is a named pipe"):
        open_pretrained(argparse.Namespace(**options, classes=str(tmp_path / "pipe")))


@pytest.mark.parametrize(("head", "size"), [("m2f", 32), ("linear", 16)])
def test_one_cell_of_batch_norm_names_the_least_size(head: str, size: int, scene_shards: Path, tmp_path: Path) -> None:
    from shards.manifest import load_manifest
    from trainer.run.run import open_crops

    overrides = [f"decoder_head.type={head}", "data.crop_size=32", "train.micro_batch_size=1"]
    config = tiny(scene_shards, tmp_path, *overrides)
    if size == 32:
        with pytest.raises(ConfigError, match=r"train.micro_batch_size is 1.*Legal: crops of at least 64x64"):
            open_crops(config, load_manifest(scene_shards))
        config = tiny(scene_shards, tmp_path, *overrides, "train.micro_batch_size=2")
    open_crops(config, load_manifest(scene_shards))


def test_ten_lines_that_stand_for_a_gigabyte_are_one_short_line(tmp_path: Path) -> None:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    (tmp_path / "a.yaml").write_text("\n".join(["train:", "  total_steps:", *(f"    {line}" for line in lines)]))
    with pytest.raises(ConfigError, match=r"train\.total_steps is .*legal: a whole number") as error:
        load_config(RunConfig, tmp_path / "a.yaml")
    assert len(str(error.value)) < 400


def test_checkpoints_that_claim_more_than_they_hold_are_refused(tmp_path: Path) -> None:
    nested: list[Any] = []
    for _ in range(100):
        nested = [nested]
    path = tmp_path / "a.pt"
    for content, message in (({"cls_token": torch.zeros(1).expand(10**6, 10**6)}, "has fewer elements in the file"),
                             ({"model": {"a": torch.zeros(1)}, "config": nested}, "nested more than 32 levels deep")):
        torch.save(content, path)
        with pytest.raises(ConfigError, match=message):
            open_checkpoint(path)


def test_a_huge_vit_named_in_a_checkpoint_is_refused(tmp_path: Path) -> None:
    checkpoint = state(1)
    checkpoint.config = {"backbone": {"random": {"hidden_size": 2**20, "num_hidden_layers": 10**6}}}
    torch.save(vars(checkpoint), tmp_path / "a.pt")
    with pytest.raises(ConfigError, match=r"backbone\.random\.hidden_size is 1048576, legal: from 4 to 16384"):
        load_pretrained(tmp_path / "a.pt")
