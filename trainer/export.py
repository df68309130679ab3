"""Export a trained model for use elsewhere: a self-contained directory, Meta's files, a torch.export program, ONNX.

example: python trainer/export.py --checkpoint runs/ade20k-m2f/checkpoints/best.pt --output exported
    exported/model.safetensors, config.json   the whole model, ViT included, with settings and classes; load it with
                                              trainer.pretrained.load_pretrained, trainer/predict.py or trainer/eval.py
    exported/meta/head.pth, backbone.pth      Meta's layouts: adapter and head as in the released file, and the ViT
    exported/program.pt2                      torch.export program from image to class scores; runs without MaskStream;
                                              height and width: multiples of 32, at least 64
    exported/model.onnx (--formats onnx)      the same for onnxruntime and TensorRT, for images of any size; needs
                                              pip install 'maskstream[onnx]'
"""

from __future__ import annotations

import argparse
from pathlib import Path

try:
    from shards.cli.command_line import run_entry_point
    from shards.errors import ConfigError
    from trainer.model_options import add_checkpoint_options, open_pretrained
except ImportError as error:
    raise SystemExit(f"error: {error}; is MaskStream installed (pip install -e .), or does another package named "
                     "shards or trainer shadow it?") from None

FORMATS = ("directory", "meta", "program", "onnx")
DEFAULT_FORMATS = FORMATS[:3]  # those that need no further library


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_checkpoint_options(parser)
    parser.add_argument("--output", required=True, help="folder to write to; must be new or empty")
    parser.add_argument("--formats", "--format", nargs="+", choices=FORMATS, default=DEFAULT_FORMATS, metavar="FORMAT",
                        help=f"what to write: {', '.join(FORMATS)} (default: {' '.join(DEFAULT_FORMATS)})")
    arguments = parser.parse_args()
    output = Path(arguments.output)
    if output.is_dir() and any(output.iterdir()):
        raise ConfigError(f"--output {output} is not empty; choose a new folder")
    return _export(arguments, output)


def _export(arguments: argparse.Namespace, output: Path) -> int:
    from tqdm import tqdm

    from trainer.exporting.directory import write_directory
    from trainer.exporting.meta import write_meta_files
    from trainer.exporting.onnx_model import check_installed, write_onnx
    from trainer.exporting.program import write_program

    writers = {"directory": write_directory, "meta": write_meta_files, "program": write_program, "onnx": write_onnx}
    if "onnx" in arguments.formats:
        check_installed()
    arguments.overrides = ["device=cpu", *arguments.overrides]
    pretrained = open_pretrained(arguments)
    for name in tqdm(dict.fromkeys(arguments.formats), desc="exporting", unit="format", disable=None):
        for path in writers[name](pretrained, output):
            tqdm.write(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    run_entry_point(main)
