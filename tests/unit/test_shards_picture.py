"""Pictures: colours by class, borders, ignored pixels, one tile per picture."""

from __future__ import annotations

import numpy as np

from shards.picture import colorize, contact_sheet, default_colors, overlay

COLORS = [(255, 0, 0), (0, 0, 255)]


def test_classes_get_their_colours_and_ignored_pixels_black() -> None:
    assert colorize(np.array([[0, 1, 255]], np.uint8), COLORS).tolist() == [[[255, 0, 0], [0, 0, 255], [0, 0, 0]]]
    assert colorize(np.array([[1, 65535]], np.uint16), COLORS).tolist() == [[[0, 0, 255], [0, 0, 0]]]


def test_overlays_mix_colour_and_image_leave_ignored_pixels_and_mark_borders() -> None:
    image = np.full((1, 5, 3), 100, np.uint8)
    mixed = overlay(image, np.array([[0, 0, 1, 255, 255]], np.uint8), COLORS)
    assert mixed[0, 0].tolist() == [177, 50, 50]
    assert mixed[0, 2].tolist() == [255, 255, 255] == mixed[0, 3].tolist()  # where the label changes
    assert mixed[0, 4].tolist() == [100, 100, 100]


def test_default_colours_are_distinct() -> None:
    assert len(set(default_colors(150))) == 150


def test_a_sheet_has_a_tile_for_every_picture() -> None:
    picture = np.zeros((10, 20, 3), np.uint8)
    sheet = contact_sheet([[picture, picture], [picture]], ["first", "second"], tile=40)
    assert sheet.width == 2 * 40 + 3 * 6
    pixels = np.asarray(sheet)
    assert (pixels[6:26, 6:46] == 0).all() and (pixels[6:26, 52:92] == 0).all()
    assert (pixels[-30:, 52:] == 255).all()  # the second row has one picture only
