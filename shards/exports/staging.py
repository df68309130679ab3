"""Make an export in a folder beside its destination, and give it its name when it is complete."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from shards.errors import ConfigError
from shards.files.atomic import naming, sync_folder
from shards.files.locks import own_folder


@contextlib.contextmanager
def staged_folder(output: Path) -> Iterator[Path]:
    """A folder to write to, which becomes `output` at the end, by one rename; after an error nothing is left.

    `output` must not exist or be empty. A killed export leaves `.NAME.exporting` beside it, which the next export to
    `output` removes. Raises ConfigError when `output` holds files.
    """
    _check_empty(output)
    output = Path(os.path.abspath(output))  # noqa: PTH100 - "." has no name; links stay as they are
    beside = output.with_name(f".{output.name}.exporting")
    try:
        with own_folder(beside) as own:
            staging = own / "export"
            staging.mkdir()
            yield staging
            os.sync()  # at once, rather than file by file: what has the name must have the content
            _check_empty(output)
            with naming(output):
                staging.replace(output)  # onto an empty folder, or none
    finally:
        with contextlib.suppress(OSError):  # not empty while another process exports to the same folder
            beside.rmdir()
    sync_folder(output.parent)


def _check_empty(output: Path) -> None:
    with naming(output):
        if output.is_symlink() or (output.exists() and not output.is_dir()):
            raise ConfigError(f"--output {output} is a file or a link, legal: a new or an empty folder")
        found = next(output.iterdir(), None) if output.is_dir() else None
    if found is not None:
        raise ConfigError(f"--output {output} is not empty, it has {found.name!r}, legal: a new or an empty folder")
