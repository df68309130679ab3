"""Images: the fast JPEG path gives the same pixels as Pillow, and leaves unusual files to Pillow."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from shards import sample
from shards.errors import CorruptShardError
from shards.sample import decode_by_pillow, decode_image


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth colours with noise."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize((width, height))
    noise = rng.integers(-20, 20, (height, width, 3))
    return Image.fromarray((np.asarray(coarse).astype(int) + noise).clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image, **options: object) -> bytes:
    with io.BytesIO() as stream:
        image.save(stream, "JPEG", **options)
        return stream.getvalue()


@given(height=st.integers(1, 70), width=st.integers(1, 70), quality=st.integers(1, 100),
       subsampling=st.sampled_from(["4:4:4", "4:2:2", "4:2:0"]), progressive=st.booleans(),
       mode=st.sampled_from(["RGB", "L", "CMYK"]), seed=st.integers(0, 9))
def test_every_jpeg_has_the_pixels_that_pillow_gives(height: int, width: int, quality: int, subsampling: str,
                                                     progressive: bool, mode: str, seed: int) -> None:
    data = jpeg(picture(height, width, seed).convert(mode), quality=quality, subsampling=subsampling,
                progressive=progressive)
    found = decode_image(data, "it", (height, width))
    assert found.dtype == np.uint8 and (found == decode_by_pillow(data, "it")).all()


def test_plain_jpegs_do_not_pass_through_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(sample, "decode_by_pillow")
    assert decode_image(jpeg(picture(40, 30)), "it").shape == (40, 30, 3)


@given(data=st.data())
def test_a_damaged_jpeg_is_what_pillow_says_it_is(data: st.DataObject) -> None:
    """Truncated or damaged: both give the same pixels, or both an error naming the file."""
    changed = bytearray(jpeg(picture(48, 64)))
    for _ in range(data.draw(st.integers(0, 3))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    broken = bytes(changed[: data.draw(st.integers(1, len(changed)))])
    try:
        expected = decode_by_pillow(broken, "it")
    except CorruptShardError:
        with pytest.raises(CorruptShardError, match="it"):
            decode_image(broken, "it")
    else:
        assert (decode_image(broken, "it") == expected).all()


def test_another_size_than_the_masks_is_refused_by_both_sizes() -> None:
    with pytest.raises(CorruptShardError, match="image of it is 40x30, its masks are 30x40"):
        decode_image(jpeg(picture(40, 30)), "it", (30, 40))


def test_real_photographs_have_the_pixels_that_pillow_gives(shared_data: Path) -> None:
    paths = sorted(shared_data.rglob("*.jpg"))[:8]
    assert paths
    for path in paths:
        assert (decode_image(path.read_bytes(), path.name) == decode_by_pillow(path.read_bytes(), path.name)).all()
