"""Cells and curves as pictures, by their pixels."""

import itertools

import numpy as np
import pytest
from PIL import Image, ImageColor

from nkat_ray.report.drawings import CELL, MARGIN, PANEL, block_colour, cells, grid, lines

BLUE, ORANGE = "#0072b2", "#e69f00"


def near(picture: Image.Image, colour: str, *, tolerance: int = 12) -> np.ndarray:
    """Where the picture has the colour, (H, W)."""
    return np.abs(np.asarray(picture).astype(int) - ImageColor.getrgb(colour)).max(-1) <= tolerance


def test_blocks_go_from_blue_to_orange() -> None:
    assert (block_colour(0, 7), block_colour(6, 7), block_colour(0, 1)) == (BLUE, ORANGE, BLUE)
    middle = ImageColor.getrgb(block_colour(3, 7))
    ends = zip(ImageColor.getrgb(BLUE), ImageColor.getrgb(ORANGE), strict=True)
    assert middle == tuple(round((a + b) / 2) for a, b in ends)


@pytest.mark.parametrize("split_heads", [False, True])
def test_cells_are_darker_where_the_value_is_larger(split_heads: bool) -> None:
    values = np.array([[0.0, 1.0, 2.0, 3.0], [3.0, 2.0, 1.0, 9.0]]).repeat(2, 1)
    picture = cells(values, low=0.0, high=3.0, title="entropy", split_heads=split_heads)
    pixels = np.asarray(picture).astype(int)
    width, height = CELL
    shown = {}
    for block, head in itertools.product(range(2), range(8)):
        y = picture.height - 8 - (2 - block - (0 if block else -int(split_heads))) * height + 3
        shown[block, head] = pixels[y, picture.width - 8 - (8 - head) * width + 3].tolist()
    pale, dark = [243, 246, 250], [86, 180, 233]
    assert shown[0, 0] == pale
    assert shown[0, 6] == shown[1, 0] == shown[1, 7] == dark  # 9 is above the largest
    assert shown[0, 2][0] > shown[0, 4][0] > shown[0, 6][0]
    assert near(picture, "#b3261e").any() == split_heads  # the word `red`


def test_points_lie_where_they_belong() -> None:
    picture = lines(
        {"0": [(0, 1.0), (10, 3.0)], "1": [(0, 3.0)]}, {"0": BLUE, "1": ORANGE}, title="alpha", axis="epoch"
    )
    left, top, right, bottom = MARGIN
    width, height = PANEL
    blue, orange = near(picture, BLUE), near(picture, ORANGE)
    assert blue[height - bottom, left]
    assert blue[top, width - right]
    assert orange[top, left]
    assert not orange[height - bottom, left]
    assert blue[top + (height - top - bottom) // 2].any()  # the line between


def test_one_point_and_equal_values_need_no_span() -> None:
    picture = lines({"0": [(3, 0.5)]}, {"0": BLUE}, title="beta", axis="block", mark=3)
    assert near(picture, BLUE)[MARGIN[1] : -MARGIN[3]].any()


def test_pictures_stand_in_rows() -> None:
    parts = [Image.new("RGB", size, colour) for size, colour in (((10, 6), "red"), ((8, 4), "green"), ((4, 2), "blue"))]
    made = grid(parts)
    assert made.size == (20, 12)
    assert [made.getpixel(at) for at in ((0, 0), (10, 0), (0, 6))] == [(255, 0, 0), (0, 128, 0), (0, 0, 255)]
    assert grid(parts[:1]).size == (10, 6)
