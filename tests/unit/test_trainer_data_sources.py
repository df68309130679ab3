"""Training on several sets: their samples in the mixture's order, labelled by the classes of data.root."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shards.errors import ConfigError, CorruptShardError
from shards.manifest import load_manifest, manifest_bytes
from shards.plan import MicroBatchNumbers
from shards.reader import ShardReader, iter_samples
from tests.conftest import RENAMED, make_shards
from tests.support.hand_made import as_version_2, png, rename_classes, write_labelled
from tests.unit.test_trainer_data_crops import CPU, equal
from trainer.config import RunConfig, load_run_config
from trainer.data.batch import Batch
from trainer.data.crops import TrainCrops, read_ahead_budgets
from trainer.data.loader import train_loader
from trainer.data.sources import class_counts, source_lines, train_sources
from trainer.data_config import DataConfig
from trainer.interop import SampleStream, TransformersBatches
from trainer.run.run import open_crops

PLAIN = ("data.hflip=0", "data.photometric=false")
MERGED = {"extra": "grass"}  # and its own grass


def configured(root: Path, *sources: dict[str, Any], settings: tuple[str, ...] = ()) -> DataConfig:
    entries = [{**source, "root": str(source["root"])} if "root" in source else source for source in sources]
    return load_run_config(None, [f"data.root={root}", "data.workers=0", f"data.sources={entries}".replace("None", "~"),
                                  *settings]).data


def mixed(root: Path, *sources: dict[str, Any], batch: int = 3, settings: tuple[str, ...] = ()) -> TrainCrops:
    config = configured(root, *sources, settings=settings)
    return TrainCrops(train_sources(config, batch, 5), config, global_batch_size=2 * batch)


def label_maps(batch: Batch) -> list[list[list[int]]]:
    maps = []
    for target in batch.targets():
        labels = target["labels"].numpy()
        assert set(target["segment_map"].unique().tolist()) - {255} == set(range(labels.size)), "one mask per class"
        assert (np.diff(labels) > 0).all()
        maps.append(np.append(labels, np.full(256 - labels.size, 255))[target["segment_map"].numpy()].tolist())
    return maps


def test_one_source_gives_the_batches_of_data_root(scene_shards: Path) -> None:
    plain = mixed(scene_shards)
    for source in ({}, {"root": scene_shards, "weight": 0.3}):
        alone = mixed(scene_shards, source)
        assert all(equal(alone[number], plain[number]) for number in range(10))
    twice = mixed(scene_shards, {}, {}, batch=2)
    assert twice.sources[0].plan.seed == 5 != twice.sources[1].plan.seed
    orders = [[source.plan.sample_at(number) for number in range(24)] for source in twice.sources]
    assert orders[0] != orders[1]


@pytest.mark.parametrize("classes", [MERGED, {"extra": None}])
def test_batches_hold_the_samples_of_the_mixture_with_the_classes_of_data_root(
    scene_shards: Path, renamed_shards: Path, classes: dict[str, str | None]
) -> None:
    dataset = mixed(scene_shards, {"weight": 2}, {"root": renamed_shards, "classes": classes}, settings=PLAIN)
    names = [info.name for info in load_manifest(scene_shards).classes]
    tables = [np.append(np.arange(255), 255), np.full(256, 255)]
    for number, name in enumerate(RENAMED):
        target = classes.get(name, name)
        tables[1][number] = 255 if target is None else names.index(target)
    seen = [0, 0]
    for number in range(16):
        batch, found = dataset[number], label_maps(dataset[number])
        for place, position in enumerate(dataset.positions(number)):
            turn = dataset.mixture.locate(position)
            source = dataset.sources[turn.source]
            sample = source.reader.read(source.plan.sample_at(turn.position).sample)
            assert batch.keys[place] == sample.key
            assert np.array_equal(batch.images[place].permute(1, 2, 0).numpy(), sample.image)
            assert found[place] == tables[turn.source][sample.label_map()].tolist()
            seen[turn.source] += 1
    assert seen == [32, 16]


def test_ranks_and_workers_make_up_the_same_batches(scene_shards: Path, renamed_shards: Path) -> None:
    sources = ({"weight": 0.6}, {"root": renamed_shards, "weight": 0.4, "classes": MERGED})
    expected = [mixed(scene_shards, *sources)[number] for number in range(12)]
    found: dict[int, Batch] = {}
    for rank in range(2):
        numbers = list(MicroBatchNumbers(first_step=0, last_step=3, rank=rank, world_size=2, accumulation=2))
        for worker in range(3):
            dataset = mixed(scene_shards, *sources)
            dataset.numbers = numbers[worker::3]
            found |= {batch.number: batch for batch in dataset}
    assert sorted(found) == list(range(12)) and all(equal(found[number], expected[number]) for number in range(12))


def test_samples_without_a_label_left_are_as_unlabelled_ones(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = [png(rng.integers(0, 256, (40, 60, 3), np.uint8)) for _ in range(6)]
    stored = rng.integers(0, 2, (6, 40, 60)).astype(np.uint8)
    stored[:3] = 2  # a class that is ignored
    plain = np.where(stored == 2, 255, stored).astype(np.uint8)
    roots = [write_labelled(tmp_path / name, {"train": [(f"k{number}", image, label_map) for number, (image, label_map)
                                                        in enumerate(zip(images, maps, strict=True))]}, names)
             for name, maps, names in (("a", plain, ("u", "v")), ("b", stored, ("u", "v", "w")))]
    for settings in (("data.crop_size=32",), ("data.crop_size=32", "data.online.scaled_side=short")):
        expected = mixed(roots[0], {}, batch=2, settings=settings)
        found = mixed(roots[0], {"root": roots[1], "classes": {"w": None}}, batch=2, settings=settings)
        assert all(equal(found[number], expected[number]) for number in range(6))
        assert any(0 in found[number].counts for number in range(3))


def test_a_corrupt_sample_is_replaced_within_its_global_batch(scene_shards: Path, renamed_shards: Path, tmp_path: Path
                                                              ) -> None:
    broken = Path(shutil.copytree(renamed_shards, tmp_path / "broken"))
    reader = ShardReader(broken, "train")
    shard, offset, _ = reader.place(7)
    data = bytearray((broken / reader.table.name(shard)).read_bytes())
    data[offset + 600] ^= 1
    (broken / reader.table.name(shard)).write_bytes(data)
    sources = ({}, {"root": broken, "classes": MERGED})
    whole = mixed(scene_shards, {}, {"root": renamed_shards, "classes": MERGED})
    with pytest.raises(CorruptShardError, match=r"broken/train-.*CRC-32 differs"):
        list(train_loader(mixed(scene_shards, *sources), range(16), CPU))
    dataset = mixed(scene_shards, *sources, settings=("data.on_corrupt=skip",))
    hits = 0
    for number in range(16):
        batch, expected = dataset[number], whole[number]
        assert len(batch.keys) == 3 and len(batch.skipped) == sum(
            dataset.sources[1].plan.sample_at(turn.position).sample == 7
            for turn in map(dataset.mixture.locate, dataset.positions(number)) if turn.source)
        if batch.skipped:
            colours, of_step = batch.photometric, [whole[number - number % 2 + half].photometric for half in (0, 1)]
            assert colours is not None and expected.photometric is not None
            (place,) = (place for place in range(3) if not torch.equal(colours[place], expected.photometric[place]))
            step = torch.cat(of_step)  # type: ignore[arg-type]
            assert torch.equal(colours[place], step[(number % 2 * 3 + place + 1) % 6]), "the next of its global batch"
            hits += 1
        else:
            assert equal(batch, expected)
    assert hits


# -- what cannot be mixed ------------------------------------------------------------------------------------


def test_sets_of_other_sizes_and_kinds_are_refused_by_name(scene_shards: Path, whole_shards: Path, scenes: Path,
                                                           tmp_path: Path) -> None:
    larger = make_shards(tmp_path / "larger", scenes, "crops.size=96")
    with pytest.raises(ConfigError, match=r"data\.sources\[0\] \(.*, split train\) holds crops of 64x64 pixels and "
                                          r"data\.sources\[1\] \(.*larger, split train\) holds crops of 96x96, legal: "
                                          r"crops of one size; set data\.crop_size to at most 64"):
        mixed(scene_shards, {}, {"root": larger})
    assert mixed(scene_shards, {}, {"root": larger}, settings=("data.crop_size=64",))[0].images.shape[2:] == (64, 64)
    with pytest.raises(ConfigError, match=r"data\.sources\[1\] \(.*whole, split train\) holds whole images, legal: "
                                          "sets of one kind, which crops.splits of make_shards chooses"):
        mixed(scene_shards, {}, {"root": whole_shards}, settings=("data.crop_size=64",))
    unknown = Path(shutil.copytree(larger, tmp_path / "unknown"))  # its manifest does not tell the size
    manifest = load_manifest(unknown)
    (unknown / "manifest.json").write_bytes(manifest_bytes(replace(manifest, crops={})))
    config = replace(RunConfig(), data=configured(scene_shards, {"weight": 30}, {"root": unknown}))
    with pytest.raises(ConfigError, match=r"differ in size: .* 96x96 of .*unknown, .* 64x64 of .*set\. Train"):
        open_crops(config, load_manifest(scene_shards))
    online = mixed(whole_shards, {}, {"root": scene_shards, "split": "val"},
                   settings=("data.crop_size=48", "data.online.scaled_side=short"))
    assert online[0].images.shape == (3, 3, 48, 48)


def test_a_source_whose_mapped_classes_have_no_pixel_is_refused(scene_shards: Path, tmp_path: Path) -> None:
    other = rename_classes(scene_shards, tmp_path / "other", [*(f"c{number}" for number in range(8)), "sky"])
    with pytest.raises(ConfigError, match=r"data\.sources\[0\] \(.*other\): the classes that it shares with data\.root "
                                          "have no pixel in its split 'train'"):
        mixed(scene_shards, {"root": other, "unmatched": "ignore"})


# -- counts, budgets, other programs -------------------------------------------------------------------------


def test_counts_of_classes_are_mixed_by_share(scene_shards: Path, renamed_shards: Path, tmp_path: Path) -> None:
    manifest, classes = load_manifest(scene_shards), {"extra": None, "house": "grass"}  # 3 and 5 are grass
    info, grass = manifest.splits["train"], [item.name for item in manifest.classes].index("grass")
    plain = mixed(scene_shards).sources
    assert class_counts(plain, "pixels") is plain[0].reader.info.class_pixels
    halves = mixed(scene_shards, {}, {}).sources
    assert class_counts(halves, "samples") == [2 * count for count in info.class_samples]
    uneven = mixed(scene_shards, {"weight": 3}, {"root": renamed_shards, "classes": classes}).sources
    merged = sum(bool({3, 5} & set(sample.labels.tolist())) for sample in iter_samples(renamed_shards, "train"))
    assert merged < min(24, info.class_samples[3] + info.class_samples[5])
    samples, pixels = (class_counts(uneven, counts) for counts in ("samples", "pixels"))
    assert samples[grass] == pytest.approx(48 * (0.75 * info.class_samples[grass] + 0.25 * merged) / 24)
    labelled = 0.75 * info.labelled_pixels + 0.25 * (info.labelled_pixels - info.class_pixels[0])
    assert pixels[grass] / sum(pixels) == pytest.approx(
        (0.75 * info.class_pixels[grass] + 0.25 * (info.class_pixels[3] + info.class_pixels[5])) / labelled)
    old = as_version_2(Path(shutil.copytree(renamed_shards, tmp_path / "old")))
    bound = mixed(scene_shards, {"root": old, "classes": classes}).sources
    assert class_counts(bound, "samples")[grass] == 24, "without the classes of each sample, their sum is a bound"


def test_each_source_is_sampled_by_the_classes_it_has_after_mapping(scene_shards: Path, renamed_shards: Path) -> None:
    rare = ("data.sampling=repeat_factor", "data.sampling_threshold=1")
    dataset = mixed(scene_shards, {}, {"root": renamed_shards, "classes": {"extra": None}}, settings=rare)
    dropped = mixed(scene_shards, {}, {"root": renamed_shards, "classes": dict.fromkeys(RENAMED[:-1])}, settings=rare)
    assert dataset.sources[0].plan.epoch_size > 24 and dataset.sources[1].plan.epoch_size > 24
    held = load_manifest(renamed_shards).splits["train"].class_samples[7]
    expected = held * (24 / held) ** 0.5 + 24 - held  # of the only class left
    assert dropped.sources[1].plan.epoch_size == int(np.ceil(expected - 1e-3))


def test_remote_sources_share_the_read_ahead_by_the_size_of_their_samples(scene_shards: Path, renamed_shards: Path,
                                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    sources = mixed(scene_shards, {}, {"root": renamed_shards, "classes": MERGED}, {}).sources
    assert read_ahead_budgets(sources, 1000) == [None, None, None]
    monkeypatch.setattr(ShardReader, "is_local", property(lambda reader: reader.storage.root != str(renamed_shards)))
    assert read_ahead_budgets(sources, 1000) == [None, 1000, None]
    monkeypatch.setattr(ShardReader, "is_local", False)
    assert read_ahead_budgets(sources, 999) == [333, 333, 333]


def test_what_is_trained_on_is_described_in_a_line_each(scene_shards: Path, renamed_shards: Path) -> None:
    manifest = load_manifest(scene_shards)
    config = configured(scene_shards, {"weight": 0.7}, {"root": renamed_shards, "weight": 0.3, "classes": MERGED})
    lines = source_lines(train_sources(config, 2, 0), config, 480, manifest)
    assert lines == [
        f"data.sources[0]: {scene_shards}, split train: 24 samples, 70.00% of the training samples, 14.00 epochs; "
        "8 classes",
        f"data.sources[1]: {renamed_shards}, split train: 24 samples, 30.00% of the training samples, 6.00 epochs; "
        "8 classes: 7 of the same name, 1 mapped (extra → grass)"]
    alone = configured(scene_shards)
    assert source_lines(train_sources(alone, 2, 0), alone, 480, manifest) == []


def test_hugging_face_batches_are_mixed_and_a_webdataset_stream_is_of_one_set(scene_shards: Path, renamed_shards: Path
                                                                              ) -> None:
    sources = ({}, {"root": renamed_shards, "classes": MERGED})
    config = configured(scene_shards, *sources)
    found = list(TransformersBatches(config, batch_size=2, last_step=3, seed=5))
    expected = mixed(scene_shards, *sources, batch=2)
    for number, batch in enumerate(found):
        labels = torch.cat(batch["class_labels"])  # type: ignore[arg-type]
        assert torch.equal(labels, expected[number].labels)
    with pytest.raises(ConfigError, match=r"data\.root is not set; with data\.sources it is the set whose classes are"):
        TransformersBatches(replace(config, root=None), batch_size=2, last_step=3)
    with pytest.raises(ConfigError, match=r"data\.sources has 2 entries, legal for SampleStream: none.*Transformers"):
        SampleStream(config)
