"""The command `maskstream`: one name for the programs of the three packages.

It is a package of its own once installed, since the names of the three are generic: where another installed package
owns one of them, this one still runs, and says so. It imports the program that is asked for and nothing else.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import importlib.util
import sys
from pathlib import Path

PACKAGES = {"shards": "recipes.py", "preprocess": "make_shards.py", "trainer": "train.py"}  # and a file to know it by
COMMANDS = {
    "make-scenes": ("preprocess.make_scenes", "draw a small labelled dataset, for trying things out"),
    "make-shards": ("preprocess.make_shards", "turn images and label PNGs into a shard set"),
    "train": ("trainer.train", "train; with several ranks: torchrun --nproc-per-node N -m trainer.train"),
    "eval": ("trainer.eval", "evaluate a checkpoint: mIoU, per class too"),
    "predict": ("trainer.predict", "predict images: class-id PNGs and overlays"),
    "export": ("trainer.export", "write a trained model to load anywhere"),
    "status": ("trainer.status", "say how a run is"),
    "shards": ("shards.__main__", "info, verify, show, audit, copy: look at a shard set, or mirror it"),
    "recipes": ("shards.cli.recipes", "list the settings files that --config takes by name, or print one"),
}
_EXIT_BAD_INPUT = 2


def main() -> None:
    """Run the command that the first argument names."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(_help())
        sys.exit(0 if len(sys.argv) > 1 else _EXIT_BAD_INPUT)
    if name == "--version":
        print(importlib.metadata.version("maskstream"))
        sys.exit(0)
    if name not in COMMANDS:
        near = difflib.get_close_matches(name.replace("_", "-").removesuffix(".py"), COMMANDS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        _fail(f"unknown command {name!r}; {hint}legal: {', '.join(COMMANDS)}")
    sys.argv[:] = [f"maskstream {name}", *arguments]
    try:
        run_entry_point = importlib.import_module("shards.cli.command_line").run_entry_point
        program = importlib.import_module(COMMANDS[name][0]).main
    except (ImportError, AttributeError, SystemExit) as error:  # programs exit where an import of theirs fails
        _fail(_why(error))
    run_entry_point(program)


def _help() -> str:
    lines = [f"  {name:{max(map(len, COMMANDS))}}  {meaning}" for name, (_, meaning) in COMMANDS.items()]
    return "\n".join(["usage: maskstream COMMAND ...", "", *lines, "", "maskstream COMMAND --help: its options"])


def _why(error: BaseException) -> str:
    """One line on a program that cannot be imported: whose package has our name, or which library is missing."""
    owners = importlib.metadata.packages_distributions()
    for package, file in PACKAGES.items():
        spec = importlib.util.find_spec(package)
        folders = list(spec.submodule_search_locations or ()) if spec else []
        others = {owner for owner in owners.get(package, ()) if owner != "maskstream"}
        if others or not any(Path(folder, file).is_file() for folder in folders):
            place = folders[0] if folders else spec.origin if spec else "nowhere"
            owner = f", which {' and '.join(sorted(others))} installed" if others else ""
            return (f"the package {package!r} that Python finds ({place}{owner}) is not, or not only, MaskStream's "
                    f"({error}); install MaskStream into an environment of its own, and look for that name in the "
                    "working directory and on PYTHONPATH")
    return f"{error}; training, evaluation, prediction and export need: pip install 'maskstream[train]'"


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(_EXIT_BAD_INPUT)
