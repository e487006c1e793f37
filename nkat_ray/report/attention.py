"""Attention weights as numbers and pictures: entropy, rollout, overlays. Pure functions on arrays.

Legend of shapes: L blocks, B images, H heads, N tokens on a square grid. Weights (..., N, N) are query, then key, and
their rows sum to 1.
"""

import io
import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Array = NDArray[Any]

COLOUR_HEADS: Final = ("red", "red", "green", "green", "blue", "blue", "all", "all")  # Split-Head Attention, block 0
SCALE: Final = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))  # viridis, dark to bright
HEAT_SHARE: Final = (0.45, 0.75)  # of an overlay's colour, least and most attention; the rest is the image in grey
TILE_EDGE: Final = 1  # transparent pixels around a tile
FILE_ZOOM: Final = 3  # of the tiles in a file: a 32-pixel image becomes 96 pixels wide
LABEL_PX: Final = 15
LABEL_INKS: Final = {"red": "#b3261e", "green": "#1b6e2d", "blue": "#1f4fbf"}


def entropy(weights: Array) -> Array:
    """Shannon entropy in nats of each row: (..., N) -> (...). 0 looks at one token, log(N) at all alike."""
    safe = np.where(weights > 0, weights, 1.0)  # 0 log 0 = 0
    total: Array = np.abs((safe * np.log(safe)).sum(-1))  # of what is never above 0; so there is no -0
    return total


def received(weights: Array) -> Array:
    """What each token is given, as the mean over queries: (..., N, N) -> (..., N), sums to 1."""
    mean: Array = weights.mean(-2)
    return mean


def rollout(weights: Array) -> Array:
    """Attention rollout (Abnar and Zuidema, 2020, "Quantifying Attention Flow in Transformers", section 3).

    A block's heads are averaged, half of the identity stands for the residual branch, and the blocks are multiplied.

    Args:
        weights: (L, ..., H, N, N), the first block first.

    Returns:
        (..., N, N): the share of each input token (last axis) in each output token; rows sum to 1.
    """
    tokens = weights.shape[-1]
    flow = np.broadcast_to(np.eye(tokens), (*weights.shape[1:-3], tokens, tokens))
    for block in weights.mean(-3):
        flow = (0.5 * block + 0.5 * np.eye(tokens)) @ flow
    return flow


def largest_entropy(tokens: int, top_k: int | None) -> float:
    """Entropy in nats of a query that looks at all it may, evenly."""
    return math.log(min(tokens, top_k or tokens))


def overlay(image: Array, shares: Array, *, top: float) -> Array:
    """The image in grey under its tokens' shares as colour, dark violet (0) to yellow (`top` and more).

    The colour goes by the square root of the share, so that weak attention is still told from none.

    Args:
        image: uint8 (side, side, 3).
        shares: (N,), N a square number whose root divides the side.
        top: share that is brightest, > 0.

    Returns:
        uint8 (side, side, 3).

    Raises:
        ValueError: the tokens do not lie on a grid over the image.
    """
    grid = math.isqrt(len(shares))
    if grid**2 != len(shares) or image.shape[0] % grid or image.shape[0] != image.shape[1]:
        raise ValueError(f"{len(shares)} tokens are no square grid over an image of {image.shape[0]}x{image.shape[1]}")
    cell = image.shape[0] // grid
    level = np.sqrt(shares / top).clip(0, 1).reshape(grid, grid).repeat(cell, 0).repeat(cell, 1)
    part = np.interp(level, (0, 1), HEAT_SHARE)[..., None]
    grey = (image @ np.array([0.299, 0.587, 0.114]))[..., None]
    mixed: Array = part * _coloured(level) + (1 - part) * grey
    return mixed.round().astype(np.uint8)


def _coloured(values: Array) -> Array:
    """Values (...) in 0..1 as colours (..., 3) in 0..255."""
    anchors = np.linspace(0, 1, len(SCALE))
    channels = [np.interp(values, anchors, channel) for channel in zip(*SCALE, strict=True)]
    return np.stack(channels, -1)


def strip(image: Array, shares: Array, *, top: float) -> Array:
    """The overlays of one block's heads side by side, each in a transparent edge of one pixel.

    Args:
        image: uint8 (side, side, 3).
        shares: (H, N).
        top: as in `overlay`.

    Returns:
        uint8 (side + 2, H * (side + 2), 4).
    """
    side = image.shape[0]
    tiles = np.zeros((side + 2 * TILE_EDGE, len(shares), side + 2 * TILE_EDGE, 4), np.uint8)
    inside = slice(TILE_EDGE, TILE_EDGE + side)
    for head, share in enumerate(shares):
        tiles[inside, head, inside, :3] = overlay(image, share, top=top)
        tiles[inside, head, inside, 3] = 255
    return tiles.reshape(len(tiles), -1, 4)


def sheet(image: Array, shares: Array, *, top: float, split_heads: bool, title: str = "") -> Image.Image:
    """All heads (columns) of all blocks (rows) with labels, on white: a picture that stands alone.

    Args:
        image: uint8 (side, side, 3).
        shares: (L, H, N).
        top: as in `overlay`.
        split_heads: block 0 has Split-Head Attention: its heads are labelled by colour.
        title: one line above them, if any.
    """
    rows = [Image.fromarray(strip(image, block, top=top), "RGBA") for block in shares]
    width, height = (FILE_ZOOM * size for size in rows[0].size)
    left, first = 66, LABEL_PX + 5 if title else 2
    above = first + (2 * LABEL_PX + 6 if split_heads else LABEL_PX + 4)
    full = max(left + width, int(font().getlength(title)) + 4)
    canvas = Image.new("RGB", (full + 4, above + height * len(rows) + 4), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((4, 2), title, "black", font())
    columns = shares.shape[1]
    for head in range(columns):
        middle = left + width * (head + 0.5) / columns
        _label(draw, (middle, first), f"head {head}")
        if split_heads:
            _label(
                draw, (middle, first + LABEL_PX + 2), COLOUR_HEADS[head], LABEL_INKS.get(COLOUR_HEADS[head], "black")
            )
    for block, row in enumerate(rows):
        y = above + block * height
        draw.text((left - 6, y + height / 2), f"block {block}", "black", font(), anchor="rm")
        large = row.resize((width, height), Image.Resampling.NEAREST)
        canvas.paste(large, (left, y), large)
    return canvas


def _label(draw: ImageDraw.ImageDraw, at: tuple[float, float], text: str, ink: str = "black") -> None:
    draw.text(at, text, ink, font(), anchor="ma")


def font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """What labels are written in."""
    return ImageFont.load_default(LABEL_PX - 2)


def enlarged(pixels: Array, zoom: int) -> Image.Image:
    """uint8 (H, W, 3 or 4) as an image, each pixel `zoom` wide."""
    height, width = pixels.shape[:2]
    return Image.fromarray(pixels).resize((zoom * width, zoom * height), Image.Resampling.NEAREST)


def side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    """Images of one height in a row, on white."""
    gap = 8
    canvas = Image.new("RGB", (sum(i.width for i in images) + gap * (len(images) - 1), images[0].height), "white")
    x = 0
    for image in images:
        canvas.paste(image, (x, 0))
        x += image.width + gap
    return canvas


def png(image: Image.Image | Array) -> bytes:
    """A picture as a PNG file."""
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
