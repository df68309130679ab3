"""Our samples in webdataset pipelines and with Hugging Face models."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

from shards.reader import iter_samples
from tests.conftest import REPOSITORY
from trainer.data_config import DataConfig
from trainer.interop import SampleStream, TransformersBatches


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (2, 2)])
def test_a_webdataset_pipeline_gets_each_sample_once(s3_shards: str, ranks: int, workers: int) -> None:
    webdataset = pytest.importorskip("webdataset")
    expected = {sample.key: sample for sample in iter_samples(s3_shards, "train")}
    found = []
    for rank in range(ranks):
        stream = SampleStream(DataConfig(root=s3_shards), seed=3, rank=rank, world_size=ranks)
        pipeline = webdataset.DataPipeline(stream, webdataset.decode("rgb8"),
                                           webdataset.to_tuple("__key__", "jpg", "mp"))
        context = "forkserver" if workers else None
        found += list(DataLoader(pipeline, batch_size=None, num_workers=workers, multiprocessing_context=context,
                                 collate_fn=tuple))
    assert sorted(key for key, _, _ in found) == sorted(expected)
    for key, image, record in found:
        assert (image == expected[key].image).all() and record == expected[key].record


def test_epochs_and_seeds_order_the_stream(scene_shards: Path) -> None:
    config = DataConfig(root=str(scene_shards))
    orders = [tuple(sample["__key__"] for sample in SampleStream(config, seed=seed, epoch=epoch))
              for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0))]
    assert len(set(orders)) == 3 and orders[0] == orders[3] and len({frozenset(order) for order in orders}) == 1


def test_a_hugging_face_model_trains_on_our_batches(scene_shards: Path) -> None:
    """The example of docs/streaming.md, verbatim."""
    text = (REPOSITORY / "docs" / "streaming.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (example,) = (block for block in blocks if "TransformersBatches" in block)
    example = example.replace("shards-scenes", str(scene_shards))
    batches = TransformersBatches(DataConfig(root=str(scene_shards)), batch_size=2, last_step=3)
    torch.manual_seed(0)
    model = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(
        num_labels=batches.crops.sources[0].reader.num_classes, feature_size=32, mask_feature_size=32, hidden_dim=32,
        encoder_feedforward_dim=32, dim_feedforward=32, encoder_layers=1, decoder_layers=2, num_attention_heads=2,
        num_queries=5, train_num_points=48,
        backbone_config={"model_type": "swin", "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1],
                         "out_features": ["stage1", "stage2", "stage3", "stage4"], "image_size": 64}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    steps: list[float] = []
    pytest.importorskip("webdataset")
    names: dict[str, Any] = {"model": model, "optimizer": optimizer, "__name__": "__main__"}
    optimizer.register_step_post_hook(lambda *_: steps.append(names["loss"].item()))
    exec(compile(example, "streaming.md", "exec"), names)  # noqa: S102
    assert len(steps) == 3 and all(0 < loss < float("inf") for loss in steps)
    key, image, record = next(iter(names["pipeline"]))
    assert image.shape == (64, 64, 3) and record["key"] == key
    for batch in batches:
        assert batch["pixel_values"].shape == (2, 3, 64, 64)
        for masks, labels in zip(batch["mask_labels"], batch["class_labels"], strict=True):
            assert masks.shape == (len(labels), 64, 64) and masks.dtype == torch.float32
            assert masks.sum(0).max() <= 1
    assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
