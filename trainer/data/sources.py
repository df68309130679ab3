"""The training sets of a configuration: `data.root` alone, or `data.sources`, with their classes mapped to data.root's.

Source k of `data.sources` is called data.sources[k] in errors, as its settings are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from shards.errors import ConfigError
from shards.manifest import Manifest, load_manifest
from shards.mixing import Mixture
from shards.reader import ShardReader
from shards.sampling import ClassLists
from shards.shown_text import shown
from trainer.data.class_mapping import described, map_classes
from trainer.data.crops import TrainSource, open_reader, storage_of, train_plan
from trainer.data_config import DataConfig, SourceConfig
from trainer.seeding import source_seed

_KINDS = {"crops": "stored crops", "images": "whole images"}


def configured_sources(config: DataConfig) -> list[SourceConfig]:
    """The sets to train on, root and split filled in: those of `data.sources`, or data.root alone."""
    return [replace(source, root=source.root or config.root, split=source.split or config.train_split)
            for source in config.sources or [SourceConfig()]]


def configured_shares(config: DataConfig) -> list[tuple[SourceConfig, float]]:
    """The entries of `data.sources`, as `configured_sources`, and the share of the training samples that each has."""
    return list(zip(configured_sources(config), shares_of(config.sources), strict=True)) if config.sources else []


def shares_of(sources: Sequence[SourceConfig] | Sequence[TrainSource]) -> list[float]:
    """The part of all training samples that each source has."""
    total = sum(source.weight for source in sources)
    return [source.weight / total for source in sources]


def train_sources(config: DataConfig, micro_batch_size: int, seed: int, manifest: Manifest | None = None
                  ) -> list[TrainSource]:
    """Open the sets to train on; `manifest` is that of data.root, if already loaded.

    Raises ShardError, and ConfigError for classes that have no counterpart in data.root (see `map_classes`) and for
    sets that cannot be mixed: of stored crops and of whole images, or of crops of different sizes.
    """
    configured = configured_sources(config)
    mixture = Mixture([source.weight for source in configured])
    if config.sources and manifest is None:
        if config.root is None:
            raise ConfigError("data.root is not set; with data.sources it is the set whose classes are learned")
        manifest = load_manifest(storage_of(config, config.root))
    sources = []
    for number, source in enumerate(configured):
        known = manifest if source.root == config.root else None
        reader = open_reader(config, str(source.split), known, source.root)
        mapping = None
        if config.sources and manifest is not None:
            mapping = map_classes(_names(reader.manifest), _names(manifest), source, f"data.sources[{number}]",
                                  f"data.root ({config.root})")
            if mapping is not None and not mapping.of_counts(reader.info.class_pixels).any():
                raise ConfigError(f"data.sources[{number}] ({source.root}): the classes that it shares with data.root "
                                  f"have no pixel in its split {reader.split!r}; set data.sources[{number}].classes")
        dealing = mixture.lanes_of(number, config.lanes) if len(configured) > 1 else None
        plan = train_plan(reader, config, micro_batch_size, source_seed(seed, number), mapping, dealing)
        sources.append(TrainSource(reader, plan, mapping, source.weight))
    _check_alike(sources, config)
    return sources


def class_counts(sources: Sequence[TrainSource], counts: str) -> Sequence[float]:
    """How often each class of the network occurs in what is trained on: its "pixels", or "samples" that hold it.

    Of one source, those of its split. Of several, those of a split of as many samples in which the sources have the
    shares of the mixture.
    """
    found = [_counts_of(source, counts) for source in sources]
    if len(sources) == 1:
        return found[0]
    total, shares = sum(len(source.reader) for source in sources), shares_of(sources)
    sizes = [source.reader.info.pixels if counts == "pixels" else len(source.reader) for source in sources]
    return [sum(total * share * count / size for share, count, size in zip(shares, of_class, sizes, strict=True))
            for of_class in zip(*found, strict=True)]


def source_lines(sources: Sequence[TrainSource], config: DataConfig, samples: int, manifest: Manifest) -> list[str]:
    """What is trained on: one line per entry of `data.sources`, for a run of so many samples; none without entries."""
    if not config.sources:
        return []
    lines = []
    for number, (source, share) in enumerate(zip(sources, shares_of(sources), strict=True)):
        reader = source.reader
        classes = described(_names(reader.manifest), _names(manifest), source.mapping)
        lines.append(f"data.sources[{number}]: {reader.storage.root}, split {reader.split}: {len(reader)} samples, "
                     f"{share:.2%} of the training samples, {samples * share / source.plan.epoch_size:.2f} epochs; "
                     f"{classes}")
    return [shown(line) for line in lines]


def _names(manifest: Manifest) -> list[str]:
    return [info.name for info in manifest.classes]


def _counts_of(source: TrainSource, counts: str) -> Sequence[float]:
    """Of merged classes, the samples that hold any are counted where the set lists the classes of each sample;
    otherwise each counts by itself, up to the number of samples."""
    info, mapping = source.reader.info, source.mapping
    plain = info.class_pixels if counts == "pixels" else info.class_samples
    if mapping is None:
        return plain
    if counts == "samples" and mapping.merges and info.classes is not None:
        ids = mapping.of_lists(ClassLists.load(source.reader.storage, info)).ids
        return np.bincount(ids, minlength=mapping.num_targets).tolist()
    summed = mapping.of_counts(plain)
    return (summed if counts == "pixels" else np.minimum(summed, info.samples)).tolist()


def _check_alike(sources: Sequence[TrainSource], config: DataConfig) -> None:
    """Raise ConfigError for sets that cannot be in one batch, as far as their manifests tell."""
    first, *others = [source.reader for source in sources]
    for number, other in enumerate(others, 1):
        named = [f"data.sources[{place}] ({reader.storage.root}, split {reader.split}) holds"
                 for place, reader in ((0, first), (number, other))]
        kinds = [_KINDS[reader.info.kind] for reader in (first, other)]
        if kinds[0] != kinds[1]:
            raise ConfigError(f"{named[0]} {kinds[0]} and {named[1]} {kinds[1]}, legal: sets of one kind, which "
                              "crops.splits of make_shards chooses")
        sides = [_stored_side(reader) for reader in (first, other)]
        if config.crop_size is None and None not in sides and sides[0] != sides[1]:
            raise ConfigError(f"{named[0]} crops of {sides[0]}x{sides[0]} pixels and {named[1]} crops of {sides[1]}x"
                              f"{sides[1]}, legal: crops of one size; set data.crop_size to at most "
                              f"{min(filter(None, sides))}, which cuts them at random")


def _stored_side(reader: ShardReader) -> int | None:
    crops = reader.manifest.crops
    side = crops.get("stored_size") or crops.get("size")
    return side if reader.info.kind == "crops" and isinstance(side, int) else None
