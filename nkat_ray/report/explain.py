"""The page and the pictures of `nkat explain`: what a network looked at, on some images and on average."""

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from PIL import Image

from nkat_ray.metrics import EPOCH, NKAT_SCALARS, VAL_ACCURACY
from nkat_ray.report import attention, drawings
from nkat_ray.report.attention import COLOUR_HEADS, Array
from nkat_ray.report.charts import Figure
from nkat_ray.report.page import Page, escaped, table

PAGE_FILE: Final = "explain.html"
PICTURES: Final = "image_*.png"  # what an earlier call left is removed by this pattern
HEADS_FILE, PARAMETERS_FILE = "heads.png", "parameters.png"
PAGE_ZOOM: Final = 4  # of the image and its rollout: 32 pixels become 128; the heads are enlarged by the browser
ROW_PX: Final = 34  # of a block in a chart
CELLS: Final = ((0, "#f3f6fa"), (1, "#56B4E9"))  # dark text is readable on all of it, on a light page and a dark one
LINES: Final = (("#0072B2", "circle"), ("#E69F00", "square"))
STARTS: Final = {"alpha": 0.1, "beta": 0.05, "attention_gain": 1.0, "mlp_gain": 1.0}  # docs/spec.md section 3
TITLES: Final = {
    "alpha": "alpha", "beta": "beta", "attention_gain": "residual scalar of the attention",
    "mlp_gain": "residual scalar of the MLP",
}  # fmt: skip

STYLE: Final = """
.example { border-top: 1px solid var(--line); padding: 14px 0 18px; break-inside: avoid; }
.example h3 { margin: 0; } .example h3 span { font-weight: 400; }
.looks { display: grid; grid-template-columns: 280px minmax(0, 1fr); gap: 12px 28px; margin-top: 8px; }
.seen { display: grid; grid-template-columns: 1fr 1fr; gap: 8px; align-content: start; }
.seen figure { margin: 0; } .seen figcaption { color: var(--soft); font-size: 0.85rem; line-height: 1.35; }
.seen img, .heads img { display: block; width: 100%; image-rendering: pixelated; }
.heads { display: grid; align-items: center; font-size: 0.85rem; color: var(--soft); line-height: 1.3; }
.heads > div { text-align: center; } .heads > .row { text-align: right; padding-right: 8px; white-space: nowrap; }
.heads .tag { justify-self: center; width: calc(100% - 3px); border-bottom: 3px solid var(--line); color: var(--ink); }
.heads .red { border-color: #d5362b; } .heads .green { border-color: #2f9e44; } .heads .blue { border-color: #3b6fd9; }
h4 { font-size: 0.92rem; font-weight: 600; margin: 12px 0 0; }
.key { display: flex; align-items: center; gap: 8px; color: var(--soft); font-size: 0.92rem; flex-wrap: wrap; }
.key i { width: 120px; height: 12px; border-radius: 2px; print-color-adjust: exact;
  background: linear-gradient(to right, #440154, #3b528b, #21918c, #5ec962, #fde725); }
@media (max-width: 760px) { .looks { grid-template-columns: minmax(0, 1fr); } .seen { max-width: 300px; }
  .heads, .heads .tag { font-size: 0.7rem; } .heads > .row { padding-right: 4px; } .long { display: none; } }
"""


@dataclass(frozen=True)
class Example:
    """One image, what the network said of it, and the attention weights of that very pass."""

    caption: str
    """Where the image comes from."""
    image: Array
    """uint8 (side, side, 3), as the network saw it."""
    truth: str | None
    """Its class, where it is known."""
    ranked: Sequence[tuple[str, float]]
    """The most probable classes and their probabilities, best first."""
    weights: Array
    """(L, H, N, N)."""

    @property
    def right(self) -> bool | None:
        """Whether the prediction is the true class; None where that is not known."""
        return None if self.truth is None else self.ranked[0][0] == self.truth


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """All that the page shows."""

    name: str
    examples: Sequence[Example]
    entropy: Array
    """(L, H), nats, the mean over queries and `averaged` images."""
    kept: Array
    """(L, H), tokens, the mean over the same."""
    averaged: int
    right: int | None
    """How many of those the network has right; None where that is not known."""
    what: str
    """What those images are, in the plural."""
    tokens: int
    top_k: int | None
    split_heads: bool
    scalars: Mapping[str, Sequence[float]]
    """Block by block: alpha, beta, attention_gain, mlp_gain, strength."""
    history: Sequence[Mapping[str, Any]]
    """The epochs of this model's training, as in curves.parquet, by epoch; empty where they were not found."""
    epoch: int
    """The epoch whose weights these are."""
    facts: Mapping[str, str]
    """About the model, its data and the checks that were made."""


