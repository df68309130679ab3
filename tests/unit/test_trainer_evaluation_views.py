"""Windows of views in batches, and scores computed band by band, against computations without either."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shards.errors import RunError
from tests.unit.test_trainer_evaluation_predictor import Masks, normalised, photograph, predictor
from trainer.evaluation.predictor import Predictor
from trainer.evaluation.score_memory import ScoreMemory
from trainer.evaluation.sliding_window import view_size, window_grid, window_size
from trainer.evaluation.views import View, ViewRules, Window, WindowQueue
from trainer.models.outputs import Outputs
from trainer.models.resizing import Rows, Size, resize, resize_rows, source_rows
from trainer.out_of_memory import OutOfMemory

PLAIN = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


def rules(crop: int | None, stride: int | None, divisor: int | None = 32) -> ViewRules:
    return ViewRules(crop_size=crop, stride=stride, size_divisor=divisor, mean=PLAIN[0], std=PLAIN[1])


def red_and_green(windows: Tensor) -> Any:
    return {"logits": windows[:, :2]}


def as_they_are(outputs: Outputs, size: Size, rows: Rows) -> Tensor:
    logits: Tensor = outputs["logits"]  # type: ignore[typeddict-item]
    return logits[:, :, slice(*rows)]


def slide(image: Tensor, view_rules: ViewRules, run: Callable[[Tensor], Any] = red_and_green, *, classes: int = 2,
          batch: int = 3, band: int | None = None, mirrored: bool = False, full: Size | None = None) -> Tensor:
    """Scores of one view, computed in bands of some rows."""
    view = View(image, full or (image.shape[2], image.shape[3]), view_rules, mirrored=mirrored)
    queue, bands = WindowQueue(run, batch), []
    queue.add(view.windows)
    height = view.full[0]
    for first in range(0, height, band or height):
        rows = (first, min(first + (band or height), height))
        for window in view.needs(rows):
            queue.compute(window)
        bands.append(view.scores(rows, classes, as_they_are))
        view.close(rows[1])
    assert all(window.outputs is None for window in view.windows), "nothing is kept"
    return torch.cat(bands, 2)


@pytest.mark.parametrize("size", [(45, 70), (20, 70), (10, 11), (64, 64)])
@pytest.mark.parametrize("crop", [64, None])
@pytest.mark.parametrize("divisor", [32, None])
@pytest.mark.parametrize("band", [None, 7])
def test_local_scores_come_back_unchanged(size: Size, crop: int | None, divisor: int | None, band: int | None) -> None:
    image = torch.rand(1, 3, *size)

    def run(windows: Tensor) -> Any:
        assert divisor is None or not any(side % divisor for side in windows.shape[2:])
        return red_and_green(windows)

    torch.testing.assert_close(slide(image, rules(crop, 8, divisor), run, band=band), image[:, :2])


def test_bytes_are_normalised_window_by_window() -> None:
    image = photograph(50, 70)
    view_rules = ViewRules(crop_size=32, stride=20, size_divisor=32, mean=[0.5, 0.4, 0.3], std=[0.1, 0.2, 0.3])
    expected = (image[None].float() / 255 - torch.tensor(view_rules.mean)[:, None, None]) / torch.tensor(
        view_rules.std)[:, None, None]
    torch.testing.assert_close(slide(image[None], view_rules), expected[:, :2])
    torch.testing.assert_close(slide(image[None], view_rules, mirrored=True), expected[:, :2])


@pytest.mark.parametrize("mirrored", [False, True])
def test_padding_is_the_mean_colour_right_and_below(mirrored: bool) -> None:
    seen: list[Tensor] = []
    image = torch.rand(1, 3, 20, 30) + 1
    slide(image, rules(32, 16), lambda windows: seen.append(windows) or red_and_green(windows), mirrored=mirrored)
    (window,) = seen
    assert window.shape == (1, 3, 32, 32)
    assert torch.equal(window[:, :, :20, :30], image.flip(3) if mirrored else image)
    assert window[:, :, 20:].eq(0).all() and window[:, :, :, 30:].eq(0).all()


def test_a_mirrored_view_is_seen_mirrored_and_comes_back_as_it_was() -> None:
    """With windows that do not lie symmetrically, mirroring the pixels first and the windows first differ."""
    image, seen, expected = torch.rand(1, 3, 40, 71), [], []
    slide(image, rules(32, 23), lambda windows: seen.extend(windows) or red_and_green(windows), mirrored=True)
    slide(image.flip(3), rules(32, 23), lambda windows: expected.extend(windows) or red_and_green(windows))
    assert torch.equal(torch.stack(seen), torch.stack(expected))


def test_overlapping_windows_are_averaged_beyond_127_visits() -> None:
    calls = iter(range(1000))

    def counted(windows: Tensor) -> Any:
        return {"logits": torch.stack([torch.full((1, *windows.shape[2:]), float(next(calls))) for _ in windows])}

    scores = slide(torch.zeros(1, 3, 32, 32 + 199), rules(32, 1), counted, classes=1)
    assert scores[0, 0, 0, 0] == 0.0
    assert scores[0, 0, 0, 1] == 0.5
    assert scores[0, 0, 0, -1] == 199.0
    many = slide(torch.zeros(1, 3, 45, 45), rules(32, 1), lambda windows: {"logits": torch.ones_like(windows[:, :1])},
                 classes=1, band=5)
    assert many.eq(1).all()  # the middle is seen by 196 windows


def test_half_precision_scores_are_added_in_float32() -> None:
    image = torch.rand(1, 3, 32, 95)
    scores = slide(image, rules(32, 7), lambda windows: {"logits": windows[:, :2].bfloat16()})
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, image[:, :2].bfloat16().float())


@pytest.mark.parametrize(("height", "resized"), [(8, 32), (8, 128), (9, 9), (50, 73), (90, 31), (7, 21), (1, 40)])
@pytest.mark.parametrize("band", [1, 5, 16])
def test_rows_are_those_of_the_whole_resized_map(height: int, resized: int, band: int) -> None:
    maps = torch.randn(2, 3, height, 10, generator=torch.Generator().manual_seed(height))
    size = (resized, 10 * resized // height if resized % height == 0 else 17)
    whole = F.interpolate(maps.double(), size, mode="bilinear", align_corners=False)
    exact = F.interpolate(maps, size, mode="bilinear", align_corners=False)
    for first in range(0, resized, band):
        rows = (first, min(first + band, resized))
        ours = resize(maps, size, rows)
        torch.testing.assert_close(ours.double(), whole[:, :, slice(*rows)], rtol=0, atol=3e-5)
        if resized == height:
            assert torch.equal(ours, exact[:, :, slice(*rows)])
        below, above = source_rows(height, resized, rows)
        assert torch.equal(resize_rows(maps[:, :, below:above], below, height, size, rows), ours), "needs no others"


def float64_page(model: Masks, image: Tensor, crop: int, stride: int, short: int, ratio: float,
                 mirrored: bool) -> Tensor:
    """Scores of one view in float64, one window after the other, on whole maps."""
    size = view_size((image.shape[1], image.shape[2]), short, ratio)
    view = F.interpolate(normalised(image), size, mode="bilinear", antialias=True).double()
    view = view.flip(3) if mirrored else view
    window = window_size(size, (crop, crop), 32)
    padded = (max(size[0], window[0]), max(size[1], window[1]))
    view = F.pad(view, (0, padded[1] - size[1], 0, padded[0] - size[0]))
    summed, visits = torch.zeros(4, *padded, dtype=torch.float64), torch.zeros(padded)
    for top, bottom, left, right in window_grid(padded, window, (stride, stride)):
        outputs = model(view[:, :, top:bottom, left:right])
        masks = F.interpolate(outputs["pred_masks"], window, mode="bilinear").sigmoid()[0]
        classes = outputs["pred_logits"].softmax(-1)[0, :, :-1]
        summed[:, top:bottom, left:right] += (classes.T @ masks.flatten(1)).view(4, *window)
        visits[top:bottom, left:right] += 1
    scores = F.interpolate((summed / visits)[None, :, :size[0], :size[1]], image.shape[1:], mode="bilinear")
    return scores.flip(3) if mirrored else scores


class DoubleMasks(Masks):
    """The same network, in the precision of its input."""

    def __call__(self, window: Tensor) -> dict[str, Tensor]:
        self.mix, self.classes = self.mix.to(window.dtype), self.classes.to(window.dtype)
        return super().__call__(window)


@pytest.mark.parametrize("size", [(100, 141), (150, 90), (64, 64), (40, 50)])
@pytest.mark.parametrize("mirrored", [False, True])
def test_scores_are_those_of_a_float64_computation(size: Size, mirrored: bool) -> None:
    image = photograph(*size)
    for short, ratio in ((min(size), 1.0), (96, 1.0), (80, 1.3)):
        predict = predictor(Masks(), 4, crop_size=64, stride=40, resize_short_side=short, tta_ratios=[ratio])
        [view_pixels] = [predict.view(image, each) for each in predict.view_sizes(size)]
        view = View(view_pixels, size, predict.rules, mirrored=mirrored)
        queue = WindowQueue(predict._run, 3)
        queue.add(view.windows)
        bands = []
        for first in range(0, size[0], 16):
            rows = (first, min(first + 16, size[0]))
            for window in view.needs(rows):
                queue.compute(window)
            bands.append(view.scores(rows, 4, predict._score_rows))
            view.close(rows[1])
        expected = float64_page(DoubleMasks(), image, 64, 40, short, ratio, mirrored)
        torch.testing.assert_close(torch.cat(bands, 2).double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"reference": "dinov3"}, {"tta_ratios": [0.8, 1.3], "tta_flip": True}],
                         ids=["plain", "reference", "views"])
def test_batches_and_bands_change_nothing(settings: dict[str, Any]) -> None:
    """Windows of images of several sizes, in batches of 1 to 100, with memory for 16 rows or for all."""
    images = [photograph(*size) for size in ((90, 120), (120, 90), (200, 70), (90, 120))]
    results, passes = [], []
    for batch, memory in ((1, 4.0), (3, 4.0), (100, 4.0), (3, 0.01)):
        model = Masks()
        predict = predictor(model, 4, crop_size=64, stride=40, resize_short_side=80, window_batch=batch,
                            memory_gb=memory, **settings)
        results.append([found.label_map for found in predict.segment(images)])
        passes.append((model.calls, len(model.windows)))
    for other in results[1:]:
        for ours, theirs in zip(results[0], other, strict=True):
            assert ours.shape == theirs.shape and (ours != theirs).float().mean() < 1e-3
    assert passes[0][0] == passes[0][1] and len({windows for _, windows in passes}) == 1
    assert passes[1][0] <= passes[0][0] / 2 and passes[2][0] <= 3


def test_several_images_are_what_each_is_alone() -> None:
    images = [photograph(90, 120), photograph(64, 64)]
    predict = predictor(Masks(), 4, crop_size=64, stride=40)
    alone = [predict(image) for image in images]
    assert all(map(torch.equal, alone, [found.label_map for found in predict.segment(images)]))


def test_confidence_and_probabilities_belong_to_the_prediction() -> None:
    image = photograph(70, 90)
    predict = predictor(Masks(), 4, crop_size=64, stride=40, tta_flip=True)
    plain, confidence, _ = next(predict.segment([image], "confidence"))
    label_map, _, probabilities = next(predict.segment([image], "probabilities"))
    assert torch.equal(plain, label_map) and torch.equal(plain, predict(image))
    assert probabilities is not None and confidence is not None
    torch.testing.assert_close(probabilities.float().sum(0), torch.ones(70, 90), rtol=0, atol=2e-3)
    chosen = probabilities.float().gather(0, label_map[None].long())[0]
    torch.testing.assert_close(confidence, chosen, rtol=0, atol=1e-3)
    assert confidence.min() >= 0.25 and confidence.max() <= 1


def views_of(size: Size, count: int = 1) -> list[View]:
    return [View(torch.zeros(1, 3, *size, dtype=torch.uint8), size, rules(512, 341)) for _ in range(count)]


def test_bands_fit_the_memory_and_an_image_that_cannot_is_refused() -> None:
    outputs: Any = {"pred_logits": torch.zeros(1, 100, 151), "pred_masks": torch.zeros(1, 100, 128, 128)}
    views = views_of((3648, 5472))
    memory = ScoreMemory(views, 150, outputs, 4, averages=False)
    for budget in (2e9, 4e9, 1e10):
        bands = memory.bands(int(budget))
        assert bands[0][0] == 0 and bands[-1][1] == 3648
        assert all(before[1] == after[0] for before, after in pairwise(bands))
        assert memory.total(bands[0][1]) <= budget
    whole = memory.total(3648)
    assert whole > 2e10, "what it would take at once"
    with pytest.raises(OutOfMemory, match=r"image of 5472x3648 pixels, 150 classes, 1 views.*eval\.memory_gb is 0\.1\. "
                       r"Raise it; set eval\.half_scores=true"):
        memory.bands(int(1e8))


def test_views_beyond_the_memory_are_refused_before_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """A single row of pixels whose height of 1 becomes 512, and its width 512 times as much."""
    monkeypatch.setattr(Predictor, "view", lambda *_: pytest.fail("it was resized"))
    strip = torch.zeros(3, 1, 128, dtype=torch.uint8)
    for settings in ({"resize_short_side": 512}, {"reference": "eomt", "crop_size": 512, "stride": 512}):
        predict = predictor(Masks(), 4, memory_gb=0.05, **settings)
        with pytest.raises(OutOfMemory, match=r"image of 128x1 pixels: its views, of up to 65536x512 pixels, take 0\..*"
                           r"eval\.memory_gb is 0\.05\. Raise it, or lower eval\.resize_short_side"):
            predict(strip)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_outputs_that_are_not_finite_are_no_prediction(value: float) -> None:
    class Diverged(Masks):
        def __call__(self, window: Tensor) -> dict[str, Tensor]:
            outputs = super().__call__(window)
            outputs["pred_masks"][-1, 0, 0, 0] = value
            return outputs

    with pytest.raises(RunError, match="outputs for a window of 64x64 pixels are not finite, so"):
        predictor(Diverged(), 4, crop_size=64, stride=40)(photograph(70, 90))


def test_windows_run_in_the_order_of_need() -> None:
    order: list[int] = []
    views = [View(torch.full((1, 3, 96, 32), float(number)), (96, 32), rules(32, 32)) for number in range(2)]
    queue = WindowQueue(lambda windows: order.append(len(windows)) or red_and_green(windows), 4)
    windows: list[Window] = [window for pair in zip(*(view.windows for view in views), strict=True) for window in pair]
    queue.add(windows)
    queue.compute(windows[0])
    assert [window.outputs is not None for window in windows] == [True] * 4 + [False] * 2
    queue.compute(windows[5])
    assert order == [4, 2]
