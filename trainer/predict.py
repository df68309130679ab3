"""Segment images with a trained model: class-id PNGs and overlays with legends; optionally confidences and more.
Images are rotated as their EXIF orientation says before prediction, so results match what an image viewer shows.

example: python trainer/predict.py --checkpoint runs/ade20k-m2f/checkpoints/best.pt --output out photo.jpg more-photos/
IMAGE is a file, a folder (with its sub-folders), a quoted glob ("scans/**/*.png"), a video, or a URL of an image or a
folder (s3://, gs://, az://, https://). Sub-folders are kept, and what is done already is skipped. GeoTIFFs, and TIFFs
too large for memory, are read in parts, and give a TIFF of class ids. --checkpoint also takes a directory written by
trainer/export.py. A file of another program (Meta's Mask2Former or linear head, EoMT from Hugging Face) contains only
weights: add --config and --classes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

try:
    from shards.cli.command_line import run_entry_point
    from shards.errors import ConfigError, MaskStreamError, RunError
    from trainer.model_options import add_checkpoint_options, open_pretrained
except ImportError as error:
    raise SystemExit(f"error: {error}; is MaskStream installed (pip install -e .), or does another package named "
                     "shards or trainer shadow it?") from None

if TYPE_CHECKING:
    from trainer.predicting.inputs import Source
    from trainer.predicting.outputs import Outputs
    from trainer.pretrained import Pretrained

KINDS = ("ids", "overlay", "confidence", "probabilities", "rle")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_checkpoint_options(parser)
    parser.add_argument("--output", required=True, type=Path, help="folder for <name>.png (class ids), "
                        "<name>-overlay.png and what else --save says")
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="image, folder, glob, video or URL")
    parser.add_argument("--list", action="append", default=[], type=Path, metavar="FILE", dest="lists",
                        help="text file with one of these per line (repeatable)")
    parser.add_argument("--save", nargs="+", choices=KINDS, default=["ids", "overlay"], metavar="KIND",
                        help=f"what to write: {', '.join(KINDS)} (default: ids overlay)")
    parser.add_argument("--label-offset", type=int, choices=(0, 1), default=0, help="added to the ids in the PNGs; 1 "
                        "gives the files that ADE20K's test server takes (default: 0)")
    parser.add_argument("--overwrite", action="store_true", help="predict again what is done already")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="as --set device=...")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), help="as --set train.precision=...")
    arguments = parser.parse_intermixed_args()
    for name, value in (("device", arguments.device), ("train.precision", arguments.precision)):
        if value is not None:
            arguments.overrides.append(f"{name}={value}")
    return _predict(arguments)


def _predict(arguments: argparse.Namespace) -> int:
    """Predict all files. Those that fail are reported and skipped, and make the exit code nonzero."""
    from trainer.predicting.inputs import sources_of
    from trainer.predicting.outputs import Outputs, claim_folder
    from trainer.pretrained import model_identity

    check_not_settings(arguments.images)
    sources = sources_of(arguments.images, arguments.lists)
    outputs = Outputs(folder=arguments.output, kinds=dict.fromkeys(arguments.save), label_offset=arguments.label_offset)
    outputs.check(sources)
    pretrained = open_pretrained(arguments)
    identity = {**model_identity(pretrained), "label_offset": arguments.label_offset}
    claim_folder(arguments.output, identity, pretrained.classes, arguments.overwrite)
    waiting = [source for source in sources if arguments.overwrite or not outputs.is_done(source)]
    failures: list[Exception] = []
    with tqdm(total=len(sources), initial=len(sources) - len(waiting), desc="predicting", unit="img",
              disable=None) as bar:
        for source, error in _predict_each(pretrained, waiting, outputs):
            bar.update()
            if error is not None:
                failures.append(error)
                reason = " ".join(str(error).removeprefix(f"{source.shown}: ").split())
                tqdm.write(f"error: {source.shown}: {reason}", file=sys.stderr)
    if failures and len(failures) == len(sources):
        raise failures[0]
    skipped = f", {len(sources) - len(waiting)} were there already" if len(waiting) < len(sources) else ""
    print(f"{len(waiting) - len(failures)} predictions written to {arguments.output}{skipped}")
    if failures:
        raise RunError(f"{len(failures)} of {len(sources)} images could not be predicted; see the errors above")
    return 0


def check_not_settings(images: list[str]) -> None:
    """Raise ConfigError for a setting among the images."""
    for image in images:
        if "=" in image and "://" not in image and not Path(image).exists():
            raise ConfigError(f"image {image} does not exist; to change a setting, use --set {image}")


def _predict_each(pretrained: Pretrained, sources: list[Source],
                  outputs: Outputs) -> Iterator[tuple[Source, Exception | None]]:
    """Each file once, with its error if it has one; images in groups of `eval.window_batch`."""
    from trainer.predicting.inputs import decode_input
    from trainer.predicting.rasters import open_raster, predict_raster
    from trainer.predicting.video import predict_video

    def alone(source: Source) -> bool:
        """Predict a file that is not an image in memory; False if it is one."""
        paths = outputs.paths(source)
        if source.is_video:
            with _local(source) as path:
                predict_video(pretrained, path, paths["overlay"])
            return True
        raster = None if source.path is None else open_raster(source.path, pretrained.device)
        if raster is None:
            return False
        with raster:
            ids = paths.get("ids")
            predict_raster(pretrained, raster, None if ids is None else ids.with_suffix(".tif"), paths.get("overlay"))
        return True

    group: list[tuple[Source, Any]] = []
    for source in sources:
        try:
            if alone(source):
                yield source, None
                continue
            group.append((source, decode_input(source.read(), source.shown)))
        except (MaskStreamError, OSError) as error:
            yield source, error
        if len(group) == pretrained.config.eval.window_batch:
            yield from _predict_group(pretrained, group, outputs)
            group = []
    yield from _predict_group(pretrained, group, outputs)


@contextmanager
def _local(source: Source) -> Iterator[Path]:
    """A source as a local file: a video is read in any order."""
    if source.path is not None:
        yield source.path
        return
    with tempfile.NamedTemporaryFile(suffix=source.name.suffix) as file:
        file.write(source.read())
        file.flush()
        yield Path(file.name)


def _predict_group(pretrained: Pretrained, group: list[tuple[Source, Any]],
                   outputs: Outputs) -> Iterator[tuple[Source, Exception | None]]:
    """Images that go through the network together. After one that fails, the rest start again without it."""
    while group:
        finished = 0
        try:
            for source, prediction in zip([source for source, _ in group],
                                          pretrained.predict_all([pixels for _, pixels in group], outputs.extra),
                                          strict=True):
                outputs.write(source, prediction)
                finished += 1
                yield source, None
            return
        except (MaskStreamError, OSError) as error:
            yield group[finished][0], error
        group = group[finished + 1 :]


if __name__ == "__main__":
    run_entry_point(main)
