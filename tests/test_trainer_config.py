"""Configuration: every mistake is one clear error, and what is saved reads back equal."""

from __future__ import annotations

from pathlib import Path

import pytest

from shards.config_file import config_changes, config_to_dict, config_to_yaml, override_config
from shards.errors import ConfigError
from tests.conftest import REPOSITORY
from trainer.config import RunConfig, load_run_config, run_config_from_dict

M2F = REPOSITORY / "configs" / "config-ade20k-m2f-training.yaml"


def test_later_layers_win_and_yaml_exponents_are_numbers() -> None:
    config = load_run_config(M2F, ["optimizer.lr=3e-5", "train.total_steps=7"])
    assert config.optimizer.lr == 3e-5 and config.train.total_steps == 7
    assert load_run_config(M2F, []).optimizer.lr == 1e-4  # "1e-4" is a string to plain YAML


def test_the_resolved_configuration_reads_back_equal(tmp_path: Path) -> None:
    config = load_run_config(M2F, ["data.root=s3 like, {odd} 'name'", "eval.tta_ratios=[0.5,1]"])
    (tmp_path / "config.yaml").write_text(config_to_yaml(config))
    assert load_run_config(tmp_path / "config.yaml", []) == config
    assert run_config_from_dict(config_to_dict(config)) == config
    assert override_config(config, ["seed=3"]).seed == 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lrr=1", "unknown key 'optimizer.lrr'.*Did you mean: 'lr'"),
        ("optmizer.lr=1", "unknown key 'optmizer'.*Did you mean: 'optimizer'"),
        ("optimizer.lr=fast", "optimizer.lr: Value 'fast'"),
        ("optimizer.lr=-1", "optimizer.lr is -1.0, legal: from 0"),
        ("optimizer.betas=[0.9,2]", r"optimizer.betas is .0.9, 2.0., legal: two numbers from 0 to below 1"),
        ("optimizer.betas=[0.9]", "legal: two numbers"),
        ("optimizer.lr=.inf", "optimizer.lr is inf"),
        ("backbone.image_std=[0,1,1]", "image_std is .*legal: three numbers above 0"),
        ("backbone.image_mean=[0.5]", "image_mean is .*legal: three numbers"),
        ("seed=99999999999999999999", "seed is 99999999999999999999, legal: from 0"),
        ("train.total_steps=1.5", "train.total_steps"),
        ("decoder_head.type=m2", "decoder_head.type is 'm2', legal: m2f, linear, eomt; did you mean 'm2f'"),
        ("decoder_head.hidden_dim=100", "hidden_dim is 100, legal: a multiple of 32"),
        ("backbone.random.hidden_size=64", "both set"),
        ("eval.crop_size=500", "eval.crop_size is 500, legal: a multiple of 32"),
        ("eval.stride=600", "eval.stride is 600, legal: at most"),
        ("decoder_head.nheads=0", "decoder_head.nheads is 0, legal: from 1"),
        ("eval.tta_ratios=[[1]]", r"eval.tta_ratios\[0\]: Value"),
        ("backbone.random.seed=99999999999999999999", "backbone.random.seed is"),
        ("optimizer.betas={}", "command line: optimizer: Cannot merge"),
        ("data=3", "command line: data: .*int is not a subclass of DataConfig"),
        ("nonsense", "not of the form key=value"),
        ("data.root=[", "cannot read"),
    ],
)
def test_mistakes_are_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_run_config(M2F, [override])


@pytest.mark.parametrize(("text", "message"), [
    ("- 1\n", "key: value"), ("5", "cannot be read"), ("a: [", "not valid YAML"),
    ("optimiser: {lr: 1}", "Did you mean: 'optimizer'"),
])
def test_bad_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError, match=rf"bad\.yaml.*{message}"):
        load_run_config(tmp_path / "bad.yaml", [])
    with pytest.raises(ConfigError, match=r"nowhere\.yaml does not exist"):
        load_run_config(tmp_path / "nowhere.yaml", [])


def test_configurations_cannot_be_changed() -> None:
    config = RunConfig()
    with pytest.raises(AttributeError):
        config.seed = 1  # type: ignore[misc]


def test_changes_between_configurations_are_named() -> None:
    before = RunConfig()
    assert config_changes(before, before) == []
    now = override_config(before, ["optimizer.lr=0.5", "data.root=elsewhere"])
    assert sorted(config_changes(before, now)) == ["data.root was None and is elsewhere",
                                                   f"optimizer.lr was {before.optimizer.lr} and is 0.5"]