def write_explanation(found: Explanation, out: Path) -> Path:
    """Write the page and its pictures (two PNG files an image, heads.png and parameters.png) into a folder that
    exists; returns the page's path."""
    for old in out.glob(PICTURES):
        old.unlink()
    for number, example in enumerate(found.examples, 1):
        shares = attention.received(example.weights)
        heads = attention.sheet(
            example.image, shares, top=float(shares.max()), split_heads=found.split_heads, title=_title(example)
        )
        (out / f"image_{number:02}-heads.png").write_bytes(attention.png(heads))
        (out / f"image_{number:02}-rollout.png").write_bytes(attention.png(_rollout_picture(example)))
    (out / HEADS_FILE).write_bytes(attention.png(_heads_picture(found)))
    (out / PARAMETERS_FILE).write_bytes(attention.png(_parameters_picture(found)))
    return explanation_page(found).save(out / PAGE_FILE)


def _title(example: Example) -> str:
    """What a picture of an example says above it."""
    said = f"predicted {example.ranked[0][0]} ({example.ranked[0][1]:.2f})"
    if example.right is None:
        return said
    return f"{said}: right" if example.right else f"{said}: wrong, it is {example.truth}"


def _heads_picture(found: Explanation) -> Image.Image:
    """Entropy and kept tokens of each head, as the page has them."""
    limit, most = _limits(found)
    entropy = drawings.cells(
        found.entropy, low=0.0, high=limit, split_heads=found.split_heads, title=f"entropy, nats (at most {limit:.2f})"
    )
    kept = drawings.cells(
        found.kept, low=1.0, high=float(most), split_heads=found.split_heads, title=f"kept tokens (at most {most})"
    )
    return drawings.grid([entropy, kept])


def _parameters_picture(found: Explanation) -> Image.Image:
    """Each kind of NKAT scalar over the blocks, and below over the epochs where they are known."""
    blocks = len(found.scalars["alpha"])
    colours = {name: LINES[n % 2][0] for n, name in enumerate(NKAT_SCALARS)}
    panels = [
        drawings.lines({"": list(enumerate(found.scalars[name]))}, {"": colours[name]}, title=TITLES[name],
                       axis="block")
        for name in NKAT_SCALARS
    ]  # fmt: skip
    panels += [
        drawings.lines(
            {str(block): points for block, points in enumerate(_over_epochs(found.history, name, blocks))},
            {str(block): drawings.block_colour(block, blocks) for block in range(blocks)},
            title=f"{TITLES[name]}, a line a block",
            axis="epoch",
            mark=found.epoch,
        )
        for name in NKAT_SCALARS
        if found.history
    ]
    return drawings.grid(panels)


def _over_epochs(history: Sequence[Mapping[str, Any]], name: str, blocks: int) -> list[list[tuple[float, float]]]:
    """For each block the points (epoch, value), from where training starts; epochs without values are left out."""
    known = [row for row in history if row.get(name)]
    return [
        [(0.0, STARTS[name]), *((float(row[EPOCH]), float(row[name][block])) for row in known)]
        for block in range(blocks)
    ]


def _limits(found: Explanation) -> tuple[float, int]:
    """The largest entropy, and the most tokens, that the filter leaves a query."""
    return (
        attention.largest_entropy(found.tokens, found.top_k),
        min(found.tokens, found.top_k or found.tokens),
    )


def _rollout_picture(example: Example) -> Image.Image:
    """The image beside its rollout."""
    shares = _rollout_shares(example)
    over = attention.overlay(example.image, shares, top=float(shares.max()))
    return attention.side_by_side([attention.enlarged(part, 8) for part in (example.image, over)])


