"""Train a segmentation head on a DINOv3 backbone, which is frozen by default.

example: torchrun --standalone --nproc-per-node 2 trainer/train.py --config configs/config-ade20k-m2f-training.yaml
         data.root=shards-ade20k output_dir=runs/ade20k-m2f
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

try:
    from shards.cli.command_line import add_overrides, config_files, config_parser, run_entry_point
    from shards.cli.config_file import config_to_yaml
    from shards.manifest import Manifest
    from trainer.config import RunConfig, load_run_config
    from trainer.stopping import die_with_launcher
except ImportError as error:
    raise SystemExit(f"error: {error}; is MaskStream installed (pip install -e .), or does another package named "
                     "shards or trainer shadow it?") from None

DEFAULT_RECIPE = "config-ade20k-m2f-training"


def main() -> int:
    die_with_launcher()
    parser = config_parser(str(__doc__), RunConfig, DEFAULT_RECIPE)
    parser.add_argument("--dry-run", action="store_true",
                        help="print settings, counts, one sample and the memory that training needs, then exit")
    parser.add_argument("--memory-gb", type=positive_number, metavar="GB", help="with --dry-run: a GPU's memory, to be "
                        "told the largest micro-batch for it (default: that of this machine's GPU, if there is one)")
    parser.add_argument("--gpus", type=positive_integer, metavar="N", help="with --dry-run: how many GPUs divide the "
                        "global batch and, with train.fsdp, the weights (default: as many as torchrun starts)")
    add_overrides(parser)
    arguments = parser.parse_intermixed_args()
    if not arguments.dry_run and (arguments.gpus or arguments.memory_gb):
        parser.error("--gpus and --memory-gb need --dry-run")
    config = load_run_config(config_files(arguments), arguments.overrides)
    if arguments.dry_run:
        return _dry_run(config, arguments.memory_gb, arguments.gpus or int(os.environ.get("WORLD_SIZE", "1")))

    from trainer.distributed import distributed  # torch takes seconds to import; --help need not wait
    from trainer.evaluation.evaluation import format_metrics
    from trainer.loop import train
    from trainer.run.run import run_places

    folder = run_places(config).folder  # fail here, before ranks wait for each other
    with distributed(config.device, config.train.hang_timeout) as context:
        run = train(config, context)
        if context.is_main:
            assert run.metrics is not None
            print(format_metrics(run.metrics, run.manifest.classes))
            if run.averaged is not None:
                print(f"these are the {config.eval.weights} weights (eval.weights); metrics.jsonl has both")
            if run.early_end:
                print(run.early_end)
            print(f"checkpoints, report.html, metrics.jsonl, pictures and curves.png written to {folder}")
    return 0


def _dry_run(config: RunConfig, memory_gb: float | None = None, gpus: int = 1) -> int:
    from functools import partial

    import torch

    from shards.plan import accumulation_for
    from shards.shown_text import shown
    from trainer.build import resolve_class_weights
    from trainer.data.crops import open_reader
    from trainer.data.sources import class_counts, source_lines
    from trainer.loss.class_weights import described
    from trainer.run.run import open_crops, run_places

    run_places(config)  # or an error that says what is missing
    if os.environ.get("RANK", "0") != "0":
        return 0  # under torchrun only rank 0 prints
    print(config_to_yaml(config))
    val_reader = open_reader(config.data, config.data.val_split)
    manifest = val_reader.manifest
    crops = open_crops(config, manifest)
    steps, global_batch = config.train.total_steps, config.train.global_batch_size
    micro_batches = gpus * accumulation_for(global_batch, config.train.micro_batch_size, gpus)
    readers = [source.reader for source in crops.sources]
    print(f"{shown(manifest.dataset)}: {manifest.num_classes} classes, {sum(map(len, readers))} training samples in "
          f"{sum(reader.info.shards for reader in readers)} shards, {len(val_reader)} validation samples")
    lines = source_lines(crops.sources, config.data, steps * global_batch, manifest)
    epoch = crops.sources[0].plan.epoch_size
    epochs = "" if lines else f" = {steps * global_batch / epoch:.2f} epochs of {epoch} samples"
    print(f"{steps} steps of {global_batch}{epochs}; {micro_batches} micro-batches per step, divided among the ranks")
    print("".join(f"{line}\n" for line in lines), end="")
    if (weights := resolve_class_weights(config, manifest, partial(class_counts, crops.sources))) is not None:
        print(shown(f"class weights from {described(weights, manifest)}"))
    batch = crops[0].to(torch.device("cpu"))
    names = [manifest.classes[label].name for label in batch.labels[: batch.counts[0]].tolist()]
    print(f"first sample: {shown(batch.keys[0])}, {tuple(batch.images.shape[1:])} {batch.images.dtype}, "
          f"{batch.counts[0]} masks: {', '.join(names)}")
    classes = max(sum(reader.info.class_samples) / len(reader) for reader in readers)
    _print_memory(config, manifest, classes, batch.images.shape[2:], memory_gb, gpus)
    print("dry run: nothing was trained")
    return 0


def positive_number(text: str) -> float:
    """A finite number above 0, from the command line. Raises ValueError for any other."""
    if not 0 < (number := float(text)) < math.inf:
        raise ValueError(text)
    return number


def positive_integer(text: str) -> int:
    """A number of things, at least 1, from the command line. Raises ValueError for any other."""
    if (number := int(text)) < 1:
        raise ValueError(text)
    return number


def _print_memory(config: RunConfig, manifest: Manifest, classes: float, size: Sequence[int],
                  memory_gb: float | None, gpus: int) -> None:
    """Print what training needs, with samples of twice as many classes as they have on average, so that most
    micro-batches need less."""
    import torch

    from shards.shown_text import shown
    from trainer.memory.estimate import described
    from trainer.memory.simulation import Samples

    targets = min(manifest.num_classes, math.ceil(2 * classes))
    samples = Samples(height=size[0], width=size[1], classes=manifest.num_classes, ignore_index=manifest.ignore_index,
                      targets=max(1, targets))
    if memory_gb is None and config.device != "cpu" and torch.cuda.is_available():
        memory_gb = torch.cuda.get_device_properties(0).total_memory / 1e9
    for line in described(config, samples, None if memory_gb is None else memory_gb * 1e9, gpus):
        print(shown(line))


if __name__ == "__main__":
    run_entry_point(main)
