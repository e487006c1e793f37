"""`explain.html`: where a network's attention goes, on some images and on average."""

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from nkat_ray.explain import attention
from nkat_ray.explain.attention import COLOUR_HEADS, Array
from nkat_ray.metrics import EPOCH, NKAT_SCALARS, VAL_ACCURACY, modulation_bound
from nkat_ray.report.charts import BLUE, figure
from nkat_ray.report.page import Page

PAGE_FILE: Final = "explain.html"
PAGE_ZOOM: Final = 4  # of the image and its rollout: 32 pixels become 128; the browser enlarges the heads
ROW_PX: Final = 34  # of a block in a chart
CELLS: Final = ((0, "#f3f6fa"), (1, "#56B4E9"))  # dark text is readable on all of it, on a light page and a dark one
SCALAR_COLOURS: Final = (BLUE, "#E69F00")
STARTS: Final = {"alpha": 0.1, "beta": 0.05, "attention_gain": 1.0, "mlp_gain": 1.0}  # docs/spec.md section 3
TITLES: Final = {
    "alpha": "alpha", "beta": "beta", "attention_gain": "residual scalar of the attention",
    "mlp_gain": "residual scalar of the MLP",
}  # fmt: skip


@dataclass(frozen=True)
class Example:
    """One image, the network's prediction for it, and the attention weights of that very pass."""

    caption: str  # where the image comes from
    image: Array  # uint8 (side, side, 3), as the network saw it
    truth: str | None  # its class; None if it is not known
    ranked: Sequence[tuple[str, float]]  # the most probable classes and their probabilities, best first
    weights: Array  # (L, H, N, N)

    @property
    def right(self) -> bool | None:
        """Whether the prediction is the true class; None if that is not known."""
        return None if self.truth is None else self.ranked[0][0] == self.truth


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """The content of the page."""

    name: str
    examples: Sequence[Example]
    entropy: Array  # (L, H), nats, the mean over queries and `averaged` images
    kept: Array  # (L, H), tokens, the mean over the same
    averaged: int
    right: int | None  # how many of those images are predicted correctly; None if that is not known
    what: str  # name of those images, in the plural
    tokens: int
    top_k: int | None
    split_heads: bool
    scalars: Mapping[str, Sequence[float]]  # block by block: alpha, beta, attention_gain, mlp_gain, strength
    history: Sequence[Mapping[str, Any]]
    """The epochs of this model's training, as in curves.parquet, by epoch; empty if there are none."""
    epoch: int  # the epoch whose weights these are
    facts: Mapping[str, str]  # facts about the model, its data and the checks, by name

    @property
    def most_tokens(self) -> int:
        """Largest number of tokens that the filter keeps per query."""
        return min(self.tokens, self.top_k or self.tokens)

    @property
    def reach(self) -> float:
        """Largest share by which the modulation can change a token's attention output, with these scalars."""
        return max(map(modulation_bound, *(self.scalars[name] for name in ("strength", "alpha", "beta"))))


def explanation_page(found: Explanation) -> Page:
    """Build the page of an explanation."""
    most = found.most_tokens
    limit = math.log(most)  # entropy in nats of a query that attends evenly to all tokens that the filter can keep
    figures = {
        "entropy": heatmap(found.entropy, low=0.0, high=limit, unit="nats", split_heads=found.split_heads),
        "kept": heatmap(found.kept, low=1.0, high=float(most), unit="tokens", split_heads=found.split_heads),
        "modulation": by_block({name: found.scalars[name] for name in ("alpha", "beta")}),
        "gains": by_block({name: found.scalars[name] for name in ("attention_gain", "mlp_gain")}),
    }
    if found.history:
        figures |= {name: by_epoch(found, name) for name in NKAT_SCALARS}
    best = next((row[VAL_ACCURACY] for row in found.history if row[EPOCH] == found.epoch), None)
    return Page(
        "explain.html",
        figures,
        {
            "found": found,
            "title": f"{found.name}: attention",
            "examples": [_view(example, found.tokens) for example in found.examples],
            "most_entropy": limit,
            "best": best,
            "scalar_titles": TITLES,
            "colour_heads": COLOUR_HEADS,
        },
    )


