"""Evaluate a checkpoint on the validation split: mIoU, with sliding windows and test-time augmentation as configured.

example: python trainer/eval.py --config runs/ade20k-m2f/config.yaml --checkpoint runs/ade20k-m2f/checkpoints/best.pt
The network is the checkpoint's own; `data`, `eval` and `device` come from the configuration, and so does
`backbone.source`, as the ViT may have moved since. A file of another program, such as Meta's Mask2Former or linear
head, contains only weights: then all settings come from the configuration, and the classes from the shard set.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

try:
    from shards.cli.command_line import add_overrides, config_files, config_parser, run_entry_point
    from shards.errors import ConfigError
    from shards.files.atomic import write_atomically
    from shards.files.strict_json import to_json
    from trainer.config import RunConfig, load_run_config
    from trainer.stopping import die_with_launcher
except ImportError as error:
    raise SystemExit(f"error: {error}; is MaskStream installed (pip install -e .), or does another package named "
                     "shards or trainer shadow it?") from None

DEFAULT_RECIPE = "config-ade20k-m2f-inference"


def main() -> int:
    die_with_launcher()
    parser = config_parser(str(__doc__), RunConfig, DEFAULT_RECIPE)
    parser.add_argument("--checkpoint", required=True, help="checkpoint file, e.g. <run>/checkpoints/best.pt, or "
                        "another program's head")
    parser.add_argument("--output", default=None, help="folder for metrics and pictures "
                        "(default: evaluation/ in the folder of the run or export)")
    add_overrides(parser)
    arguments = parser.parse_intermixed_args()
    config = load_run_config(config_files(arguments), arguments.overrides)
    checkpoint_path = Path(arguments.checkpoint)
    folder = checkpoint_path if checkpoint_path.is_dir() else checkpoint_path.parent.parent
    output = Path(arguments.output) if arguments.output else folder / "evaluation"
    return _evaluate(config, checkpoint_path, output)


def _evaluate(config: RunConfig, checkpoint_path: Path, output: Path) -> int:
    from shards.looking.image_scores import IMAGE_SCORES, encode_scores
    from shards.picture import save_picture
    from trainer.data.crops import open_reader
    from trainer.distributed import distributed
    from trainer.evaluation.evaluation import evaluate, format_metrics
    from trainer.models.weights import WeightsFile
    from trainer.pretrained import from_external_weights, load_pretrained
    from trainer.run.checkpoint import open_checkpoint

    if config.data.root is None:
        raise ConfigError("data.root is not set. Try for example: python trainer/eval.py "
                          f"--checkpoint {checkpoint_path} data.root=<folder of shards>")
    source = open_checkpoint(checkpoint_path)
    reader = open_reader(config.data, config.data.val_split)
    manifest = reader.manifest
    with distributed(config.device, config.train.hang_timeout) as context:
        if isinstance(source, WeightsFile) and not source.is_self_contained:
            pretrained, settings = from_external_weights(source, config, manifest.classes, context.device), config
        else:
            pretrained = load_pretrained(source, backbone_source=config.backbone.source, device=context.device)
            settings = replace(pretrained.config, data=config.data, eval=config.eval)
        if pretrained.classes != list(manifest.classes):
            raise ConfigError(f"{config.data.root} and {checkpoint_path} have different class tables "
                              f"({manifest.num_classes} and {len(pretrained.classes)} classes)")
        model = pretrained.model
        result = evaluate(model, reader, settings, context, config.eval.max_images)
        images = result.scores.gather(context)
        if context.is_main:
            print(format_metrics(result.metrics, manifest.classes))
            output.mkdir(parents=True, exist_ok=True)
            record = {**result.metrics, "step": pretrained.step, "checkpoint": str(checkpoint_path)}
            write_atomically(output / "metrics.json", to_json(record, indent=1).encode())
            write_atomically(output / IMAGE_SCORES, encode_scores(images))
            if result.panels is not None:
                save_picture(result.panels, output / "panels.png")
            print(f"metrics.json, {IMAGE_SCORES} and panels.png written to {output}")
    return 0


if __name__ == "__main__":
    run_entry_point(main)
