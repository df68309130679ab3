"""Tables of the Hugging Face library `datasets` as a source."""

from __future__ import annotations

import io
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from preprocess.config import DatasetConfig
from preprocess.layouts.huggingface import HubTree
from preprocess.pairs import Dataset, open_dataset, read_pair
from shards.errors import ConfigError, DatasetError
from shards.reader import iter_samples
from shards.verify import verify
from tests.conftest import make_shards

datasets = pytest.importorskip("datasets", reason="the extra 'hf' is not installed")
CLASSES = "wall\nfloor\nsky\n"


def encoded(pixels: np.ndarray, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def rows(count: int, seed: int) -> dict[str, list[Any]]:
    rng = np.random.default_rng(seed)
    labels = [rng.integers(0, 4, (8, 9), np.uint8).repeat(10, 0).repeat(10, 1) for _ in range(count)]
    images = [encoded(rng.integers(0, 255, (*label.shape, 3), np.uint8), "JPEG") for label in labels]
    return {"image": [{"bytes": data, "path": "a.jpg"} for data in images],
            "annotation": [{"bytes": encoded(label, "PNG"), "path": None} for label in labels],
            "scene": ["street"] * count}


FEATURES = datasets.Features({"image": datasets.Image(), "annotation": datasets.Image(),
                              "scene": datasets.Value("string")})


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, dict[str, list[Any]]]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True, raising=False)
    (tmp_path / "classes.txt").write_text(CLASSES)
    return {"train": rows(4, 0), "validation": rows(2, 1)}


def saved(folder: Path, tables: dict[str, dict[str, list[Any]]]) -> Path:
    datasets.DatasetDict({name: datasets.Dataset.from_dict(table, features=FEATURES)
                          for name, table in tables.items()}).save_to_disk(folder)
    return folder


def as_parquet(folder: Path, tables: dict[str, dict[str, list[Any]]]) -> Path:
    for name, table in tables.items():
        datasets.Dataset.from_dict(table, features=FEATURES).to_parquet(folder / "data" / f"{name}-00000.parquet")
    return folder


def config_of(root: Path, **settings: Any) -> DatasetConfig:
    return DatasetConfig(kind="huggingface", root=str(root), class_file=str(root.parent / "classes.txt"),
                         reduce_zero_label=True, **settings)


def opened(root: Path, **settings: Any) -> Dataset:
    return open_dataset(config_of(root, **settings), "fail")


@pytest.mark.parametrize("write", [saved, as_parquet])
def test_a_table_is_sharded_like_files(tables: Any, tmp_path: Path, write: Any) -> None:
    root = write(tmp_path / "table", tables)
    output = make_shards(tmp_path / "set", root, "dataset.kind=huggingface", "dataset.reduce_zero_label=true",
                         f"dataset.class_file={tmp_path / 'classes.txt'}")
    assert verify(output) == []
    for number, sample in enumerate(iter_samples(output, "val")):
        stored = np.asarray(Image.open(io.BytesIO(tables["validation"]["annotation"][number]["bytes"])))
        assert np.array_equal(sample.label_map(), np.where(stored == 0, 255, stored - 1))
        assert sample.image_bytes == tables["validation"]["image"][number]["bytes"], "as stored"
        assert sample.key == f"{number:08d}"


def test_a_table_of_one_split_may_be_divided(tables: Any, tmp_path: Path) -> None:
    datasets.Dataset.from_dict(rows(30, 0), features=FEATURES).save_to_disk(tmp_path / "table")
    splits = opened(tmp_path / "table", val_fraction=0.3).splits
    assert set(splits) == {"train", "val"} and sum(map(len, splits.values())) == 30


def test_columns_and_splits_are_named_or_asked_for(tables: Any, tmp_path: Path) -> None:
    root = saved(tmp_path / "table", tables)
    mine = opened(root, images="annotation", labels="annotation", splits={"val": "train"})
    assert mine.splits["val"][0].image_path == "train/0/annotation"
    with pytest.raises(ConfigError, match=r"has the image columns image, annotation; set dataset\.images"):
        opened(root, images="image", labels="scene")
    with pytest.raises(ConfigError, match="has no split 'test', it has: train, validation"):
        opened(root, splits={"val": "test"})
    one = datasets.Dataset.from_dict({"image": tables["train"]["image"]},
                                     features=datasets.Features({"image": datasets.Image()}))
    one.save_to_disk(tmp_path / "one")
    with pytest.raises(ConfigError, match=r"has the image columns image; set dataset\.images"):
        opened(tmp_path / "one")
    with pytest.raises(ConfigError, match=r"tables hold no class names for label images; set dataset\.class_file"):
        open_dataset(DatasetConfig(kind="huggingface", root=str(root)), "fail")


def test_a_path_in_a_table_is_followed_only_below_the_root(tables: Any, tmp_path: Path) -> None:
    root = saved(tmp_path / "table", tables)
    tree = HubTree(str(root), None, None)
    (root / "b.png").write_bytes(b"mine")
    (tmp_path / "secret").write_bytes(b"not yours")

    def holding(cell: Any) -> HubTree:
        tree.splits["train"] = [{"image": cell}]
        return tree

    assert holding({"bytes": None, "path": str(root / "b.png")}).read("train/0/image") == b"mine"
    for cell in ({"bytes": None, "path": str(tmp_path / "secret")}, {"bytes": None, "path": f"{root}/../secret"},
                 {"bytes": None, "path": None}, None):
        with pytest.raises(DatasetError, match=r"train/0/image holds no file, and no path below"):
            holding(cell).read("train/0/image")


def test_other_processes_open_the_table_again(tables: Any, tmp_path: Path) -> None:
    tree = HubTree(str(saved(tmp_path / "table", tables)), None, None)
    data = pickle.dumps(tree)
    assert len(data) < 1000
    again = pickle.loads(data)  # noqa: S301 - made above
    assert again.read("train/1/image") == tables["train"]["image"][1]["bytes"]
    assert tree.files("train")["train/1/image"] == len(tables["train"]["image"][1]["bytes"])
    assert tree.has_files("train") and not tree.has_files("test")


def test_what_cannot_be_opened_is_one_line(tables: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="cannot be opened by the library datasets"):
        opened(tmp_path / "empty")
    root = saved(tmp_path / "table", tables)
    (root / "dataset_dict.json").write_text("{")
    with pytest.raises(DatasetError, match="cannot be opened by the library datasets"):
        opened(root)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'maskstream\[hf\]'"):
        opened(root)


def test_a_row_that_is_no_image_is_named(tables: Any, tmp_path: Path) -> None:
    tables["train"]["annotation"][2] = {"bytes": b"no image", "path": None}
    dataset = opened(saved(tmp_path / "table", tables))
    with pytest.raises(DatasetError, match=r"train/2/annotation is not a readable"):
        read_pair(dataset, dataset.splits["train"][2])
