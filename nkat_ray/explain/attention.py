"""Attention weights as numbers and pictures: entropy, rollout, overlays. Pure functions on arrays.

Legend of shapes: L blocks, B images, H heads, N tokens on a square grid. Weights (..., N, N) are query, then key, and
their rows sum to 1.
"""

import io
import math
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Array = NDArray[Any]

COLOUR_HEADS: Final = ("red", "red", "green", "green", "blue", "blue", "all", "all")  # Split-Head Attention, block 0
SCALE: Final = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))  # viridis, dark to bright
HEAT_SHARE: Final = (0.45, 0.75)  # of an overlay's colour, least and most attention; the rest is the image in grey
TILE_EDGE: Final = 1  # transparent pixels around a tile
SHEET_ZOOM: Final = 3  # of the tiles on a sheet: a 32-pixel image becomes 96 pixels wide
LABEL_PX: Final = 15
LABEL_INKS: Final = {"red": "#b3261e", "green": "#1b6e2d", "blue": "#1f4fbf"}


def entropy(weights: Array) -> Array:
    """Return the Shannon entropy of each row in nats, 0 (one token) to log(N) (all alike): (..., N) -> (...)."""
    from scipy.special import entr  # imported here because it takes half a second

    total: Array = entr(weights).sum(-1) + 0.0  # there is no -0
    return total


def received(weights: Array) -> Array:
    """Return the attention that each token receives, the mean over queries: (..., N, N) -> (..., N), sums to 1."""
    mean: Array = weights.mean(-2)
    return mean


def rollout(weights: Array) -> Array:
    """Follow attention from the input through all blocks (Abnar and Zuidema, 2020, "Quantifying Attention Flow in
    Transformers", section 3).

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


def overlay(image: Array, shares: Array, *, top: float) -> Array:
    """Draw tokens' shares as colour, from dark violet (0) to yellow (`top` or more), over the image in grey.

    The colour follows the square root of the share, so that weak attention remains visible.

    Args:
        image: uint8 (side, side, 3).
        shares: (N,), N a square number whose root divides the side.
        top: share that is drawn brightest, > 0.

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
    anchors = np.linspace(0, 1, len(SCALE))
    colour = np.stack([np.interp(level, anchors, channel) for channel in zip(*SCALE, strict=True)], -1)
    part = np.interp(level, (0, 1), HEAT_SHARE)[..., None]
    grey = (image @ np.array([0.299, 0.587, 0.114]))[..., None]
    mixed: Array = part * colour + (1 - part) * grey
    return mixed.round().astype(np.uint8)


def strip(image: Array, shares: Array, *, top: float) -> Array:
    """Put the overlays of one block's heads side by side, each with a transparent edge of one pixel.

    Args:
        image: uint8 (side, side, 3).
        shares: (H, N).

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


def sheet(image: Array, shares: Array, *, split_heads: bool) -> Image.Image:
    """Draw all heads (columns) of all blocks (rows) with labels, on white: a picture for TensorBoard.

    Args:
        image: uint8 (side, side, 3).
        shares: (L, H, N).
        split_heads: block 0 has Split-Head Attention: its heads are labelled by colour.
    """
    rows = [enlarged(strip(image, block, top=float(shares.max())), SHEET_ZOOM) for block in shares]
    font = ImageFont.load_default(LABEL_PX - 2)
    left, above = 66, (2 if split_heads else 1) * LABEL_PX + 6
    width, height = rows[0].size
    canvas = Image.new("RGB", (left + width + 4, above + height * len(rows) + 4), "white")
    draw = ImageDraw.Draw(canvas)
    for head in range(shares.shape[1]):
        middle = left + width * (head + 0.5) / shares.shape[1]
        draw.text((middle, 2), f"head {head}", "black", font, anchor="ma")
        if split_heads:
            colour = COLOUR_HEADS[head]
            draw.text((middle, LABEL_PX + 4), colour, LABEL_INKS.get(colour, "black"), font, anchor="ma")
    for block, row in enumerate(rows):
        y = above + block * height
        draw.text((left - 6, y + height / 2), f"block {block}", "black", font, anchor="rm")
        canvas.paste(row, (left, y), row)
    return canvas


def enlarged(pixels: Array, zoom: int) -> Image.Image:
    """Convert uint8 (H, W, 3 or 4) to an image in which each pixel is a square of `zoom` pixels."""
    height, width = pixels.shape[:2]
    return Image.fromarray(pixels).resize((zoom * width, zoom * height), Image.Resampling.NEAREST)


def png(image: Image.Image | Array) -> bytes:
    """Encode a picture as PNG."""
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
