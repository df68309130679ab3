"""The `maskstream` command: one name for the programs of all three packages.

It is installed as a separate package because the names of the three are generic: if another installed package shadows
one of them, this one still runs and reports it. It imports only the requested program.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import importlib.util
import sys
from pathlib import Path

# Each package with a file that only ours has.
PACKAGES = {"shards": "cli/recipes.py", "preprocess": "make_shards.py", "trainer": "train.py"}
COMMANDS = {
    "make-scenes": ("preprocess.make_scenes", "draw a small synthetic dataset with labels, for demos"),
    "download": ("preprocess.download", "download ADE20K: resumable, checked"),
    "make-shards": ("preprocess.make_shards", "turn images and label PNGs into a shard set"),
    "train": ("trainer.train", "train; with several ranks: torchrun --nproc-per-node N -m trainer.train"),
    "eval": ("trainer.eval", "evaluate a checkpoint: mIoU and per-class IoU"),
    "predict": ("trainer.predict", "segment images: class-id PNGs and overlays"),
    "app": ("trainer.app", "serve a local page to try a model on images"),
    "export": ("trainer.export", "export a trained model for use elsewhere"),
    "status": ("trainer.status", "show the state of a run"),
    "shards": ("shards.__main__", "look at a shard set, compare, check, copy or export it"),
    "recipes": ("shards.cli.recipes", "list the recipes that --config accepts by name, or print one"),
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
    except (ImportError, AttributeError, SystemExit) as error:  # programs exit when one of their imports fails
        _fail(_why(error))
    run_entry_point(program)


def _help() -> str:
    lines = [f"  {name:{max(map(len, COMMANDS))}}  {meaning}" for name, (_, meaning) in COMMANDS.items()]
    return "\n".join(["usage: maskstream COMMAND ...", "", *lines, "", "maskstream COMMAND --help shows its options"])


def _why(error: BaseException) -> str:
    """Why a program cannot be imported, in one line: which package shadows ours, or which library is missing."""
    owners = importlib.metadata.packages_distributions()
    for package, file in PACKAGES.items():
        spec = importlib.util.find_spec(package)
        folders = list(spec.submodule_search_locations or ()) if spec else []
        others = {owner for owner in owners.get(package, ()) if owner != "maskstream"}
        if others or not any(Path(folder, file).is_file() for folder in folders):
            place = folders[0] if folders else spec.origin if spec else "nowhere"
            owner = f", which {' and '.join(sorted(others))} installed" if others else ""
            return (f"the package {package!r} that Python finds ({place}{owner}) is not, or not only, MaskStream's "
                    f"({error}); install MaskStream in its own environment, and check the working directory and "
                    "PYTHONPATH for that name")
    return f"{error}; training, evaluation, prediction and export need: pip install 'maskstream[train]'"


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(_EXIT_BAD_INPUT)
