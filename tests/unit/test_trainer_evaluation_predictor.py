"""How predictions are computed, by our rules and those of published evaluations, against slow reimplementations."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from shards.errors import ConfigError
from tests.support.view_scores import view_scores
from trainer.config import EvalConfig, RunConfig, load_run_config
from trainer.evaluation.metrics import ConfusionMatrix
from trainer.evaluation.predictor import Predictor
from trainer.models.heads import MaskClassificationHead
from trainer.models.resizing import Rows, Size

CPU = torch.device("cpu")
MEAN, STD = RunConfig().backbone.image_mean, RunConfig().backbone.image_std


class Shades:
    """A network without context: class 0 scores the red channel, class 1 the green one. Records its inputs."""

    def __init__(self) -> None:
        self.windows: list[tuple[int, int]] = []
        self.calls = 0

    def __call__(self, window: Tensor) -> dict[str, Tensor]:
        self.windows += [(window.shape[2], window.shape[3])] * len(window)
        self.calls += 1
        return {"logits": window[:, :2]}

    def semantic_logits(self, outputs: dict[str, Tensor], size: Size, dtype: torch.dtype, rows: Rows) -> Tensor:
        return outputs["logits"][:, :, slice(*rows)]

    def probabilities(self, scores: Tensor) -> Tensor:
        return scores.softmax(1)


class Masks(Shades):
    """Queries whose masks and classes depend on position and colour, scored by the real head."""

    def __init__(self, queries: int = 6, classes: int = 4) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.mix = torch.randn(queries, 3, generator=generator)
        self.classes = torch.randn(1, queries, classes + 1, generator=generator)

    def __call__(self, window: Tensor) -> dict[str, Tensor]:
        super().__call__(window)
        coarse = F.avg_pool2d(window, 4)
        ramp = torch.linspace(-1, 1, coarse.shape[3]) + torch.linspace(0, 1, coarse.shape[2])[:, None]
        means = window.mean((1, 2, 3))[:, None, None]
        return {"pred_logits": self.classes + means, "pred_masks": torch.einsum("qk,bkhw->bqhw", self.mix,
                                                                                        coarse) + ramp}

    def semantic_logits(self, outputs: dict[str, Tensor], size: Size, dtype: torch.dtype, rows: Rows) -> Tensor:
        head: Any = MaskClassificationHead
        scores: Tensor = head.semantic_logits(self, outputs, size, dtype, rows)
        return scores


def predictor(model: Any, classes: int = 2, **settings: Any) -> Predictor:
    return Predictor(model, RunConfig(eval=EvalConfig(**settings)), classes, CPU)


def photograph(height: int, width: int) -> Tensor:
    """Smooth colours and noise, uint8 [3, H, W]."""
    generator = torch.Generator().manual_seed(height * 1000 + width)
    smooth = F.interpolate(torch.rand(1, 3, 5, 6, generator=generator), (height, width), mode="bicubic")[0]
    noise = torch.randn(3, height, width, generator=generator) * 0.05
    return ((smooth + noise).clamp(0, 1) * 255).to(torch.uint8)


def normalised(image: Tensor) -> Tensor:
    scale = torch.tensor(STD)[:, None, None]
    return ((image.float() / 255 - torch.tensor(MEAN)[:, None, None]) / scale)[None]


def by_pillow(image: Tensor, height: int, width: int) -> Tensor:
    resized = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


def dinov3_page(model: Masks, image: Tensor, classes: int, crop: int, stride: int, short: int,
                ratios: list[float]) -> Tensor:
    """The reference's evaluation, reimplemented from its documented behaviour: one window after the other."""
    height, width = image.shape[1:]
    sizes = []
    for ratio in ratios:
        side = int(short * ratio)
        side = math.ceil(side / 32) * 32 if ratio < 1 else side
        long = int(side * max(height, width) / min(height, width) + 0.5)
        sizes.append((side, long) if height <= width else (long, side))
    total = torch.zeros(1, classes, height, width)
    for flip in (False, True):
        for h, w in sizes:
            view = normalised(by_pillow(image, h, w))
            view = view.flip(3) if flip else view
            ch, cw = (min(h, w),) * 2 if h < crop and w < crop else (min(h, crop), min(w, crop))
            summed, visits = torch.zeros(1, classes, h, w), torch.zeros(h, w)
            for i in range(math.ceil(max(h - ch, 0) / stride) + 1):
                for j in range(math.ceil(max(w - cw, 0) / stride) + 1):
                    y2, x2 = min(i * stride + ch, h), min(j * stride + cw, w)
                    y1, x1 = max(y2 - ch, 0), max(x2 - cw, 0)
                    out = model(view[:, :, y1:y2, x1:x2])
                    probability = out["pred_logits"].softmax(-1)[..., :-1].bfloat16()
                    mask = F.interpolate(out["pred_masks"], (y2 - y1, x2 - x1), mode="bilinear").sigmoid().bfloat16()
                    summed[:, :, y1:y2, x1:x2] += torch.einsum("bqc,bqhw->bchw", probability, mask)
                    visits[y1:y2, x1:x2] += 1
            scores = F.interpolate(summed / visits, (height, width), mode="bilinear")
            total += (scores.flip(3) if flip else scores).softmax(1)
    return total.argmax(1)[0]


@pytest.mark.parametrize("size", [(90, 120), (120, 90), (61, 64), (200, 70), (64, 64)])
def test_dinov3_evaluation_is_followed_to_the_letter(size: tuple[int, int]) -> None:
    image, model = photograph(*size), Masks()
    ratios = [0.9, 1.0, 1.1]
    ours = predictor(model, 4, reference="dinov3", crop_size=96, stride=64, resize_short_side=96, tta_ratios=ratios,
                     tta_flip=True)(image)
    seen, model.windows = model.windows, []
    assert torch.equal(ours, dinov3_page(model, image, 4, 96, 64, 96, ratios))
    assert sorted(seen) == sorted(model.windows)
    plain = predictor(Masks(), 4, crop_size=96, stride=64, resize_short_side=96, tta_ratios=ratios, tta_flip=True)
    assert not torch.equal(plain(image), ours), "the rules differ, so a test can tell"


