"""Cut the pixels of a crop from an image."""

from __future__ import annotations

from PIL import Image

from shards.crops.drawing import Crop

# ImageNet mean colour: 0 after normalisation, like the reference's padding.
PADDING_COLOR = (124, 116, 104)


def cut_image(image: Image.Image, crop: Crop, side: int) -> Image.Image:
    """The crop of an RGB image (see `resized_crop`), padded right and below with the mean colour to `side`."""
    resized = resized_crop(image, crop)
    if resized.size == (side, side):
        return resized
    padded = Image.new("RGB", (side, side), PADDING_COLOR)
    padded.paste(resized)
    return padded


def resized_crop(image: Image.Image, crop: Crop) -> Image.Image:
    """The crop of an RGB image, without padding: bilinear with antialiasing.

    Pillow reads beyond `box` where the filter needs it, so up to rounding the result equals cropping the whole scaled
    image.
    """
    return image.resize((crop.width, crop.height), Image.Resampling.BILINEAR, source_box(image.size, crop))


def source_box(size: tuple[int, int], crop: Crop) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of the crop in pixels of the unscaled image, whose (width, height) is `size`."""
    width, height = size
    x_ratio, y_ratio = width / crop.scaled_width, height / crop.scaled_height
    return (
        crop.left * x_ratio,
        crop.top * y_ratio,
        min((crop.left + crop.width) * x_ratio, width),
        min((crop.top + crop.height) * y_ratio, height),
    )
