"""Scores of single images: by hand, joined over ranks, and what is refused when the table is read back."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from shards.errors import ConfigError
from shards.looking.image_scores import ImageScore, encode_scores, read_scores
from trainer.distributed import DistContext
from trainer.evaluation.counts import Counts
from trainer.evaluation.image_scores import ImageScores

CPU = torch.device("cpu")


def counted(pred: list[int], label: list[int]) -> Counts:
    counts = Counts(4, 255)
    counts.add_image(torch.tensor([label]), torch.tensor([pred]))
    return counts


def test_scores_of_an_image_by_hand() -> None:
    scores = ImageScores("val")
    # class 0: 2 of 3 found, one false: IoU 2/4; class 1: 1 of 1 found: 1; class 2: never labelled, so not in the mean
    scores.add(0, "a", counted([0, 0, 2, 1, 0, 0], [0, 0, 0, 1, 3, 255]))
    scores.add(1, "ü/b", counted([0, 1], [255, 255]))
    one, two = scores.gather(DistContext(rank=0, world_size=1, device=CPU), 4).scores()
    assert one[:3] == ("val", 0, "a") and one.miou == pytest.approx((2 / 4 + 1 + 0) / 3)  # class 3 was never found
    assert one.accuracy == pytest.approx(3 / 5)
    assert two[:3] == ("val", 1, "ü/b") and math.isnan(two.miou) and math.isnan(two.accuracy)


class Ranks:
    """All-reduce between threads."""

    def __init__(self, count: int) -> None:
        self.count, self.barrier, self.tensors = count, threading.Barrier(count), [torch.zeros(0)] * count

    def context(self, rank: int) -> Any:
        ranks = self

        class Context(DistContext):
            def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
                ranks.tensors[rank] = tensor.clone()
                ranks.barrier.wait(20)
                tensor.copy_(torch.stack(ranks.tensors).sum(0).to(tensor.dtype))
                ranks.barrier.wait(20)
                return tensor

        return Context(rank=rank, world_size=self.count, device=CPU)


@pytest.mark.parametrize("images", [1, 2, 7])
def test_all_ranks_get_the_scores_of_all_images_whoever_had_them(images: int) -> None:
    def scored(rank: int, ranks: int) -> list[ImageScore]:
        scores = ImageScores("val")
        for number in range(rank, images, ranks):
            scores.add(number, f"key{'é' * number}", counted([0] * number + [1], [0] * number + [0]))
        return scores.gather(shared[ranks].context(rank), 4).scores()

    shared = {1: Ranks(1), 3: Ranks(3)}
    alone = scored(0, 1)
    assert [row.number for row in alone] == list(range(images)) and alone[-1].key == f"key{'é' * (images - 1)}"
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(scored, range(3), [3] * 3))
    assert found == [alone] * 3


def test_the_table_survives_being_written_and_read(tmp_path: Path) -> None:
    rows = [ImageScore("val", 3, 'a "b"/ü\n', 0.25, 1.0), ImageScore("val", 4, "c", math.nan, math.nan)]
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation/images.jsonl").write_bytes(encode_scores(rows))
    assert (tmp_path / "evaluation/images.jsonl").read_bytes().count(b"\n") == 2
    for place in (tmp_path, tmp_path / "evaluation", tmp_path / "evaluation/images.jsonl"):
        first, second = read_scores(place)
        assert first == rows[0] and second[:3] == rows[1][:3] and math.isnan(second.miou)


GOOD = {"split": '"val"', "number": "1", "key": '"a"', "mIoU": "0.5", "aAcc": "1"}


@pytest.mark.parametrize(("field", "value"), [
    ("split", "3"), ("number", "-1"), ("number", "1.5"), ("number", "true"), ("number", '"1"'), ("key", '""'),
    ("mIoU", "1.5"), ("mIoU", "-0.1"), ("mIoU", '"x"'), ("mIoU", "Infinity"), ("aAcc", "[1]"), ("key", None),
    ("mIoU", None)])
def test_a_bad_row_is_an_error_that_names_file_line_and_field(field: str, value: str | None, tmp_path: Path) -> None:
    path = tmp_path / "images.jsonl"
    fields = {**GOOD, field: value}
    row = ", ".join(f'"{name}": {text}' for name, text in fields.items() if text is not None)
    good = ", ".join(f'"{name}": {text}' for name, text in GOOD.items())
    path.write_text(f"{{{good}}}\n{{{row}}}\n")
    with pytest.raises(ConfigError, match=rf"images.jsonl, line 2: {field} is .*legal: "):
        list(read_scores(path))


@pytest.mark.parametrize("content", ["", "no json\n", "[1]\n", "[" * 5000])
def test_what_is_no_table_is_one_error(content: str, tmp_path: Path) -> None:
    (tmp_path / "images.jsonl").write_text(content)
    with pytest.raises(ConfigError, match=r"images\.jsonl"):
        list(read_scores(tmp_path))


def test_a_folder_without_a_table_says_who_writes_it(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ConfigError, match=r"trainer/eval\.py"):
            list(read_scores(place))
