"""Download a dataset's published file: resumable, and checked against its published size and checksum.

example: python preprocess/download.py ade20k --output data

After an interruption, the same command continues where it stopped. The file is not unpacked: make_shards.py reads it
as it is.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

try:
    from preprocess.fetch import fetch
    from preprocess.published import PUBLISHED, PublishedFile, published_file
    from shards.cli.command_line import run_entry_point
    from shards.files.storage import local_path
    from shards.shown_text import masked_value, shown
except ImportError as error:
    raise SystemExit(f"error: {error}; is MaskStream installed (pip install -e .), or does another package named "
                     "shards or preprocess shadow it?") from None


def main() -> int:
    arguments = _parse()
    file = published_file(arguments.dataset)
    folder = local_path(arguments.output, "--output")
    print(_notice(file, folder, file.url if arguments.url is None else arguments.url), flush=True)
    is_new = fetch(file, folder, arguments.url)
    path = folder / file.name
    print(shown(f"{path}: {'downloaded' if is_new else 'already there'}; size and {file.checksum.partition(':')[0]} "
                "are as published"))
    print(shown(f"next:  python preprocess/make_shards.py --dataset {file.layout} --root {shlex.quote(str(path))} "
                f"--output shards-{arguments.dataset}"))
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog="datasets:\n" + "\n".join(map(_line, PUBLISHED)))
    parser.add_argument("dataset", help=f"which one: {', '.join(PUBLISHED)}")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write to; created if needed")
    parser.add_argument("--url", help="get the same file from here: https://, s3://, gs:// or az://; the checksum is "
                        "compared all the same")
    return parser.parse_args()


def _line(name: str) -> str:
    file = PUBLISHED[name]
    return f"  {name}  {file.title}; {file.size / 1e6:.0f} MB\n    from {file.url}\n    {file.licence}\n    {file.home}"


def _notice(file: PublishedFile, folder: Path, url: str) -> str:
    lines = (file.title, f"from      {masked_value(url)}", f"to        {folder / file.name} ({file.size / 1e6:.0f} MB)",
             f"licence   {file.licence}", f"terms     {file.home}")
    return "\n".join(map(shown, lines))


if __name__ == "__main__":
    run_entry_point(main)
