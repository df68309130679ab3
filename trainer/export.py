"""Export a trained model for use elsewhere: a self-contained directory, Meta's files, a torch.export program, ONNX.

example: python trainer/export.py --checkpoint runs/ade20k-m2f/checkpoints/best.pt --output exported
    exported/model.safetensors, config.json   the whole model, ViT included, with settings and classes; load it with
                                              trainer.pretrained.load_pretrained, trainer/predict.py or trainer/eval.py
    exported/meta/head.pth, backbone.pth      Meta's layouts: adapter and head as in the released file, and the ViT
    exported/program.pt2                      torch.export program from image to class scores; runs without MaskStream;
                                              height and width: multiples of 32, at least 64
    exported/model.onnx (--formats onnx)      the same for onnxruntime and TensorRT, for images of any size; needs
                                              pip install 'maskstream[onnx]'
with --push-to-hub ORG/NAME the folder is also uploaded to the Hugging Face hub, with a model card, from where
load_pretrained("ORG/NAME") loads it
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

try:
    from shards.cli.command_line import run_entry_point
    from shards.errors import ConfigError
    from shards.files.storage import output_folder
    from trainer.model_options import add_checkpoint_options, open_pretrained
except ImportError as error:
    raise SystemExit(f"error: {error}; is MaskStream installed (pip install -e .), or does another package named "
                     "shards or trainer shadow it?") from None

if TYPE_CHECKING:
    from trainer.exporting.hub_upload import Publication

FORMATS = ("directory", "meta", "program", "onnx")
DEFAULT_FORMATS = FORMATS[:3]  # those that need no further library
PUBLISHED_FORMATS = FORMATS[:1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_checkpoint_options(parser)
    parser.add_argument("--output", required=True, help="folder to write to; must be new or empty")
    parser.add_argument("--formats", "--format", nargs="+", choices=FORMATS, metavar="FORMAT",
                        help=f"what to write: {', '.join(FORMATS)} (default: {' '.join(DEFAULT_FORMATS)}; with "
                        f"--push-to-hub: {' '.join(PUBLISHED_FORMATS)})")
    _add_hub_options(parser)
    arguments = parser.parse_args()
    output = output_folder(arguments.output, "--output")
    if output.is_dir() and any(output.iterdir()):
        raise ConfigError(f"--output {output} is not empty; choose a new folder")
    default = PUBLISHED_FORMATS if arguments.push_to_hub else DEFAULT_FORMATS
    arguments.formats = tuple(dict.fromkeys(arguments.formats or default))
    return _export(arguments, output, _publication(arguments))


def _add_hub_options(parser: argparse.ArgumentParser) -> None:
    hub = parser.add_argument_group("Hugging Face hub")
    hub.add_argument("--push-to-hub", metavar="ORG/NAME", help="upload --output to this repository, with a model card; "
                     "log in with `hf auth login` first")
    hub.add_argument("--dry-run", action="store_true", help="write everything, the card too, but upload nothing")
    hub.add_argument("--public", action="store_true", help="make a new repository public (default: private)")
    hub.add_argument("--license", metavar="ID", help="licence in the card, e.g. apache-2.0 (default: left to fill in)")
    hub.add_argument("--dataset", metavar="ID", help="the training data's id on the hub, for the card (default: only "
                     "the shard set's name)")
    hub.add_argument("--include-backbone", action="store_true", help="also upload the weights of a DINOv3 ViT, which "
                     "come under a licence of their own (default: name the ViT, from whose repository loading gets it)")


def _publication(arguments: argparse.Namespace) -> Publication | None:
    options = ("dry_run", "public", "license", "dataset", "include_backbone")
    if arguments.push_to_hub is None:
        if given := [name for name in options if getattr(arguments, name)]:
            raise ConfigError(f"--{given[0].replace('_', '-')} is given, legal only with --push-to-hub ORG/NAME; give "
                              "both or neither")
        return None
    from trainer.exporting.hub_upload import Publication

    return Publication(repo_id=arguments.push_to_hub, formats=arguments.formats,
                       **{name: getattr(arguments, name) for name in options[1:]})


def _export(arguments: argparse.Namespace, output: Path, publication: Publication | None) -> int:
    from tqdm import tqdm

    from trainer.exporting.directory import write_directory
    from trainer.exporting.hub_upload import backbone_to_name, check_access, describe, notes, upload, write_card
    from trainer.exporting.meta import write_meta_files
    from trainer.exporting.onnx_model import check_installed, write_onnx
    from trainer.exporting.program import write_program

    writers = {"meta": write_meta_files, "program": write_program, "onnx": write_onnx}
    if "onnx" in arguments.formats:
        check_installed()
    if publication is not None and not arguments.dry_run:
        check_access(publication)
    arguments.overrides = ["device=cpu", *arguments.overrides]
    pretrained = open_pretrained(arguments, for_export=True)
    named = None if publication is None else backbone_to_name(pretrained, publication)
    for name in tqdm(arguments.formats, desc="exporting", unit="format", disable=None):
        for path in (write_directory(pretrained, output, backbone_source=named) if name == "directory"
                     else writers[name](pretrained, output)):
            tqdm.write(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    if publication is not None:
        write_card(pretrained, output, publication, Path(arguments.checkpoint), named)
        for line in notes(pretrained, named):
            print(line)
        print(describe(output, publication) if arguments.dry_run else upload(output, publication))
    return 0


if __name__ == "__main__":
    run_entry_point(main)
