"""Recipes by name: which there are, what --config takes, what a wrong name says."""

from __future__ import annotations

from pathlib import Path

import pytest

from preprocess import make_shards
from shards.cli.command_line import config_files, config_parser
from shards.cli.recipes import file_or_recipe, recipe_folder, recipe_names, recipe_path
from shards.errors import ConfigError
from tests.conftest import REPOSITORY
from trainer import eval as evaluation
from trainer import train as training
from trainer.config import RunConfig


def test_the_recipes_are_the_files_of_configs() -> None:
    assert recipe_folder().resolve() == REPOSITORY / "configs"
    found = {path.relative_to(REPOSITORY / "configs").with_suffix("").as_posix()
             for path in (REPOSITORY / "configs").rglob("*.yaml")}
    assert set(recipe_names()) == found and recipe_names().index("demo") < recipe_names().index("backbones/vitb16")


@pytest.mark.parametrize("program", [make_shards, training, evaluation])
def test_the_default_of_each_program_is_a_recipe(program: object) -> None:
    name = vars(program)["DEFAULT_RECIPE"]
    parser = config_parser("text", RunConfig, name)
    assert f"default:{name})" in "".join(parser.format_help().split())
    assert config_files(parser.parse_args([])) == [str(recipe_folder() / f"{name}.yaml")]


@pytest.mark.parametrize("given", ["demo", "demo.yaml", "configs/demo.yaml", "./configs/demo.yaml"])
def test_a_recipe_is_named_by_its_name_or_by_its_path_in_a_checkout(given: str, tmp_path: Path,
                                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert file_or_recipe(given) == str(recipe_path("demo"))
    Path(given).parent.mkdir(exist_ok=True)
    Path(given).touch()
    assert file_or_recipe(given) == given, "a file of the user's own comes first"


@pytest.mark.parametrize("given", ["dem", "configs/dem.yaml", "../demo.yaml", "/demo", "backbones", "a\0b"])
def test_what_is_neither_file_nor_recipe_is_named(given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"exist, and no recipe has that name; (did you mean '.*'\? )?legal: "):
        file_or_recipe(given)
    with pytest.raises(ConfigError, match=r"there is no recipe .*legal: ade20k-eomt-shards, "):
        recipe_path(given)
