"""Batches: independent of workers, segment maps equal to dense masks, augmentation determined by the sample."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from shards.errors import ConfigError, CorruptShardError
from shards.plan import TrainPlan
from shards.reader import ShardReader
from shards.rle import decode_header, encode_rle
from shards.sample import CropSample
from tests.conftest import make_shards
from trainer.data.batch import Batch
from trainer.data.crops import TrainCrops, TrainSource, check_labels, drop_absent_labels, stack_segment_maps
from trainer.data.loader import train_loader, validation_loader
from trainer.data.targets import to_dense
from trainer.data.whole_images import WholeImages
from trainer.data_config import DataConfig

CPU = torch.device("cpu")


def crops(root: Path, batch: int = 3, **settings: object) -> TrainCrops:
    reader = ShardReader(root, "train")
    plan = TrainPlan(reader.table.samples, batch, 5)
    return TrainCrops([TrainSource(reader, plan)], DataConfig(**{"workers": 0, **settings}))  # type: ignore[arg-type]


def equal(first: Batch, second: Batch) -> bool:
    assert first.segment_maps is not None and second.segment_maps is not None
    assert first.photometric is not None and second.photometric is not None
    return (
        first.keys == second.keys and first.counts == second.counts and first.number == second.number
        and torch.equal(first.images, second.images) and torch.equal(first.segment_maps, second.segment_maps)
        and torch.equal(first.labels, second.labels) and torch.equal(first.photometric, second.photometric)
        and first.moves == second.moves and first.valid == second.valid
    )


def slow_mirror(picture: torch.Tensor, valid: tuple[int, int]) -> torch.Tensor:
    """Mirror column by column: the unpadded part, of this height and width, is reversed."""
    height, width = valid
    mirrored = picture.clone()
    for column in range(width):
        mirrored[..., :height, column] = picture[..., :height, width - 1 - column]
    return mirrored


@pytest.mark.slow
def test_workers_change_nothing_and_a_late_start_sees_the_same_batches(scene_shards: Path) -> None:
    alone = list(train_loader(crops(scene_shards), range(10), CPU))
    helped = list(train_loader(crops(scene_shards, workers=2), range(10), CPU))
    late = list(train_loader(crops(scene_shards, workers=1), range(6, 10), CPU))
    assert len(helped) == 10 and all(map(equal, alone, helped)) and all(map(equal, alone[6:], late))


def test_a_batch_holds_what_the_shards_hold(scene_shards: Path) -> None:
    dataset = crops(scene_shards, hflip=0.0, photometric=False)
    batch = dataset[0]
    assert batch.images.dtype == torch.uint8 and batch.images.shape == (3, 3, 64, 64) and batch.photometric is None
    for position, draw in enumerate(dataset.sources[0].plan.micro_batch(0)):
        sample = dataset.sources[0].reader.read(draw.sample)
        target = batch.targets()[position]
        assert batch.keys[position] == sample.key and target["labels"].tolist() == sample.labels.tolist()
        assert np.array_equal(batch.images[position].permute(1, 2, 0).numpy(), sample.image)
        assert np.array_equal(target["segment_map"].numpy(), sample.segment_map)


def test_dense_targets_equal_segment_maps(scene_shards: Path) -> None:
    packed, dense = crops(scene_shards)[4], crops(scene_shards, targets="dense")[4]
    assert dense.segment_maps is None and torch.equal(packed.images, dense.images)
    for ours, theirs in zip(packed.targets(), dense.targets(), strict=True):
        assert theirs["masks"].dtype == torch.bool
        assert torch.equal(to_dense(ours)["masks"], theirs["masks"])
        assert torch.equal(ours["labels"], theirs["labels"])


def test_augmentation_changes_with_the_epoch_and_mirrors_image_and_masks_together(scene_shards: Path) -> None:
    always, never = crops(scene_shards, hflip=1.0)[0].to(CPU), crops(scene_shards, hflip=0.0)[0].to(CPU)
    assert always.segment_maps is not None and never.segment_maps is not None
    for place, valid in enumerate(never.valid):
        assert torch.equal(always.images[place], slow_mirror(never.images[place], valid))
        assert torch.equal(always.segment_maps[place], slow_mirror(never.segment_maps[place], valid))
    assert not any(move.is_pending for move in always.moves), "once, not twice"
    assert torch.equal(always.to(CPU).images, always.images)
    assert always.photometric is not None
    one_by_one = crops(scene_shards, batch=1)
    first_epoch = {batch.keys[0]: batch.photometric for batch in (one_by_one[m] for m in range(24))}
    second_epoch = {batch.keys[0]: batch.photometric for batch in (one_by_one[m] for m in range(24, 48))}
    assert first_epoch.keys() == second_epoch.keys()
    same = [torch.equal(first_epoch[key], second_epoch[key]) for key in first_epoch]  # type: ignore[arg-type]
    assert sum(same) < 6


def test_the_device_mirrors_what_the_loader_chose(scene_shards: Path) -> None:
    for targets in ("segment_map", "dense"):
        chosen = crops(scene_shards, batch=8, targets=targets)[0]
        done = chosen.to(CPU)
        assert 0 < sum(move.mirrored for move in chosen.moves) < 8
        for place, flip in enumerate(move.mirrored for move in chosen.moves):
            image, target, raw = done.images[place], done.targets()[place], chosen.targets()[place]
            mirror = partial(slow_mirror, valid=chosen.valid[place]) if flip else torch.clone
            assert torch.equal(image, mirror(chosen.images[place]))
            for name in target.keys() - {"labels"}:
                assert torch.equal(target[name], mirror(raw[name]))


def test_cropping_again_keeps_one_label_per_class_present(scene_shards: Path) -> None:
    batch = crops(scene_shards, crop_size=32)[1]
    assert batch.images.shape[2:] == (32, 32)
    for target in batch.targets():
        present = set(target["segment_map"].unique().tolist()) - {255}
        assert present == set(range(len(target["labels"])))
    with pytest.raises(ConfigError, match=r"crop_size is 96, but the stored crop .* is 64x64"):
        crops(scene_shards, crop_size=96)[0]


def test_labels_without_pixels_are_dropped() -> None:
    segments, labels = drop_absent_labels(np.array([[0, 2], [255, 2]], np.uint8), np.array([4, 5, 6]))
    assert segments.tolist() == [[0, 1], [255, 1]] and labels.tolist() == [4, 6]
    segments, labels = drop_absent_labels(np.full((2, 2), 255, np.uint8), np.array([4]))
    assert labels.size == 0 and (segments == 255).all()
    many = np.array([[0, 299], [65535, 299]], np.uint16)
    segments, labels = drop_absent_labels(many, np.arange(300))
    assert segments.dtype == np.uint8 and segments.tolist() == [[0, 1], [255, 1]] and labels.tolist() == [0, 299]


def test_maps_of_more_than_255_labels_widen_the_whole_batch() -> None:
    stacked = stack_segment_maps([np.array([[0, 255]], np.uint8), np.array([[300, 65535]], np.uint16)])
    assert stacked.dtype == torch.int32 and stacked.tolist() == [[[0, 65535]], [[300, 65535]]]


def test_a_label_outside_the_class_table_is_refused_before_the_device_sees_it() -> None:
    record = encode_rle(np.full((2, 2), 8, np.uint8)) | {"key": "k", "meta": {}}
    sample = CropSample(key="k", image_bytes=b"", image_suffix="jpg", record=record, header=decode_header(record),
                        payload=b"")
    check_labels(sample, 9)
    with pytest.raises(CorruptShardError, match=r"sample k holds the label 8, legal: 0\.\.7"):
        check_labels(sample, 8)


def test_samples_of_different_sizes_cannot_share_a_batch(scenes: Path, tmp_path: Path) -> None:
    whole = make_shards(tmp_path / "set", scenes, "crops.splits=[]")
    with pytest.raises(ConfigError, match=r"differ in size: scene_train_\d+ \d+x\d+"):
        crops(whole, batch=6)[0]


def test_validation_images_arrive_whole(scene_shards: Path) -> None:
    reader = ShardReader(scene_shards, "val")
    loader = validation_loader(WholeImages(reader, DataConfig(workers=0)), range(0, 5, 2), CPU)
    for item, number in zip(loader, (0, 2, 4), strict=True):
        sample = reader.read(number)
        assert item.number == number and item.key == sample.key and item.label_map.dtype == torch.uint8
        assert np.array_equal(item.image.permute(1, 2, 0).numpy(), sample.image)
        assert np.array_equal(item.label_map.numpy(), sample.label_map())


def test_a_damaged_sample_reaches_the_user_as_itself_through_a_worker(scene_shards: Path, tmp_path: Path) -> None:
    import shutil

    broken = Path(shutil.copytree(scene_shards, tmp_path / "set"))
    dataset = crops(broken, workers=1)
    for shard in dataset.sources[0].reader.table:
        data = bytearray((broken / shard.name).read_bytes())
        data[600] ^= 255
        (broken / shard.name).write_bytes(data)
    with pytest.raises(CorruptShardError, match="CRC-32 differs"):
        list(train_loader(dataset, range(8), CPU))
