"""Segment images with a trained model: class-id PNGs and overlays with legends; optionally confidences and more.
Images are rotated as their EXIF orientation says before prediction, so results match what an image viewer shows.

example: python trainer/predict.py --checkpoint runs/ade20k-m2f/checkpoints/best.pt --output out photo.jpg more-photos/
IMAGE is a file, a folder (with its sub-folders), a quoted glob ("scans/**/*.png"), a video, or a URL of an image
(s3://, gs://, az://, https://) or folder (not https://). Sub-folders are kept, and what is done already is skipped.
GeoTIFFs, and TIFFs too large for memory, are read in parts, and give a TIFF of class ids. Scores take at most
eval.memory_gb (default: 4): --set eval.memory_gb=1. --checkpoint also takes a directory written by trainer/export.py. A
file of another program (Meta's Mask2Former or linear head, EoMT from Hugging Face) contains only weights: add --config
and --classes.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

try:
    from shards.cli.command_line import run_entry_point
    from shards.errors import ConfigError, MaskStreamError, RunError
    from shards.files.storage import output_folder
    from shards.shown_text import shown
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
    parser.add_argument("--output", required=True, help="folder for <name>.png (class ids), "
                        "<name>-overlay.png and what else --save says")
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="image, folder, glob, video or URL")
    parser.add_argument("--list", action="append", default=[], type=Path, metavar="FILE", dest="lists",
                        help="text file with an IMAGE per line (repeatable)")
    parser.add_argument("--save", nargs="+", choices=KINDS, default=["ids", "overlay"], metavar="KIND",
                        help=f"what to write, one or more of: {', '.join(KINDS)} (default: ids overlay); give images "
                        "before this option")
    parser.add_argument("--label-offset", type=int, choices=(0, 1), default=0, help="added to the ids in the PNGs; 1 "
                        "gives the files that ADE20K's test server takes (default: 0)")
    parser.add_argument("--overwrite", action="store_true", help="predict again what is done already, and replace "
                        "files that are there")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="where to predict; auto: on a GPU, if there "
                        "is one (default: as in training)")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp16", "fp32"), help="of the network's numbers; "
                        "auto: bf16 on GPUs that have it (default: as in training)")
    arguments = parser.parse_intermixed_args()
    for name, value in (("device", arguments.device), ("train.precision", arguments.precision)):
        if value is not None:
            arguments.overrides.append(f"{name}={value}")
    arguments.output = output_folder(arguments.output, "--output")
    return _predict(arguments)


def _predict(arguments: argparse.Namespace) -> int:
    """Predict all files. Those that fail are reported and skipped, and make the exit code nonzero."""
    from trainer.predicting.inputs import sources_of
    from trainer.predicting.outputs import Outputs, claim_folder
    from trainer.pretrained import model_identity

    check_not_settings(arguments.images)
    sources = sources_of(arguments.images, arguments.lists, arguments.output)
    outputs = Outputs(folder=arguments.output, kinds=dict.fromkeys(arguments.save), label_offset=arguments.label_offset)
    outputs.check(sources, arguments.overwrite)
    pretrained = open_pretrained(arguments)
    identity = {**model_identity(pretrained), "label_offset": arguments.label_offset}
    since = claim_folder(arguments.output, identity, pretrained.classes, arguments.overwrite)
    waiting = [source for source in sources if arguments.overwrite or not outputs.is_done(source, since)]
    failed = 0
    with tqdm(total=len(sources), initial=len(sources) - len(waiting), desc="predicting", unit="img",
              disable=None) as bar:
        for source, error in _predict_each(pretrained, waiting, outputs):
            bar.update()
            if error is None:
                continue
            if len(sources) == 1:
                raise error
            failed += 1
            reason = (isinstance(error, OSError) and error.strerror) or str(error)
            line, name = shown(" ".join(reason.split())), shown(source.shown)
            tqdm.write(f"error: {line if name in line else f'{name}: {line}'}", file=sys.stderr)
    skipped = f", {len(sources) - len(waiting)} were there already" if len(waiting) < len(sources) else ""
    print(f"{len(waiting) - failed} predictions written to {arguments.output}{skipped}")
    if failed:
        raise RunError(f"{failed} of {len(sources)} images could not be predicted; see the errors above")
    return 0


def check_not_settings(images: list[str]) -> None:
    """Raise ConfigError for a setting among the images."""
    for image in images:
        if re.match(r"[a-z_]+\.[a-z_.]+=", image) and not Path(image).exists():
            raise ConfigError(f"image {image} does not exist; to change a setting, use --set {image}")


def _predict_each(pretrained: Pretrained, sources: list[Source],
                  outputs: Outputs) -> Iterator[tuple[Source, Exception | None]]:
    """Each file once, with its error if it has one; images in groups of `eval.window_batch`, or of fewer if their
    pixels take a good part of `eval.memory_gb`."""
    from trainer.predicting.inputs import decoded_ahead

    settings = pretrained.config.eval
    group: list[tuple[Source, Any]] = []
    for source, decoded in decoded_ahead(sources):
        try:
            pixels = _predict_in_parts(pretrained, source, outputs) if decoded is None else decoded.result()
        except (MaskStreamError, OSError) as error:
            yield source, error
            continue
        if pixels is None:
            yield source, None
            continue
        group.append((source, pixels))
        if len(group) == settings.window_batch or sum(
                pixels.nbytes for _, pixels in group) > settings.memory_gb * 1e9 / 8:
            yield from _predict_group(pretrained, group, outputs)
            group = []
    yield from _predict_group(pretrained, group, outputs)


def _predict_in_parts(pretrained: Pretrained, source: Source, outputs: Outputs) -> Any:
    """Predict a video, or a TIFF that is to be read in parts; of any other TIFF return the pixels uint8 [H, W, 3]."""
    from shards.files.plain_file import LARGEST_PICTURE, read_plain
    from trainer.predicting.inputs import decode_input
    from trainer.predicting.rasters import open_raster, predict_raster
    from trainer.predicting.video import predict_video

    with source.local() as path:
        if source.is_video:
            predict_video(pretrained, path, outputs.paths(source)["overlay"], source.shown)
            return None
        raster = open_raster(path, source.shown, pretrained.device)
        if raster is None:
            return decode_input(read_plain(path, LARGEST_PICTURE), source.shown)
        with raster:
            predict_raster(pretrained, raster, source.shown, outputs.raster_paths(source), outputs.label_offset)
            return None


def _predict_group(pretrained: Pretrained, group: list[tuple[Source, Any]],
                   outputs: Outputs) -> Iterator[tuple[Source, Exception | None]]:
    """Images that go through the network together; if that fails, those that are left one by one, as any of them may be
    the reason."""
    predictions = pretrained.predict_all([pixels for _, pixels in group], outputs.extra)
    for number, (source, _) in enumerate(group):
        try:
            prediction = next(predictions)
        except MaskStreamError as error:
            if len(group) == 1:
                yield source, error
                return
            for member in group[number:]:
                yield from _predict_group(pretrained, [member], outputs)
            return
        outputs.write(source, prediction)
        yield source, None


if __name__ == "__main__":
    run_entry_point(main)