def _rollout_shares(example: Example) -> Array:
    """(N,): each token's share in the mean over output tokens, which is what the head reads."""
    return attention.received(attention.rollout(example.weights))


def explanation_page(found: Explanation) -> Page:
    """The page, section by section."""
    page = Page(f"{found.name}: what it looks at")
    page.add(f"<style>{STYLE}</style>")
    page.add(f'<h1>NKAT-Ray: what {escaped(found.name)} looks at</h1>\n<p class="verdict">{_sentence(found)}</p>')
    page.add(_how_to_read(found))
    groups = {"Images that it has right": True, "Images that it has wrong": False, "Images": None}
    for title, right in groups.items():
        page.section(title, *(_example(item, found) for item in found.examples if item.right is right))
    page.section("Heads on average", *_heads(found, page))
    page.section("NKAT parameters", *_scalars(found, page))
    rows = [[escaped(key), escaped(value)] for key, value in found.facts.items()]
    page.section("The model, its data, and what was checked", table(["what", "value"], rows))
    return page


def _sentence(found: Explanation) -> str:
    looks = f"a query looks at {found.kept.mean():.1f} of {found.tokens} tokens on average"
    if found.right is None:
        return escaped(looks[0].upper() + looks[1:] + ".")
    return escaped(f"{found.right} of {found.averaged} {found.what} are right; {looks}.")


def _how_to_read(found: Explanation) -> str:
    split = (
        " In block 0 (Split-Head Attention) heads 0-1 see red alone, 2-3 green, 4-5 blue, and 6-7 all three."
        if found.split_heads
        else ""
    )
    return (
        '<p class="key"><span>little attention</span><i></i><span>much</span></p>'
        '<p class="soft">A square of an overlay is a token. Its colour is the attention that it is given, the mean '
        "over all queries, on a square-root scale that the heads of one image share. The rollout follows attention "
        "from the input through all blocks (Abnar and Zuidema, 2020). Both come from the pass that made the prediction."
        f"{split}</p>"
    )


def _example(example: Example, found: Explanation) -> str:
    ranked = ", ".join(f"{name} {share:.2f}" for name, share in example.ranked)
    return (
        f'<article class="example"><h3>{_said(example)}</h3>\n'
        f'<p class="soft">{escaped(ranked)} &middot; {escaped(example.caption)}</p>\n'
        f'<div class="looks">{_seen(example, found)}{_head_grid(example, found)}</div></article>'
    )


def _said(example: Example) -> str:
    said = escaped(example.ranked[0][0])
    if example.right is None:
        return said
    if example.right:
        return f'{said} <span class="good">&#10003; right</span>'
    return f'{escaped(example.truth)}, taken for {said} <span class="bad">&#10007; wrong</span>'


def _seen(example: Example, found: Explanation) -> str:
    shares = _rollout_shares(example)
    over = attention.overlay(example.image, shares, top=float(shares.max()))
    rollout = f"rollout, yellow = {_times_even(float(shares.max()), found.tokens)}"
    return f'<div class="seen">{_figure(example.image, "as the network sees it")}{_figure(over, rollout)}</div>'


def _times_even(share: float, tokens: int) -> str:
    return f"{share * tokens:.1f} x an even share"


def _figure(pixels: Array, caption: str) -> str:
    picture = attention.png(attention.enlarged(pixels, PAGE_ZOOM))
    return f"<figure>{_img(picture, caption)}<figcaption>{escaped(caption)}</figcaption></figure>"


def _img(data: bytes, said: str) -> str:
    return f'<img alt="{escaped(said)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'


def _head_grid(example: Example, found: Explanation) -> str:
    """Heads as columns, blocks as rows; a block's heads are one picture."""
    shares = attention.received(example.weights)
    blocks, heads, _ = shares.shape
    top = float(shares.max())
    cells = ["<div></div>", *(f'<div><span class="long">head </span>{head}</div>' for head in range(heads))]
    if found.split_heads:
        cells += ["<div></div>", *(f'<div class="tag {colour}">{colour}</div>' for colour in COLOUR_HEADS)]
    for block in range(blocks):
        picture = attention.png(attention.strip(example.image, shares[block], top=top))
        said = f"attention of the {heads} heads of block {block}"
        cells.append(f'<div class="row"><span class="long">block </span>{block}</div>')
        cells.append(f'<div style="grid-column: 2 / -1">{_img(picture, said)}</div>')
    columns = f"max-content repeat({heads}, minmax(0, 96px))"
    scale = f'<p class="soft">heads, yellow = {_times_even(top, found.tokens)}</p>'
    return f'<div><div class="heads" style="grid-template-columns: {columns}">{"".join(cells)}</div>{scale}</div>'


