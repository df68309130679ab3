"""Configuration: every mistake is one clear error, and saved configurations load back equal."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocess.config import PreprocessConfig
from shards.cli.config_file import config_changes, config_to_dict, config_to_yaml, load_config, override_config
from shards.cli.settings import describe_config, without_places
from shards.errors import ConfigError
from tests.conftest import REPOSITORY
from trainer.config import RunConfig, load_run_config, run_config_from_dict
from trainer.data_config import SourceConfig
from trainer.model_config import DecoderHeadConfig

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


def test_a_setting_is_a_word_or_a_list(tmp_path: Path) -> None:
    for text, value in (("inverse_log", "inverse_log"), ("[1, 2.5]", [1.0, 2.5]), ("null", None)):
        (tmp_path / "config.yaml").write_text(f"loss: {{class_weights: {text}}}")
        config = load_run_config(tmp_path / "config.yaml", [])
        assert config.loss.class_weights == value
        assert load_run_config(None, [f"loss.class_weights={text}"]) == config
        (tmp_path / "config.yaml").write_text(config_to_yaml(config))
        assert load_run_config(tmp_path / "config.yaml", []) == run_config_from_dict(config_to_dict(config)) == config
    (tmp_path / "config.yaml").write_text("loss: {class_weights: {sky: 2}}")
    with pytest.raises(ConfigError, match=r"config.yaml: loss.class_weights is {'sky': '2'}, legal: a list"):
        load_run_config(tmp_path / "config.yaml", [])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lrr=1", "unknown key 'optimizer.lrr'.*Did you mean: 'lr'"),
        ("output_dir=s3://bucket/run", "output_dir is 's3://bucket/run', legal: a local folder"),
        ("data.cache_dir=gs://bucket/c", "data.cache_dir is 'gs://bucket/c', legal: a local folder"),
        ("optmizer.lr=1", "unknown key 'optmizer'.*Did you mean: 'optimizer'"),
        ("optimizer.lr=fast", "command line: optimizer.lr is 'fast', legal: a number"),
        ("optimizer.lr=-1", "optimizer.lr is -1.0, legal: at least 0"),
        ("optimizer.betas=[0.9,2]", r"optimizer.betas is .0.9, 2.0., legal: two numbers from 0 to below 1"),
        ("optimizer.betas=[0.9]", "legal: two numbers"),
        ("loss.class_weights=inverse_lg", "legal: inverse_log, effective_number or a list; did you mean 'inverse_log'"),
        ("loss.class_weights=3", "loss.class_weights is '3', legal: inverse_log, effective_number or a list"),
        ("loss.class_weights=[1, x]", r"command line: loss.class_weights\[1\] is 'x', legal: a number"),
        ("loss.class_weights=[1, -1]", "loss.class_weights is .*legal: at least 0"),
        ("loss.class_weights=[.inf]", "loss.class_weights"),
        ("loss.class_weights=[1", "cannot read 'loss.class_weights=.1'"),
        ("loss.class_weights=[0, 0]", "legal: one number per class, at least one of them above 0"),
        ("loss.class_weights=[]", "legal: one number per class"),
        ("loss.class_weights_beta=1", "loss.class_weights_beta is 1.0, legal: from 0 to 0.999999999"),
        ("optimizer.lr=inf", "optimizer.lr is inf"),
        ("optimizer.lr=.inf", "optimizer.lr is '.inf', legal: a number"),
        ("backbone.image_std=[0,1,1]", "image_std is .*legal: three numbers above 0"),
        ("backbone.image_mean=[0.5]", "image_mean is .*legal: three numbers"),
        ("seed=99999999999999999999", "seed is 99999999999999999999, legal: (at least 0|from 0)"),
        ("train.total_steps=1.5", "train.total_steps"),
        ("decoder_head.type=m2", "decoder_head.type is 'm2', legal: m2f, linear, eomt, pmt; did you mean 'm2f'"),
        ("decoder_head.hidden_dim=100", "hidden_dim is 100, legal: a multiple of 32"),
        ("backbone.random.hidden_size=64", "both set"),
        ("eval.crop_size=500", "eval.crop_size is 500, legal with decoder_head.type m2f: a multiple of 32"),
        ("eval.stride=600", "eval.stride is 600, legal: at most"),
        ("decoder_head.nheads=0", "decoder_head.nheads is 0, legal: from 1 to 512"),
        ("eval.tta_ratios=[[1]]", r"eval.tta_ratios\[0\] is \['1'\], legal: a number"),
        ("backbone.random.seed=99999999999999999999", "backbone.random.seed is"),
        ("optimizer.betas={}", "command line: optimizer.betas is {}, legal: a list"),
        ("data=3", "command line: data is '3', legal: a section of settings"),
        ("nonsense", "not of the form key=value"),
        ("eval.tta_ratios=[", "cannot read"),
        ("eval.tta_ratios=" + "[" * 3000, "nested too deep"),
        ("seed=" + "9" * 5000, "seed is '99999.*5002 characters.*legal: a whole number"),
        ("data.hflip=yes", "data.hflip is 'yes', legal: a number"),
        ("data.photometric=maybe", "data.photometric is 'maybe', legal: true or false"),
        ("decoder_head.type=", "decoder_head.type is None, legal: text"),
        ("load.ignore=a", "load.ignore is 'a', legal: a list"),
        ("data.sources=[{root: a}, {wieght: 2}]", r"unknown key 'data.sources\[1\].wieght'. Did you mean: 'weight'; "
         "legal: root, split, weight, classes, unmatched"),
        ("data.sources=[{}, {weight: 0}]", r"data.sources\[1\].weight is 0.0, legal: from 1e-06 to 1000000"),
        ("data.sources=[{weight: x}]", r"command line: data.sources\[0\].weight is 'x', legal: a number"),
        ("data.sources=[{unmatched: ignor}]", r"data.sources\[0\].unmatched is 'ignor', legal: error, ignore; did you"),
        ("data.sources=[{classes: {a: [b]}}]", r"data.sources\[0\].classes.a is \['b'\], legal: text"),
        ("data.sources=[{root: ''}]", r"data.sources\[0\].root is empty, legal: text, or null"),
        ("data.sources=[a]", r"command line: data.sources\[0\] is 'a', legal: a section of settings \(root, split"),
        ("data.sources=a", "command line: data.sources is 'a', legal: a list"),
    ],
)
def test_mistakes_are_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_run_config(M2F, [override])


@pytest.mark.parametrize(("text", "message"), [
    ("- 1\n", "key: value"), ("5", "key: value"), ("a: [", "not valid YAML"),
    ("optimiser: {lr: 1}", "Did you mean: 'optimizer'"), ("seed: 1\nseed: 2\n", "duplicate key seed"),
    ("eval: {tta_ratios: " + "[" * 3000, "nested too deep"), ("seed: !!python/object/apply:os.getpid []", "python"),
    ("seed:\n", "seed is None, legal: a whole number"),
])
def test_bad_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError, match=rf"bad\.yaml.*{message}"):
        load_run_config(tmp_path / "bad.yaml", [])
    with pytest.raises(ConfigError, match=r"nowhere\.yaml does not exist"):
        load_run_config(tmp_path / "nowhere.yaml", [])


TEXTS = ["runs/exp #2", "010", "1e3", "yes", "~", "NULL", " a: b ", "[x, {y", "'quoted'", "2026-11-27", "0x10",
         "12:30:00", "${oc.env:HOME}", "${seed}", "a,b=c", "*star", "&anchor", "é\tü"]


@pytest.mark.parametrize("text", TEXTS)
def test_a_string_setting_is_the_text_that_was_typed(tmp_path: Path, text: str) -> None:
    config = load_run_config(None, [f"output_dir={text}", f"data.root={text}"])
    assert config.output_dir == config.data.root == text
    (tmp_path / "saved.yaml").write_text(config_to_yaml(config), encoding="utf-8")
    assert load_run_config(tmp_path / "saved.yaml", []) == config
    assert run_config_from_dict(config_to_dict(config)) == override_config(config, ["seed=0"]) == config
    assert load_config(RunConfig, None, [], {"output_dir": text}).output_dir == text


@pytest.mark.parametrize("text", ["010", "1e3", "yes", "No", "0x10", "2026-11-27", "12:30:00", "${oc.env:HOME}", "off"])
def test_plain_text_in_yaml_files_and_lists_stays_text(tmp_path: Path, text: str) -> None:
    quoted = text.replace("${oc.env:HOME}", "'${oc.env:HOME}'")  # a brace is YAML's within { } and [ ]
    (tmp_path / "a.yaml").write_text(f"output_dir: {text}\ndata: {{val_split: {quoted}}}\n"
                                     f"load: {{weights: w, ignore: [{quoted}, b]}}\n")
    config = load_run_config(tmp_path / "a.yaml", [])
    assert config.output_dir == config.data.val_split == text and config.load.ignore == [text, "b"]
    assert load_run_config(None, ["load.weights=w", f"load.ignore=[{quoted}]"]).load.ignore == [text]
    shards = load_config(PreprocessConfig, None, [f"dataset.splits={{train: {quoted}}}", f"dataset.splits.val={text}"])
    assert shards.dataset.splits == {"train": text, "val": text}


def test_null_unsets_and_named_options_are_never_read_as_null(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("output_dir: somewhere\ndata: {root: null, cache_dir: 'null'}\n")
    config = load_run_config(tmp_path / "a.yaml", ["output_dir=null"])
    assert config.output_dir is None and config.data.root is None and config.data.cache_dir == "null"
    assert load_config(RunConfig, None, [], {"output_dir": "null"}).output_dir == "null"
    assert load_run_config(None, ["output_dir="]).output_dir is None


@settings(deadline=None, max_examples=30)
@given(st.text(st.characters(codec="utf-8", exclude_characters="\x00")))
def test_any_text_survives_saving(text: str) -> None:
    config = load_config(RunConfig, None, [], {"output_dir": text})
    assert config.output_dir == text
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.yaml")
        path.write_bytes(config_to_yaml(config).encode())
        assert load_run_config(path, []) == config


def test_numbers_are_read_as_typed(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("seed: 010\noptimizer: {lr: 1e-3, clip_grad_norm: null, betas: [0.5, .25]}\n"
                                     "data: {photometric: no}\neval: {resize_short_side: ~}\n")
    config = load_run_config(tmp_path / "a.yaml", ["train.total_steps=1_000"])
    assert config.seed == 10 and config.optimizer.lr == 1e-3 and config.optimizer.clip_grad_norm is None
    assert config.optimizer.betas == [0.5, 0.25] and config.data.photometric is False
    assert config.eval.resize_short_side is None and config.train.total_steps == 1000


def test_entries_of_a_list_are_settings_too(tmp_path: Path) -> None:
    override = "data.sources=[{weight: 3}, {root: b, split: '010', classes: {a: b, c: null}, unmatched: ignore}]"
    config = load_run_config(None, [override])
    assert config.data.sources == [SourceConfig(weight=3), SourceConfig(
        root="b", split="010", classes={"a": "b", "c": None}, unmatched="ignore")]
    (tmp_path / "config.yaml").write_text(config_to_yaml(config))
    assert load_run_config(tmp_path / "config.yaml", []) == run_config_from_dict(config_to_dict(config)) == config
    assert without_places(config).data.sources[1].root is None
    assert "  data.sources[N].weight = 1.0" in "\n".join(describe_config(RunConfig))
    changed = load_run_config(None, ["data.sources=[{weight: 3, split: x}, {root: b, split: '010', classes: {a: b}}]"])
    assert config_changes(config, changed) == [
        "data.sources[0].split was None and is x", "data.sources[1].unmatched was ignore and is error",
        "data.sources[1].classes.c was None and is not given"]


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


# -- settings that only one kind of head reads --------------------------------------------------------------


@pytest.mark.parametrize(("overrides", "message"), [
    (["decoder_head.dropout=0.2"], "dropout is 0.2; only decoder_head.type linear reads it, and .*type is m2f: remove"),
    (["decoder_head.type=linear", "decoder_head.hidden_dim=64"], "hidden_dim is 64; only decoder_head.type m2f reads"),
    (["decoder_head.num_queries=8", "decoder_head.type=linear", "decoder_head.num_queries=9"],
     "num_queries is 9; only decoder_head.type m2f, eomt or pmt reads it"),
])  # fmt: skip
def test_a_setting_of_another_head_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=f"command line: decoder_head.{message}"):
        load_run_config(None, overrides)


def test_choosing_another_head_drops_what_was_set_for_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "m2f.yaml"
    path.write_text("decoder_head: {type: m2f, hidden_dim: 64, num_queries: 7}\n")
    linear = load_run_config(path, ["decoder_head.type=linear", "decoder_head.dropout=0.2"])
    assert linear.decoder_head == DecoderHeadConfig(type="linear", dropout=0.2)
    assert load_run_config(path, ["decoder_head.type=eomt"]).decoder_head.num_queries == 7, "EoMT reads that too"
    both = tmp_path / "vits.yaml"
    both.write_text("decoder_head: {hidden_dim: 96, num_blocks: 2}\n")
    assert load_run_config([path, both], []).decoder_head.hidden_dim == 96, "a file for several heads"
    assert load_run_config([path, both], ["decoder_head.type=eomt"]).decoder_head.num_blocks == 2
    saved = tmp_path / "config.yaml"
    saved.write_text(config_to_yaml(linear))
    assert load_run_config(saved, []) == linear, "it names all settings; those of other heads are the defaults"


def test_a_stored_configuration_may_hold_settings_that_nothing_read() -> None:
    """Versions before this rule stored such settings."""
    values = config_to_dict(load_run_config(None, ["decoder_head.type=linear"]))
    values["decoder_head"]["hidden_dim"] = 64
    assert run_config_from_dict(values).decoder_head == DecoderHeadConfig(type="linear")
