"""What all entry points share: `--config` + `key=value` parsing, complete `--help`, one-line errors."""

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
        epilog="settings (in the YAML file, or as key=value), with their values where neither says:\n"
        + "\n".join(describe_config(schema)),
    )
    parser.add_argument("--config", action="append", metavar="FILE", dest="configs",
                        help="YAML file of settings, or the name of a recipe, which `maskstream recipes` lists "
                        f"(default: {default_recipe}); given again, a file is laid over the ones before")
    parser.set_defaults(default_recipe=default_recipe)
    return parser


def config_files(arguments: argparse.Namespace) -> list[str]:
    """The files that `--config` names, or the default one."""
    if not arguments.configs:
        return [str(recipe_path(arguments.default_recipe))]
    return [file_or_recipe(given) for given in arguments.configs]


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """The trailing `key=value` arguments."""
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the YAML file")


def run_entry_point(main: Callable[[], int | None]) -> None:
    """Run `main` and exit: 0, its return value, one line and the error's code (2: bad input), 130 on Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what the terminal's encoding lacks is escaped, never an error
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _call(main)
    except MaskStreamError as error:
        code = _complain(str(error), error.exit_code, error.label)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output (head, less) went away: not an error
        _drop_output()
        code = 0
    except ModuleNotFoundError as error:  # torch, say, which comes with the extra
        code = _complain(f"{error}; training, evaluation, prediction and export need: pip install 'maskstream[train]'")
    except OSError as error:  # a folder that cannot be written, a full disk
        code = _complain(f"{error.filename or type(error).__name__}: {error.strerror or error}")
        if error.filename == _OUTPUT:
            _drop_output()
    sys.exit(code)


def _call(main: Callable[[], int | None]) -> int | str | None:
    """What `main` returns, or argparse exits with, once all that it printed has gone out."""
    try:
        code: int | str | None = main()
    except SystemExit as left:
        code = left.code
    with naming(_OUTPUT):
        if sys.stdout is not None:
            sys.stdout.flush()
    return code


def _drop_output() -> None:
    """What is still buffered cannot be written, and Python would try again at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(message: str, code: int = EXIT_BAD_INPUT, label: str = "error") -> int:
    print(f"{label}: {shown(' '.join(message.split()))}", file=sys.stderr)
    return code