def _heads(found: Explanation, page: Page) -> list[str]:
    """Entropy and kept tokens as two heatmaps."""
    limit, most = _limits(found)
    note = (
        f'<p class="soft">Means over all queries and {found.averaged} {escaped(found.what)}. '
        f"The filter lets a query look at {most} of {found.tokens} tokens at most; spread evenly over those, its "
        f"entropy is {limit:.2f} nats. 0 nats is one token.</p>"
    )
    entropy = heatmap(found.entropy, low=0.0, high=limit, unit="nats", split_heads=found.split_heads)
    kept = heatmap(found.kept, low=1.0, high=float(most), unit="tokens", split_heads=found.split_heads)
    return [
        note,
        f'<div class="pair"><div><h3>Entropy, nats</h3>{page.chart(entropy, "Entropy of each head")}</div>'
        f"<div><h3>Kept tokens</h3>{page.chart(kept, 'Tokens that each head keeps')}</div></div>",
    ]


def heatmap(values: Array, *, low: float, high: float, unit: str, split_heads: bool) -> Figure:
    """One value for each block (rows, 0 on top) and head (columns), written into its cell."""
    blocks, heads = values.shape
    said = [[""] * heads for _ in range(blocks)]
    if split_heads:
        said[0] = list(COLOUR_HEADS)
    data = {
        "type": "heatmap",
        "z": values.tolist(),
        "x": [str(head) for head in range(heads)],
        "y": [f"block {block}" for block in range(blocks)],
        "customdata": [[f" ({colour})" if colour else "" for colour in row] for row in said],
        "text": [[f"{v:.2f}<br>{colour}" if colour else f"{v:.2f}" for v, colour in zip(*row, strict=True)]
                 for row in zip(values, said, strict=True)],
        "texttemplate": "%{text}",
        "zmin": low,
        "zmax": max(high, low + 1e-9),
        "textfont": {"color": "#111111"},
        "colorscale": CELLS,
        "showscale": False,
        "xgap": 2,
        "ygap": 2,
        "hovertemplate": f"%{{y}}, head %{{x}}%{{customdata}}: %{{z:.3f}} {html.escape(unit)}<extra></extra>",
    }  # fmt: skip
    layout = {
        "xaxis": {"title": {"text": "head"}, "type": "category", "automargin": True, "showgrid": False},
        "yaxis": {"title": {"text": ""}, "type": "category", "autorange": "reversed", "automargin": True,
                  "showgrid": False},
        "margin": {"l": 56, "r": 4, "t": 8, "b": 44},
        "dragmode": False,
    }  # fmt: skip
    return {"data": [data], "layout": layout, "height": 64 + ROW_PX * (blocks + (1 if split_heads else 0))}


def _scalars(found: Explanation, page: Page) -> list[str]:
    """The learned scalars over the blocks, and how much the modulation can do with them."""
    names = found.scalars
    reach = max(
        strength * (abs(alpha) + abs(beta))
        for strength, alpha, beta in zip(names["strength"], names["alpha"], names["beta"], strict=True)
    )
    note = (
        '<p class="soft">The modulation multiplies the attention output of a token by 1 + strength x (alpha x tanh + '
        f"beta x sigmoid): with these values that changes it by at most {100 * reach:.3g} %. A dashed line is where "
        "training starts.</p>"
    )
    modulation = _lines({"alpha": names["alpha"], "beta": names["beta"]}, starts=(0.1, 0.05))
    gains = _lines({"attention": names["attention_gain"], "MLP": names["mlp_gain"]}, starts=(1.0, 1.0))
    return [
        note,
        "<h3>Over the blocks</h3>",
        f'<div class="pair"><div><h4>alpha and beta</h4>{page.chart(modulation, "alpha and beta by block")}</div>'
        f"<div><h4>Residual scalars</h4>{page.chart(gains, 'Residual scalars by block')}</div></div>",
        *_gauge(found, page),
    ]


