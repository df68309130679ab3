"""Where windows lie, and the sizes of views."""

from __future__ import annotations

import pytest
import torch

from trainer.evaluation.sliding_window import view_size, window_grid, window_size


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
