"""Shared by all entry points: `--config` and `key=value` parsing, full `--help`, one-line errors."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable
from typing import Any

from shards.cli.recipes import file_or_recipe, recipe_path
from shards.cli.settings import describe_config
from shards.errors import MaskStreamError
from shards.files.atomic import naming
from shards.shown_text import shown

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
_OUTPUT = "standard output"


def config_parser(description: str, schema: type[Any], default_recipe: str) -> argparse.ArgumentParser:
    """A parser with `--config` (default: a recipe) whose `--help` lists every setting of `schema`."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="settings (in the YAML file, or as key=value) and their defaults:\n"
        + "\n".join(describe_config(schema)),
    )
    parser.add_argument("--config", action="append", metavar="FILE", dest="configs",
                        help="YAML file of settings, or the name of a recipe (see `maskstream recipes`; default: "
                        f"{default_recipe}); may be repeated, later files override earlier ones")
    parser.set_defaults(default_recipe=default_recipe)
    return parser


def config_files(arguments: argparse.Namespace) -> list[str]:
    """The files given with `--config`, or else the default recipe."""
    if not arguments.configs:
        return [str(recipe_path(arguments.default_recipe))]
    return [file_or_recipe(given) for given in arguments.configs]


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add the trailing `key=value` arguments."""
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that override the YAML file")


def run_entry_point(main: Callable[[], int | None]) -> None:
    """Run `main` and exit with its return value or 0; on an error with one line and its exit code (2: bad input); on
    Ctrl-C with 130."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # escape characters that the terminal's encoding lacks
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _call(main)
    except MaskStreamError as error:
        code = _complain(str(error), error.exit_code, error.label)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output (head, less) has closed it: not an error
        _drop_output()
        code = 0
    except ModuleNotFoundError as error:  # e.g. torch, which the [train] extra installs
        code = _complain(f"{error}; training, evaluation, prediction and export need: pip install 'maskstream[train]'")
    except OSError as error:  # an unwritable folder, a full disk
        code = _complain(f"{error.filename or type(error).__name__}: {error.strerror or error}")
        if error.filename == _OUTPUT:
            _drop_output()
    sys.exit(code)


def _call(main: Callable[[], int | None]) -> int | str | None:
    """The return value of `main`, or argparse's exit code, after flushing stdout."""
    try:
        code: int | str | None = main()
    except SystemExit as left:
        code = left.code
    with naming(_OUTPUT):
        if sys.stdout is not None:
            sys.stdout.flush()
    return code


def _drop_output() -> None:
    """Discard buffered output that cannot be written: Python would try to flush it again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(message: str, code: int = EXIT_BAD_INPUT, label: str = "error") -> int:
    print(f"{label}: {shown(' '.join(message.split()))}", file=sys.stderr)
    return code