def _gauge(found: Explanation, page: Page) -> list[str]:
    """The same scalars over the epochs of the training ("gauge parameters"), a chart a kind, a line a block."""
    if not found.history:
        return [
            '<h3>Over the epochs</h3><p class="soft">Not known: no curves.parquet above the model has an epoch with '
            "these values. A run and nkat train write one.</p>"
        ]
    best = next((row[VAL_ACCURACY] for row in found.history if row[EPOCH] == found.epoch), None)
    note = (
        f'<p class="soft">After each epoch, from where training starts (epoch 0). Blue is block 0, orange the last '
        f"block. The dashed line is epoch {found.epoch}, whose weights these are"
        f"{'' if best is None else f' (validation accuracy {best:.4f})'}.</p>"
    )
    blocks = len(found.scalars["alpha"])
    charts = "".join(
        f"<div><h4>{TITLES[name]}</h4>"
        f"{page.chart(epochs_chart(found, name, blocks), f'{TITLES[name]} over the epochs')}</div>"
        for name in NKAT_SCALARS
    )
    return [f'<h3>Over the epochs</h3>{note}<div class="pair">{charts}</div>']


def epochs_chart(found: Explanation, name: str, blocks: int) -> Figure:
    """One kind of scalar over the epochs, a line a block; the first and the last are named at their ends."""
    data: list[dict[str, Any]] = []
    for block, points in enumerate(_over_epochs(found.history, name, blocks)):
        named = block in (0, blocks - 1)
        data.append(
            {
                "type": "scatter", "mode": "lines+markers+text" if named else "lines+markers", "name": f"block {block}",
                "x": [x for x, _ in points], "y": [y for _, y in points], "textposition": "middle right",
                "text": [""] * (len(points) - 1) + [f" {block}"], "cliponaxis": False,
                "line": {"color": drawings.block_colour(block, blocks), "width": 2}, "marker": {"size": 5},
                "hovertemplate": f"block {block}, epoch %{{x}}: %{{y:.4f}}<extra></extra>",
            }
        )  # fmt: skip
    layout = {
        "xaxis": {"title": {"text": "epoch"}, "zeroline": False, "automargin": True, "tickformat": "d"},
        "yaxis": {"title": {"text": ""}, "zeroline": False, "automargin": True},
        "shapes": [
            {"type": "line", "x0": found.epoch, "x1": found.epoch, "yref": "paper", "y0": 0, "y1": 1,
             "line": {"dash": "dash", "width": 1.5, "color": "#888888"}}
        ],
        "margin": {"l": 56, "r": 24, "t": 8, "b": 44},
        "showlegend": False,
        "dragmode": False,
    }  # fmt: skip
    return {"data": data, "layout": layout, "height": 240}


def _lines(series: Mapping[str, Sequence[float]], *, starts: Sequence[float]) -> Figure:
    """Values over the blocks, a line a name, and a dashed line across where each started."""
    data: list[dict[str, Any]] = []
    for (name, values), (colour, symbol), start in zip(series.items(), LINES, starts, strict=True):
        last = len(values) - 1
        data += [
            {
                "type": "scatter", "mode": "lines+markers", "name": name, "x": list(range(last + 1)), "y": list(values),
                "line": {"color": colour, "width": 2}, "marker": {"symbol": symbol, "size": 9},
                "hovertemplate": f"block %{{x}}: {html.escape(name)} %{{y:.4f}}<extra></extra>",
            },
            {
                "type": "scatter", "mode": "lines", "x": [-0.2, last + 0.2], "y": [start, start], "showlegend": False,
                "line": {"color": colour, "width": 1.5, "dash": "dash"}, "hoverinfo": "skip",
            },
        ]  # fmt: skip
    layout = {
        "xaxis": {"title": {"text": "block"}, "dtick": 1 if last < 12 else None, "zeroline": False, "automargin": True},
        "yaxis": {"title": {"text": ""}, "zeroline": False, "automargin": True},
        "margin": {"l": 56, "r": 12, "t": 12, "b": 44},
        "legend": {"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0},
        "dragmode": False,
    }
    return {"data": data, "layout": layout, "height": 260}
