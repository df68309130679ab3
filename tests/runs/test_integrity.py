"""Damaged bytes in a checkpoint or an export are never used as weights, however they are loaded."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from shards.errors import ConfigError
from shards.manifest import ClassInfo
from tests.runs.test_end_to_end import run_program
from tests.unit.test_trainer_run_checkpoint import state, written
from trainer.build import build_model
from trainer.config import load_run_config
from trainer.exporting.directory import write_directory
from trainer.exporting.meta import write_meta_files
from trainer.models.integrity import check_file
from trainer.models.weights import read_weights
from trainer.pretrained import Pretrained, load_pretrained
from trainer.run.checkpoint import load_checkpoint, open_checkpoint

TINY = Path(__file__).parent.parent / "support" / "tiny.yaml"
NAME = "step-00000001.pt"


def flip(path: Path, rng: random.Random) -> tuple[int, bytes]:
    """Flip one bit; returns its position and the original content."""
    sound = path.read_bytes()
    place = rng.randrange(8 * len(sound))
    damaged = bytearray(sound)
    damaged[place // 8] ^= 1 << place % 8
    path.write_bytes(damaged)
    return place, sound


def refuses_all_flips(path: Path, read: Callable[[], object], count: int) -> None:
    rng = random.Random(0)
    for _ in range(count):
        place, sound = flip(path, rng)
        with pytest.raises(ConfigError) as error:
            read()
            pytest.fail(f"bit {place} of {path.name} was taken")
        assert "\n" not in str(error.value)
        path.write_bytes(sound)
    read()


@pytest.fixture
def pretrained() -> Pretrained:
    config = load_run_config(TINY, ["decoder_head.type=linear"])
    torch.manual_seed(0)
    classes = [ClassInfo(name=name, color=(0, 0, 0)) for name in ("a", "b")]
    return Pretrained(model=build_model(config, 2).eval(), config=config, classes=classes)


@pytest.mark.parametrize("beside", [True, False], ids=["hash beside", "hash inside only"])
def test_every_flipped_bit_of_a_checkpoint_is_refused(tmp_path: Path, beside: bool) -> None:
    written(tmp_path, tmp_path, 1)
    if not beside:
        (tmp_path / f"{NAME}.sha256").unlink()
    refuses_all_flips(tmp_path / NAME, lambda: open_checkpoint(tmp_path / NAME), 300)


def test_every_flipped_bit_of_the_seal_itself_is_refused(tmp_path: Path) -> None:
    written(tmp_path, tmp_path, 1)
    (tmp_path / f"{NAME}.sha256").unlink()
    sound = (tmp_path / NAME).read_bytes()
    for place in range(8 * (len(sound) - 96), 8 * len(sound)):
        damaged = bytearray(sound)
        damaged[place // 8] ^= 1 << place % 8
        (tmp_path / NAME).write_bytes(damaged)
        with pytest.raises(ConfigError, match="it is damaged: its sha256 is not the one at its end"):
            load_checkpoint(tmp_path / NAME)


def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    written(tmp_path, tmp_path, 1)
    sound = (tmp_path / NAME).read_bytes()
    for length in (0, 1, 100, len(sound) // 2, len(sound) - 200, len(sound) - 1):
        (tmp_path / NAME).write_bytes(sound[:length])
        with pytest.raises(ConfigError, match="damaged"):
            load_checkpoint(tmp_path / NAME)


def test_checkpoints_from_before_the_inner_hash_load_and_their_data_is_checked(tmp_path: Path) -> None:
    old = {name: value for name, value in vars(state(3)).items() if name != "run_id"}
    path = tmp_path / "old.pt"
    torch.save(old, path)
    assert load_checkpoint(path).step == 3 and load_checkpoint(path).run_id == ""
    data = bytearray(path.read_bytes())
    data[data.index(torch.full((8,), 3.0).numpy().tobytes()) + 1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"it is damaged: the CRC-32 of 'old/data/0' in it differs"):
        load_checkpoint(path)


def test_every_flipped_bit_of_an_export_is_refused(pretrained: Pretrained, tmp_path: Path) -> None:
    write_directory(pretrained, tmp_path)
    (tmp_path / "model.safetensors.sha256").unlink()
    refuses_all_flips(tmp_path / "model.safetensors", lambda: load_pretrained(tmp_path), 60)
    refuses_all_flips(tmp_path / "model.safetensors", lambda: read_weights(tmp_path / "model.safetensors"), 200)
    refuses_all_flips(tmp_path / "config.json", lambda: read_weights(tmp_path), 300)


def test_every_flipped_bit_of_a_safetensors_header_is_refused(pretrained: Pretrained, tmp_path: Path) -> None:
    write_directory(pretrained, tmp_path)
    path = tmp_path / "model.safetensors"
    (tmp_path / "model.safetensors.sha256").unlink()
    sound = path.read_bytes()
    end = sound.index(b"}") + 1  # the metadata come first
    for place in range(8 * end):
        damaged = bytearray(sound)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(ConfigError):
            read_weights(path)


def test_exports_from_before_the_hashes_load(pretrained: Pretrained, tmp_path: Path) -> None:
    write_directory(pretrained, tmp_path)
    (tmp_path / "model.safetensors.sha256").unlink()
    save_file({key: tensor.contiguous() for key, tensor in pretrained.model.meta_state_dict().items()},
              tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    del config["sha256"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert asdict(load_pretrained(tmp_path).classes[0]) == asdict(pretrained.classes[0])


def test_metas_files_of_ours_are_sealed_and_read_by_torch_alone(pretrained: Pretrained, tmp_path: Path) -> None:
    head, backbone = write_meta_files(pretrained, tmp_path)
    assert set(torch.load(backbone, weights_only=True)) == set(pretrained.model.backbone.meta_state_dict())
    head.with_name("head.pth.sha256").unlink()
    refuses_all_flips(head, lambda: read_weights(head), 200)


@pytest.mark.parametrize("name", ["vit.pth", "model.safetensors"])
def test_a_hash_beside_other_peoples_files_counts_too(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    content = {"cls_token": torch.zeros(4)}
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)
    path.with_name(f"{name}.sha256").write_text(f"SHA256 ({name}) = {'0' * 64}\n")
    with pytest.raises(ConfigError, match=rf"its sha256 is not the one in {name}\.sha256"):
        read_weights(path)
    path.with_name(f"{name}.sha256").write_text("to do\n")
    with pytest.raises(ConfigError, match=r"contains no sha256 of 64 hexadecimal digits; remove it, or recreate it"):
        read_weights(path)


def test_a_file_that_is_replaced_while_it_is_read_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """best.pt of a run that continues."""
    written(tmp_path, tmp_path, 1, best=1)
    path, digest, files = tmp_path / "best.pt", "hashlib.file_digest", []
    import hashlib
    real = hashlib.file_digest

    def replaced_meanwhile(file: object, name: str) -> object:
        if not files:
            files.append(file)
            written(tmp_path, tmp_path, 2, best=2)
        return real(file, name)  # type: ignore[arg-type]

    monkeypatch.setattr(digest, replaced_meanwhile)
    (tmp_path / "best.pt.sha256").write_text(f"{'1' * 64}  best.pt\n")
    check_file(path)
    assert load_checkpoint(path).step == 2


@pytest.mark.slow
def test_every_program_refuses_a_damaged_file(tmp_path: Path, scene_shards: Path) -> None:
    written(tmp_path, tmp_path, 1)
    path = tmp_path / NAME
    (tmp_path / f"{NAME}.sha256").unlink()
    data = bytearray(path.read_bytes())
    data[data.index(torch.ones(8).numpy().tobytes()) + 1] ^= 1
    path.write_bytes(data)
    image = tmp_path / "a.png"
    image.write_bytes(b"")
    for command in (["trainer/eval.py", "--config", TINY, "--checkpoint", path, f"data.root={scene_shards}"],
                    ["trainer/predict.py", "--checkpoint", path, "--output", tmp_path / "out", image],
                    ["trainer/export.py", "--checkpoint", path, "--output", tmp_path / "out"],
                    ["trainer/train.py", "--config", TINY, f"data.root={scene_shards}", f"load.weights={path}",
                     f"output_dir={tmp_path / 'run'}"]):
        result = run_program(*command)
        assert result.returncode == 2, command
        assert "it is damaged: its sha256 is not the one at its end" in result.stderr, command
        assert "Traceback" not in result.stderr
