"""What must never be stored, shown or raised: credentials in URLs, environment variables, control characters."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from preprocess.config import PreprocessConfig
from shards.cli.config_file import config_changes, config_to_dict, config_to_yaml, load_config, override_config
from shards.errors import ConfigError, MaskStreamError, StorageError
from shards.files.storage import RetryPolicy, open_storage
from shards.shown_text import masked, masked_value, shown
from tests.conftest import REPOSITORY
from tests.runs.test_end_to_end import ALONE, run_program, tiny
from tests.support.object_storage import cloud_stub, free_ports
from trainer.config import RunConfig, load_run_config, run_config_from_dict
from trainer.data.crops import open_reader
from trainer.loop import train

SECRET, PASSWORD = "s1gn4ture%2Bof-mine", "pa55w0rd"
NEVER = (SECRET, PASSWORD, "s1gn4ture", "alice")


def url_with_secrets(address: str) -> str:
    scheme, host = address.split("://")
    return f"{scheme}://alice:{PASSWORD}@{host}/set?sv=2024&sig={SECRET}"


def assert_clean(text: str) -> None:
    assert not [secret for secret in NEVER if secret in text], text


@pytest.mark.parametrize(("text", "expected"), [
    ("https://h/p?sig=abc", "https://h/p?***"),
    ("(https://user:pw@h:8080/p/q?a=1&b=2): failed", "(https://***@h:8080/p/q?***): failed"),
    ("s3://key:secret@bucket/a b", "s3://***@bucket/a b"),
    ("no 'https://h/p#token', but https://h/q", "no 'https://h/p#***', but https://h/q"),
    ("data.root=https://h/p?sig=a,b", "data.root=https://h/p?***"),
    ("is it https://h/p?", "is it https://h/p?"),
    ("s3://bucket/a@b/c stays, as a?b does", "s3://bucket/a@b/c stays, as a?b does"),
])
def test_credentials_are_masked_in_any_text(text: str, expected: str) -> None:
    assert masked(text) == expected and masked(expected) == expected


def test_a_setting_is_masked_to_its_end_whatever_is_in_it() -> None:
    assert masked_value("https://h/p?sig=a b'c\nd") == "https://h/p?***"
    assert masked_value({"a": ["https://u@h/p"], "b": (1, None, "runs/exp ?")}) == {
        "a": ["https://***@h/p"], "b": (1, None, "runs/exp ?")}


@given(st.text())
def test_shown_text_is_one_harmless_line_and_keeps_all_else(text: str) -> None:
    found = shown(text)
    assert not any(ord(character) < 32 or 127 <= ord(character) < 160 for character in found)
    found.encode()
    if "://" not in text and text.isprintable():
        assert found == text


def test_no_error_of_ours_holds_secrets_or_control_characters() -> None:
    url = url_with_secrets("https://host")
    assert str(MaskStreamError(f"{url}/manifest.json \x1b[31m")) == "https://***@host/set?*** \\x1b[31m"
    for override in (f"data.rot={url}", f"train.total_steps={url}", f"{url}", f"optimizer.lr={'x' * 70}{url}"):
        with pytest.raises(ConfigError) as error:
            load_run_config(None, [override])
        assert_clean(str(error.value))


def test_stored_configurations_hold_no_secrets_and_the_running_one_keeps_them() -> None:
    url = url_with_secrets("https://host")
    config = load_run_config(None, [f"data.root={url}", f"train.checkpoint_dir={url}", f"load.weights={url}"])
    assert override_config(config, ["seed=1"]).data.root == url
    assert_clean(config_to_yaml(config) + str(config_to_dict(config)))
    assert config_to_dict(config)["data"]["root"] == "https://***@host/set?***"
    stored = run_config_from_dict(config_to_dict(config))
    assert config_changes(stored, config) == [] == config_changes(config, stored)
    assert_clean(config_to_yaml(load_config(PreprocessConfig, None, [f"output={url}"])))


def test_a_masked_place_says_what_to_type() -> None:
    with pytest.raises(ConfigError, match=r"in place of its credentials, which are never stored; pass the full URL"):
        open_storage("https://***@host/set?***")


def test_servers_and_clients_repeat_no_secrets(tmp_path: Path) -> None:
    """Not even in the exceptions that caused ours."""
    with cloud_stub(tmp_path) as (address, asked):
        storage = open_storage(url_with_secrets(address), RetryPolicy(tries=1, timeout=5))
        with pytest.raises(FileNotFoundError) as missing:
            storage.read("manifest.json")
        assert asked, "it was asked"
    nobody = open_storage(url_with_secrets(f"http://127.0.0.1:{free_ports(1)[0]}"), RetryPolicy(tries=1, timeout=5))
    with pytest.raises(StorageError) as refused:
        nobody.read("manifest.json", 0, 10)
    assert "/set/manifest.json?***" in str(missing.value)
    for error in (missing.value, refused.value):
        cause: BaseException | None = error
        while cause is not None:
            assert_clean(str(cause) + repr(cause))
            cause = cause.__cause__ or cause.__context__
    assert_clean(storage.root + storage.where("x"))


@pytest.mark.slow
def test_a_run_from_a_signed_url_leaves_the_signature_nowhere(scene_shards: Path, tmp_path: Path,
                                                             capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    with cloud_stub(scene_shards) as (address, _):
        url = url_with_secrets(address)
        train(tiny(url, run, "train.total_steps=1", "data.workers=1"), ALONE)
        train(tiny(url.replace("sv=2024", "sv=2025"), run, "train.total_steps=2", "data.workers=0"), ALONE)
        result = run_program("trainer/train.py", "--config", run / "config.yaml", f"data.root={url}",
                             "decoder_head.type=linear", "--dry-run")
        assert result.returncode == 0, result.stderr
    output = capsys.readouterr()
    assert "continuing at step 1" in output.out and "data.root was" not in output.out
    assert_clean(output.out + output.err + result.stdout + result.stderr)
    for path in run.rglob("*"):
        if path.is_file():
            assert_clean(path.read_bytes().decode("latin-1"))
    again = load_run_config(run / "config.yaml", [])
    with pytest.raises(ConfigError, match="pass the full URL again"):
        open_reader(again.data, "train")


REFERENCE = "${oc.env:MASKSTREAM_TEST_SECRET}"


def test_no_variable_is_resolved_from_any_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKSTREAM_TEST_SECRET", PASSWORD)
    (tmp_path / "a.yaml").write_text(f"data: {{train_split: '{REFERENCE}', root: '${{seed}}'}}\n")
    config = load_run_config(tmp_path / "a.yaml", [f"data.val_split={REFERENCE}", "load.weights=x",
                                                   "load.ignore=['${oc.env:MASKSTREAM_TEST_SECRET}']"])
    assert (config.data.train_split, config.data.val_split, config.data.root) == (REFERENCE, REFERENCE, "${seed}")
    assert list(config.load.ignore) == [REFERENCE]
    stored: dict[str, Any] = torch.load(_saved(config, tmp_path / "c.pt"), weights_only=True)
    again = run_config_from_dict(stored)  # as from checkpoints and exports
    assert again == config and PASSWORD not in config_to_yaml(again)
    assert override_config(again, ["seed=3"]) == dataclasses.replace(config, seed=3)


def _saved(config: RunConfig, path: Path) -> Path:
    torch.save(config_to_dict(config), path)
    return path


def test_the_command_line_resolves_nothing_either(scene_shards: Path, tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKSTREAM_TEST_SECRET", PASSWORD)
    result = run_program("trainer/train.py", "--config", REPOSITORY / "tests/support/tiny.yaml",
                         f"data.root={scene_shards}", f"output_dir={tmp_path}/r", f"data.train_split={REFERENCE}",
                         "--dry-run")
    assert result.returncode == 2 and f"no split '{REFERENCE}'" in result.stderr
    assert PASSWORD not in result.stdout + result.stderr
