"""Recipes: the YAML files of configs/, found by name wherever MaskStream is installed.

In a checkout, `shards/configs` is a link to the top-level configs/; in a wheel it holds the files themselves.
"""

from __future__ import annotations

import argparse
import difflib
from importlib import resources
from pathlib import Path, PurePosixPath

from shards.errors import ConfigError

_SUFFIX = ".yaml"


def recipe_folder() -> Path:
    """The folder that holds the recipes; nothing else knows its location."""
    return Path(str(resources.files("shards"))) / "configs"


def recipe_names() -> list[str]:
    """`demo`, `backbones/vitb16` and so on, as passed to `--config`."""
    folder = recipe_folder()
    found = [path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob(f"*{_SUFFIX}")]
    return sorted(found, key=lambda name: (name.count("/"), name))


def recipe_path(name: str) -> Path:
    """The file of a recipe. Raises ConfigError naming the closest match."""
    wanted = _plain(name)
    if wanted not in recipe_names():
        raise ConfigError(f"there is no recipe {name!r}; {_hint(wanted)}")
    return recipe_folder() / f"{wanted}{_SUFFIX}"


def file_or_recipe(given: str) -> str:
    """Resolve a `--config` argument: an existing file, or else a recipe by name or by its path in a checkout.

    Raises ConfigError when it is neither.
    """
    if Path(given).exists():
        return given
    if _plain(given) not in recipe_names():
        raise ConfigError(f"configuration file {given} does not exist, and no recipe has that name; "
                          f"{_hint(_plain(given))}")
    return str(recipe_path(given))


def _hint(wanted: str) -> str:
    names = recipe_names()
    near = difflib.get_close_matches(wanted, names, n=1)
    return f"{f'did you mean {near[0]!r}? ' if near else ''}legal: {', '.join(names)}"


def _plain(name: str) -> str:
    """`demo` for demo, demo.yaml or configs/demo.yaml."""
    return str(PurePosixPath(name)).removeprefix("configs/").removesuffix(_SUFFIX)


def main() -> int:
    parser = argparse.ArgumentParser(description="List the recipes that --config accepts by name, or print one.")
    parser.add_argument("name", nargs="?", help="recipe to print, e.g. demo > my.yaml")
    arguments = parser.parse_args()
    if arguments.name is not None:
        print(recipe_path(arguments.name).read_text(encoding="utf-8"), end="")
        return 0
    names = recipe_names()
    for name in names:
        with (recipe_folder() / f"{name}{_SUFFIX}").open(encoding="utf-8") as file:
            print(f"{name:{max(map(len, names))}}  {file.readline().removeprefix('#').strip()}")
    return 0