def _view(example: Example, tokens: int) -> dict[str, Any]:
    """Return an example with its pictures as data URLs: image, rollout, and one strip of heads per block."""
    rollout = attention.received(attention.rollout(example.weights))  # the mean over output tokens: the head reads that
    shares = attention.received(example.weights)
    top = float(shares.max())
    return {
        "example": example,
        "image": _address(attention.enlarged(example.image, PAGE_ZOOM)),
        "rollout": _address(
            attention.enlarged(attention.overlay(example.image, rollout, top=float(rollout.max())), PAGE_ZOOM)
        ),
        "rollout_scale": float(rollout.max()) * tokens,
        "strips": [_address(attention.strip(example.image, block, top=top)) for block in shares],
        "heads": shares.shape[1],
        "heads_scale": top * tokens,
    }


def _address(picture: Any) -> str:
    return f"data:image/png;base64,{base64.b64encode(attention.png(picture)).decode()}"


def heatmap(values: Array, *, low: float, high: float, unit: str, split_heads: bool) -> go.Figure:
    """Draw one value per block (rows, 0 on top) and head (columns), written into its cell.

    Args:
        values: (L, H).
    """
    blocks, heads = values.shape
    colours = [list(COLOUR_HEADS) if split_heads and block == 0 else [""] * heads for block in range(blocks)]
    cells = go.Heatmap(
        z=values.tolist(),
        x=[str(head) for head in range(heads)],
        y=[f"block {block}" for block in range(blocks)],
        text=colours,
        texttemplate="%{z:.2f}<br>%{text}" if split_heads else "%{z:.2f}",
        zmin=low,
        zmax=max(high, low + 1e-9),
        textfont={"color": "#111111"},
        colorscale=CELLS,
        showscale=False,
        xgap=2,
        ygap=2,
        hovertemplate=f"%{{y}}, head %{{x}} %{{text}}: %{{z:.3f}} {unit}<extra></extra>",
    )
    drawn = figure([cells], x="head", height=64 + ROW_PX * (blocks + split_heads))
    return drawn.update_xaxes(type="category", showgrid=False).update_yaxes(
        type="category", showgrid=False, autorange="reversed"
    )


def by_block(series: Mapping[str, Sequence[float]]) -> go.Figure:
    """Draw scalars over the blocks, one line per name, and a dashed line at the initial value of each."""
    data = []
    for (name, values), colour in zip(series.items(), SCALAR_COLOURS, strict=True):
        x, start = list(range(len(values))), STARTS[name]
        hover = f"block %{{x}}: {TITLES[name]} %{{y:.4f}}<extra></extra>"
        line = {"color": colour, "width": 2}
        data += [
            go.Scatter(mode="lines+markers", name=TITLES[name], x=x, y=list(values), line=line, hovertemplate=hover),
            go.Scatter(mode="lines", x=x, y=[start] * len(x), showlegend=False, hoverinfo="skip",
                       line={"color": colour, "width": 1.5, "dash": "dash"}),
        ]  # fmt: skip
    return figure(data, x="block", height=260, xaxis_dtick=1)


def by_epoch(found: Explanation, name: str) -> go.Figure:
    """Draw one kind of scalar over the epochs, from its initial value, one line per block from blue to orange.

    The first and the last block are named at the ends of their lines.
    """
    blocks = len(found.scalars[name])
    known = [row for row in found.history if row.get(name)]
    scale = [[0, SCALAR_COLOURS[0]], [1, SCALAR_COLOURS[1]]]
    colours = sample_colorscale(scale, [block / max(1, blocks - 1) for block in range(blocks)])
    data = [
        go.Scatter(
            mode="lines+markers+text",
            name=f"block {block}",
            x=[0, *(row[EPOCH] for row in known)],
            y=[STARTS[name], *(row[name][block] for row in known)],
            text=[*[""] * len(known), str(block) if block in (0, blocks - 1) else ""],
            textposition="middle right",
            cliponaxis=False,
            line={"color": colours[block], "width": 2},
            marker={"size": 5},
            hovertemplate=f"block {block}, epoch %{{x}}: %{{y:.4f}}<extra></extra>",
        )
        for block in range(blocks)
    ]
    drawn = figure(data, x="epoch", height=240, showlegend=False, xaxis_tickformat="d", margin_r=24)
    return drawn.add_vline(found.epoch, line={"dash": "dash", "width": 1.5, "color": "#888888"})