def test_near_square_views_below_the_crop_are_seen_through_squares() -> None:
    model = Shades()
    predictor(model, reference="dinov3", crop_size=128, stride=96, resize_short_side=96)(photograph(100, 110))
    assert model.windows == [(96, 96)] * 2  # stride 96 from 0, and shifted back: 106 columns
    model = Shades()
    predictor(model, crop_size=128, stride=96, resize_short_side=96)(photograph(100, 110))
    assert model.windows == [(96, 128)]  # ours: one, padded


@pytest.mark.parametrize("size", [(375, 500), (500, 375), (97, 301), (128, 128), (33, 500), (1000, 190)])
def test_eomt_evaluation_is_followed(size: tuple[int, int]) -> None:
    """Short side to the crop, both sides rounded half to even, windows spread evenly, one view."""
    image, model, crop = photograph(*size), Masks(), 128
    ours = predictor(model, 4, reference="eomt", crop_size=crop)(image)
    factor = max(crop / size[0], crop / size[1])
    height, width = (int(np.round(side * factor)) for side in size)
    view, long = normalised(by_pillow(image, height, width)), max(height, width)
    count = math.ceil(long / crop)
    overlap = count * crop - long
    summed, visits = torch.zeros(1, 4, height, width, dtype=torch.float64), torch.zeros(height, width)
    for j in range(count):
        start = int(j * (crop - overlap / (count - 1))) if count > 1 else 0
        rows, columns = slice(None), slice(start, start + crop)
        if height > width:
            rows, columns = columns, rows
        out = model(view[:, :, rows, columns])
        masks = F.interpolate(out["pred_masks"], (crop, crop), mode="bilinear").sigmoid().double()
        probability = out["pred_logits"].softmax(-1)[..., :-1].double()
        summed[:, :, rows, columns] += torch.einsum("bqc,bqhw->bchw", probability, masks)
        visits[rows, columns] += 1
    expected = F.interpolate(summed / visits.clamp(min=1), size, mode="bilinear").argmax(1)[0]
    assert (ours != expected).float().mean() < 1e-4  # ties of float32 and float64
    assert set(model.windows) == {(crop, crop)}


def test_absent_classes_count_as_zero_for_eomt() -> None:
    matrix = ConfusionMatrix(4, ignore_index=255)
    matrix.update(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 1, 0]))  # classes 2 and 3 occur nowhere
    assert matrix.summary()["mIoU"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert matrix.summary(absent_as_zero=True)["mIoU"] == pytest.approx((2 / 3 + 1 / 2) / 4)


def test_whole_images_keep_their_aspect_ratio() -> None:
    model = Shades()
    predictor(model, mode="whole", resize_short_side=64)(photograph(100, 250))
    assert model.windows == [(64, 160)]


def test_mirrored_views_are_mirrored_back() -> None:
    view = torch.rand(1, 3, 40, 50)
    predict = predictor(Shades(), crop_size=32, stride=16)
    plain = view_scores(predict, view, (20, 30), False)
    torch.testing.assert_close(plain, view_scores(predict, view.flip(3), (20, 30), True))
    assert (plain - view_scores(predict, view.flip(3), (20, 30), False)).abs().max() > 0.1  # control


def test_every_view_is_seen() -> None:
    image = torch.zeros(3, 100, 128, dtype=torch.uint8)
    image[0, :, :64] = image[1, :, 64:] = 255
    model = Shades()
    predict = predictor(model, mode="whole", resize_short_side=64, tta_ratios=[0.4, 1.0, 1.5], tta_flip=True)
    labels = predict(image)
    assert sorted(width for _, width in model.windows) == [64, 64, 96, 96, 128, 128]
    assert labels.dtype == torch.uint8 and labels.shape == (100, 128)
    assert labels[:, :64].eq(0).all() and labels[:, 64:].eq(1).all()


def test_one_plain_view_is_plain_sliding_inference() -> None:
    image = photograph(40, 70)
    labels = predictor(Shades(), crop_size=32, stride=16)(image)
    assert torch.equal(labels, normalised(image)[0, :2].argmax(0))


def test_a_window_that_the_network_refuses_names_the_settings() -> None:
    class Refusing(Shades):
        def __call__(self, window: Tensor) -> dict[str, Tensor]:
            raise ValueError("images are 96x81 pixels, legal: multiples of 32")

    with pytest.raises(ConfigError, match=r"eval.reference=dinov3 cuts a window.*96x81.*eval.resize_short_side"):
        predictor(Refusing(), reference="dinov3", crop_size=96, stride=96)(photograph(200, 81))


@pytest.mark.parametrize(("overrides", "message"), [
    (["eval.reference=dinov4"], "eval.reference is 'dinov4', legal: dinov3, eomt; did you mean 'dinov3'"),
    (["eval.reference=dinov3", "eval.mode=whole"], "eval.mode is whole, legal with eval.reference=dinov3: slide"),
    (["eval.reference=eomt", "eval.tta_flip=true"], "eval.tta_flip is True, legal with eval.reference=eomt: False"),
    (["eval.reference=eomt", "eval.tta_ratios=[1.0]"], "eval.tta_ratios"),
    (["eval.reference=eomt", "eval.resize_short_side=640"], "legal with eval.reference=eomt: None or 512"),
])
def test_settings_that_contradict_the_reference_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_run_config(None, overrides)
