"""Tables of cells and curves as pictures that stand alone: the charts of `nkat explain` as PNG files, by Pillow."""

from collections.abc import Mapping, Sequence
from typing import Final

from PIL import Image, ImageDraw

from nkat_ray.report.attention import COLOUR_HEADS, LABEL_INKS, Array, font

INK, SOFT, GRID = "#1b1f24", "#57606a", "#e3e7ec"
CELL: Final = (64, 34)  # of a table, in pixels
PANEL: Final = (470, 260)  # of a chart, with its labels
MARGIN: Final = (62, 34, 28, 38)  # of a chart: left, top, right, bottom
TICKS: Final = 4  # intervals of the vertical axis
FIRST, LAST = (0, 114, 178), (230, 159, 0)  # blue to orange: told apart by colour-blind readers, light and dark


def block_colour(block: int, blocks: int) -> str:
    """The first block is blue, the last orange, those between lie between."""
    part = block / max(1, blocks - 1)
    mixed = (round(a + part * (b - a)) for a, b in zip(FIRST, LAST, strict=True))
    return "#" + "".join(f"{value:02x}" for value in mixed)


def cells(values: Array, *, low: float, high: float, title: str, split_heads: bool) -> Image.Image:
    """One number for each block (row) and head (column), darker blue where it is larger.

    Args:
        values: (L, H).
        low: value of the palest cell.
        high: value of the darkest.
        title: what the numbers are.
        split_heads: the heads of block 0 are labelled by colour.
    """
    blocks, heads = values.shape
    width, height = CELL
    left, above = 66, 56
    picture = Image.new("RGB", (left + heads * width + 8, above + (blocks + split_heads) * height + 8), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((8, 8), title, INK, font())
    for head in range(heads):
        draw.text((left + (head + 0.5) * width, above - 6), f"head {head}", SOFT, font(), anchor="ms")
        if split_heads:
            colour = COLOUR_HEADS[head]
            middle = (left + (head + 0.5) * width, above + 1.5 * height)
            draw.text(middle, colour, LABEL_INKS.get(colour, INK), font(), anchor="mm")
    for block in range(blocks):
        y = above + (block + (split_heads and block > 0)) * height
        draw.text((left - 8, y + height / 2), f"block {block}", SOFT, font(), anchor="rm")
        for head in range(heads):
            x, value = left + head * width, float(values[block, head])
            part = min(1.0, max(0.0, (value - low) / max(high - low, 1e-9)))
            shade = tuple(round(a + part * (b - a)) for a, b in zip((243, 246, 250), (86, 180, 233), strict=True))
            draw.rectangle((x, y, x + width - 2, y + height - 2), fill=shade)
            draw.text((x + width / 2, y + height / 2), f"{value:.2f}", "#111111", font(), anchor="mm")
    return picture


def lines(
    series: Mapping[str, Sequence[tuple[float, float]]],
    colours: Mapping[str, str],
    *,
    title: str,
    axis: str,
    mark: float | None = None,
) -> Image.Image:
    """Points joined by lines, each line named at its end.

    Args:
        series: name -> (x, y) by x; finite. At least one point in all.
        colours: name -> colour.
        title: what y is.
        axis: what x is.
        mark: an x at which a dashed line stands.
    """
    points = [point for values in series.values() for point in values]
    x0, x1 = _span([x for x, _ in points], least=1.0)
    y0, y1 = _span([y for _, y in points], least=1e-3)
    left, top, right, bottom = MARGIN
    width, height = PANEL

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            left + (x - x0) / (x1 - x0) * (width - left - right),
            height - bottom - (y - y0) / (y1 - y0) * (height - top - bottom),
        )

    picture = Image.new("RGB", PANEL, "white")
    draw = ImageDraw.Draw(picture)
    draw.text((left, 8), title, INK, font())
    for tick in range(TICKS + 1):
        y = y0 + (y1 - y0) * tick / TICKS
        draw.line((at(x0, y), at(x1, y)), GRID)
        draw.text((left - 6, at(x0, y)[1]), f"{y:.4g}", SOFT, font(), anchor="rm")
    for number in sorted({round(x0 + (x1 - x0) * tick / TICKS) for tick in range(TICKS + 1)}):
        draw.text((at(number, y0)[0], height - bottom + 6), str(number), SOFT, font(), anchor="mt")
    draw.text(((left + width - right) / 2, height - 4), axis, SOFT, font(), anchor="mb")
    if mark is not None:
        for dash in range(top, height - bottom, 8):
            draw.line((at(mark, y0)[0], dash, at(mark, y0)[0], dash + 4), SOFT)
    for name, values in series.items():
        if values:
            draw.line([at(*point) for point in values], colours[name], 2)
            for point in values:
                x, y = at(*point)
                draw.ellipse((x - 2, y - 2, x + 2, y + 2), colours[name])
            x, y = at(*values[-1])
            draw.text((x + 5, y), name, colours[name], font(), anchor="lm")
    return picture


def _span(values: Sequence[float], *, least: float) -> tuple[float, float]:
    """Smallest and largest value, moved apart where they are closer than `least`."""
    low, high = min(values), max(values)
    spare = max(0.0, least - (high - low)) / 2
    return low - spare, high + spare


def grid(pictures: Sequence[Image.Image], *, columns: int = 2) -> Image.Image:
    """Pictures in rows, on white, as wide and high as the largest."""
    width, height = max(p.width for p in pictures), max(p.height for p in pictures)
    rows = -(-len(pictures) // columns)
    canvas = Image.new("RGB", (width * min(columns, len(pictures)), height * rows), "white")
    for number, picture in enumerate(pictures):
        canvas.paste(picture, (number % columns * width, number // columns * height))
    return canvas
