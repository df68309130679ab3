"""Windows, padding, views and their averages."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trainer.evaluation.sliding_window import slide_inference, view_size, window_grid, window_size


def shade(crop: Tensor) -> Tensor:
    """A predictor without context: class 0 scores the red channel, class 1 the green one."""
    return crop[:, :2]


@pytest.mark.parametrize(("size", "crop", "stride"), [((45, 70), (32, 32), (21, 21)), ((32, 32), (32, 32), (9, 9)),
                                                      ((500, 33), (32, 64), (32, 64)), ((10, 90), (32, 32), (5, 31))])
def test_windows_cover_every_pixel_in_order(size: tuple[int, int], crop: tuple[int, int],
                                            stride: tuple[int, int]) -> None:
    windows = window_grid(size, crop, stride)
    visits = torch.zeros(size)
    for top, bottom, left, right in windows:
        assert (bottom - top, right - left) == (min(size[0], crop[0]), min(size[1], crop[1]))
        visits[top:bottom, left:right] += 1
    assert visits.min() >= 1
    assert windows == sorted(windows)
    assert len(set(windows)) == len(windows)


def test_published_grid() -> None:
    assert window_grid((512, 683), (512, 512), (341, 341)) == [(0, 512, 0, 512), (0, 512, 171, 683)]


def test_a_stride_with_gaps_is_refused() -> None:
    with pytest.raises(ValueError, match="stride 40 leaves gaps"):
        window_grid((100, 200), (32, 32), (32, 40))


def test_windows_are_legal_for_the_adapter() -> None:
    assert window_size((45, 70), (64, 64), 32) == (64, 64)
    assert window_size((20, 70), (64, 64), 32) == (64, 64)  # two cells of the coarsest map at least
    assert window_size((45, 70), None, 32) == (64, 96)
    assert window_size((45, 70), (64, 64), None) == (45, 64)  # the reference truncates
    assert window_size((24, 30), (32, 32), None) == (24, 24)  # or shrinks to a square
    assert window_size((24, 30), None, None) == (24, 30)
    with pytest.raises(ValueError, match="multiples of 32"):
        window_size((45, 70), (40, 64), 32)


@pytest.mark.parametrize("size", [(45, 70), (20, 70), (10, 11), (64, 64)])
@pytest.mark.parametrize("crop", [64, None])
@pytest.mark.parametrize("divisor", [32, None])
def test_local_scores_come_back_unchanged(size: tuple[int, int], crop: int | None, divisor: int | None) -> None:
    image = torch.rand(1, 3, *size)

    def predict(window: Tensor) -> Tensor:
        assert divisor is None or not any(side % divisor for side in window.shape[2:])
        return shade(window)

    scores = slide_inference(predict, image, 2, crop, 8, size_divisor=divisor)
    torch.testing.assert_close(scores, image[:, :2])


def test_padding_is_the_mean_colour_right_and_below() -> None:
    seen: list[Tensor] = []
    slide_inference(lambda crop: seen.append(crop) or shade(crop), torch.ones(1, 3, 20, 30), 2, 32, 16, size_divisor=32)
    (window,) = seen
    assert window.shape == (1, 3, 32, 32)
    assert window[:, :, :20, :30].eq(1).all()
    assert window.sum() == 3 * 20 * 30


def test_overlapping_windows_are_averaged_beyond_127_visits() -> None:
    calls = iter(range(1000))
    scores = slide_inference(lambda crop: torch.full((1, 1, *crop.shape[2:]), float(next(calls))),
                             torch.zeros(1, 3, 32, 32 + 199), 1, 32, 1, size_divisor=32)
    assert scores[0, 0, 0, 0] == 0.0
    assert scores[0, 0, 0, 1] == 0.5
    assert scores[0, 0, 0, -1] == 199.0
    many = slide_inference(lambda crop: torch.ones(1, 1, *crop.shape[2:]), torch.zeros(1, 3, 45, 45), 1, 32, 1,
                           size_divisor=32)
    assert many.eq(1).all()  # the middle is seen by 196 windows


def test_half_precision_scores_are_added_in_float32() -> None:
    image = torch.rand(1, 3, 32, 95)
    scores = slide_inference(lambda crop: shade(crop).bfloat16(), image, 2, 32, 7, size_divisor=32)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, image[:, :2].bfloat16().float())


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="one image"):
        slide_inference(shade, torch.zeros(2, 3, 32, 32), 2, 32, 16, size_divisor=32)
    with pytest.raises(ValueError, match="predict returned scores"):
        slide_inference(shade, torch.zeros(1, 3, 32, 32), 5, 32, 16, size_divisor=32)


def test_view_sizes_of_the_published_recipe() -> None:
    short = [view_size((1000, 2000), 896, ratio)[0] for ratio in (0.9, 0.95, 1.0, 1.05, 1.1)]
    assert short == [832, 864, 896, 940, 985]
    assert view_size((50, 33), 32, 1.0) == (48, 32)
    assert view_size((40, 57), None, None) == (40, 57)


@pytest.mark.parametrize("length", [512, 513, 683, 1023, 1024, 1025, 2000])
def test_evenly_spread_windows(length: int) -> None:
    """n = ceil(long / size); start_j = int(j (size - overlap / (n - 1))), overlap = n size - long (EoMT)."""
    count = -(-length // 512)
    step = 512 - (count * 512 - length) / (count - 1) if count > 1 else 0
    expected = [(0, 512, int(j * step), int(j * step) + 512) for j in range(count)]
    assert window_grid((512, length), (512, 512), None) == expected
    assert window_grid((length, 512), (512, 512), None) == [(c, d, a, b) for a, b, c, d in expected]
    assert expected[-1][3] == length
