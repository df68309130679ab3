"""What `make_shards.py --dry-run` prints: settings, counts, the label mapping on a sample of images, one crop."""

from __future__ import annotations

import numpy as np

from preprocess.blocks import plan_blocks
from preprocess.config import PreprocessConfig
from preprocess.encoding import encode_crop
from preprocess.label_mapping import LabelMapping, hex_color
from preprocess.pairs import Dataset, read_pair
from shards.cli.config_file import config_to_yaml
from shards.crops.label_runs import LabelRuns
from shards.errors import DatasetError
from shards.rle import count_values, decode_header, encode_rle
from shards.sample import read_header
from shards.shown_text import shown

SAMPLED_IMAGES = 20
_MOST_STORED = 6  # values or colours shown for a class


def print_dry_run(config: PreprocessConfig, dataset: Dataset) -> None:
    """Print it. Raises DatasetError when the first image cannot be used."""
    print(config_to_yaml(config))
    blocks = plan_blocks(config, dataset)
    for split, pairs in dataset.splits.items():
        shards = sum(len(block.shard_names) for block in blocks if block.split == split)
        kind = f"x {config.crops.per_image} crops" if split in config.crops.splits else "whole"
        print(f"{split}: {len(pairs)} images {kind} -> {shards} shards; {len(dataset.skipped[split])} unpaired files")
    print_mapping(dataset)
    _print_first(config, dataset)
    print("dry run: nothing was written")


def print_mapping(dataset: Dataset) -> None:
    """Each class, what means it, and its share of the pixels of a sample of images; then what did not fit."""
    counts, nearest, rest, problems = np.zeros(dataset.ignore_index + 1, np.int64), 0, 0, list[str]()
    pairs = [pair for split in dataset.splits.values() for pair in split]
    sample = [pairs[number] for number in np.unique(np.linspace(0, len(pairs) - 1, SAMPLED_IMAGES).astype(int))]
    for pair in sample:
        try:
            source = read_pair(dataset, pair, keeps_file=False)
        except DatasetError as error:
            problems.append(str(error))
            continue
        counts += count_values(source.label_map, dataset.ignore_index + 1)
        nearest, rest = nearest + source.nearest, rest + source.rest
    total = max(1, int(counts.sum()))
    print(f"\nlabels in {len(sample)} of {len(pairs)} images:")
    for number, info in enumerate(dataset.classes):
        print(f"  {number:5d}  {shown(info.name):24.24s} {counts[number] / total:7.2%}   "
              f"from {_stored_as(dataset.mapping, number)}")
    print(f"         {'ignored':24s} {counts[dataset.ignore_index] / total:7.2%}   "
          f"from {_stored_as(dataset.mapping, dataset.ignore_index)}")
    for count, what in ((nearest, "took the class of the nearest listed colour"), (rest, "are not listed: ignored")):
        if count:
            print(f"  {count} pixels ({count / total:.2%}) {what}")
    print(f"  {len(problems)} of them cannot be used{': ' + shown(problems[0]) if problems else ''}\n")


def _stored_as(mapping: LabelMapping, meaning: int) -> str:
    """The values or colours that mean a class, shortened."""
    names = [hex_color(color) for color, value in sorted(mapping.colors.items()) if value == meaning]
    names += [str(stored) for stored, value in sorted(mapping.values.items()) if value == meaning]
    more = f", … ({len(names)})" if len(names) > _MOST_STORED else ""
    rest = ["everything else"] if mapping.ignore_rest and meaning == mapping.ignore_index else []
    return ", ".join([*names[:_MOST_STORED], *rest]) + more or "nothing"


def _print_first(config: PreprocessConfig, dataset: Dataset) -> None:
    split, pairs = next(iter(dataset.splits.items()))
    source = read_pair(dataset, pairs[0])
    header = decode_header(encode_rle(source.label_map, dataset.ignore_index))
    print(f"first image of {split}: {shown(pairs[0].key)}, {source.image.width}x{source.image.height} pixels, classes "
          f"{[dataset.classes[label].name for label in header.labels.tolist()]}")
    if split in config.crops.splits:
        encoded = encode_crop(config, pairs[0], source.image, LabelRuns(source.label_map, dataset.ignore_index), 0)
        if encoded is not None:
            header = read_header(encoded.payload)[1]
            print(f"first crop: {shown(encoded.key)}, {header.width}x{header.height} pixels, {header.labels.size} "
                  f"classes, JPEG {len(encoded.jpeg)} bytes, masks {len(encoded.payload)} bytes")
