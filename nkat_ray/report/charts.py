"""The pages' charts: plotly figures, made from the rows of a run.

A string in a figure is data, and `page.py` escapes it; only hover templates hold markup. Colours are Okabe and Ito's,
which colour-blind readers distinguish; markers and patterns differ as well. `INK` stands for the page's text colour,
which the page's script puts in, dark or light.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import plotly.graph_objects as go

from nkat_ray.metrics import EPOCH, LOCAL_TPE, VAL_ACCURACY, accuracy_for
from nkat_ray.record import scoring
from nkat_ray.record.run_folder import RecordedRun
from nkat_ray.record.scoring import setting
from nkat_ray.record.tables import CONFIG_PREFIX
from nkat_ray.report.advice import Loss
from nkat_ray.report.effects import Effect
from nkat_ray.space import Choice, Domain

Row = Mapping[str, Any]
Rows = Sequence[Row]

RUNNING: Final = "running"  # the pages' word for a stop reason of null
COLOURS: Final = {
    "finished": "#009E73", "asha": "#E69F00", "smoke": "#56B4E9", "gate": "#0072B2", "nan": "#D55E00",
    "error": "#CC79A7", "budget": "#666666", "user": "#F0E442", RUNNING: "#666666",
}  # fmt: skip
SYMBOLS: Final = {
    "finished": "circle", "asha": "triangle-up", "smoke": "square", "gate": "diamond", "nan": "x", "error": "cross",
    "budget": "star", "user": "hexagon", RUNNING: "circle-open",
}  # fmt: skip
BLUE, ORANGE = "#0072B2", "#D55E00"
SERIES: Final = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
PATTERNS: Final = ("", "/", ".", "x", "-", "+")
DASHES: Final = ("solid", "dash", "dot", "dashdot", "longdash")
INK: Final = "#1b1f24"
HEIGHT_PX: Final = 440
TALL_PX: Final = 26  # of one row in a horizontal chart


def figure(data: Sequence[Any], *, x: str = "", y: str = "", height: int = HEIGHT_PX, **changes: Any) -> go.Figure:
    """Put traces into a figure with the layout that all charts share.

    Args:
        data: the traces.
        x: title of the horizontal axis.
        y: title of the vertical axis.
        height: in pixels.
        changes: of the layout, as plotly's `update_layout` takes them.
    """
    axis = {"zeroline": False, "automargin": True}
    drawn = go.Figure(list(data))
    drawn.update_layout(
        xaxis={"title": {"text": x}, **axis},
        yaxis={"title": {"text": y}, **axis},
        margin={"l": 56, "r": 12, "t": 12, "b": 48},
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0},
        hovermode="closest",
        dragmode=False,  # a finger scrolls the page, not the chart
        height=height,
    )
    return drawn.update_layout(**changes)


def reason(row: Row) -> str:
    """Return a trial's stop reason, or `running`."""
    return str(row.get("stop_reason") or RUNNING)


def learning_curves(run: RecordedRun) -> go.Figure:
    """Draw Local TPE by epoch, one line per trial coloured by its stop reason, and the gate as a line."""
    by_trial: dict[int, list[Row]] = {}
    for point in sorted(run.curves, key=lambda point: point[EPOCH]):
        by_trial.setdefault(point["trial"], []).append(point)
    order = {kind: n for n, kind in enumerate(COLOURS)}
    shown = [row for row in run.trials if row["trial"] in by_trial]
    shown.sort(key=lambda row: (row["trial"] == run.winner, order.get(reason(row), len(order))))
    named: set[str] = set()
    data = []
    for row in shown:
        group = f"winner (trial {row['trial']})" if row["trial"] == run.winner else reason(row)
        data.append(_curve(row, by_trial[row["trial"]], group, first=group not in named, searched=list(run.searched)))
        named.add(group)
    last = max((point[EPOCH] for point in run.curves), default=1)
    data.append(_dashed([0.5, last + 0.5], [run.gate, run.gate], f"gate {run.gate:.2f}"))
    step = 1 if last <= 10 else None  # plotly would label half epochs
    return figure(data, x="epoch", y="Local TPE on validation", xaxis_dtick=step)


def _curve(row: Row, points: Rows, group: str, *, first: bool, searched: Sequence[str]) -> go.Scatter:
    kind = reason(row)
    winner = group != kind  # it is a group of its own
    lines = [
        f"trial {row['trial']}, {kind}",
        *(f"{name} {setting(row.get(CONFIG_PREFIX + name))}" for name in searched),
    ]
    return go.Scatter(
        mode="lines+markers",
        name=group,
        legendgroup=group,
        showlegend=first,
        x=[point[EPOCH] for point in points],
        y=[point[LOCAL_TPE] for point in points],
        customdata=[point[VAL_ACCURACY] for point in points],
        line={"color": COLOURS.get(kind, INK), "width": 4 if winner else 1.7},
        marker={"symbol": SYMBOLS.get(kind, "circle"), "size": 9 if winner else 6},
        meta=lines,
        hovertemplate=hover_of(lines, "epoch %{x}: Local TPE %{y:.3f}, accuracy %{customdata:.3f}"),
    )


def hover_of(lines: Sequence[str], *more: str) -> str:
    """Return a hover template that shows a trace's `meta`, one line per string, and then more lines."""
    return "<br>".join([*(f"%{{meta[{n}]}}" for n in range(len(lines))), *more]) + "<extra></extra>"


def dataset_bars(runs: Mapping[str, Mapping[str, Row]], datasets: Sequence[str], *, score: str) -> go.Figure:
    """Draw each run's winner per dataset as bars with 95 % intervals, and each target as a line across.

    Args:
        runs: by the name in the legend, a winner's stage2 rows by dataset. Where there is one run, a dataset's label
            includes its status.
        datasets: names of the runs' datasets.
        score: "test_accuracy" or "tpe".
    """
    names = list(reversed(datasets))  # plotly draws the first at the bottom
    labels = [scoring.dataset_name(name) for name in names]
    if len(runs) == 1:
        (rows,) = runs.values()
        states = [scoring.stage2_status(rows.get(name, {})) for name in names]
        labels = [f"{label} ({state})" if state != "ok" else label for label, state in zip(labels, states, strict=True)]
    data: list[Any] = []
    for n, (run, rows) in enumerate(runs.items()):
        found = [rows.get(name, {}) for name in names]
        data.append(
            go.Bar(
                orientation="h",
                name=run,
                y=labels,
                x=[row.get(score) for row in found],
                text=[scoring.number(row.get(score)) for row in found] if len(runs) == 1 else None,
                textposition="auto",
                textangle=0,
                insidetextanchor="start",
                insidetextfont={"color": "#ffffff"},
                marker={"color": SERIES[n % len(SERIES)], "pattern": {"shape": PATTERNS[n % len(PATTERNS)]}},
                error_x=_error_bars([_bounds(row, score) for row in found]),
                hovertemplate="%{y}: %{x:.3f}",
            )
        )
    targets = [scoring.dataset_targets(name)[0 if score == "test_accuracy" else 1] for name in names]
    data.append(
        go.Scatter(
            mode="markers",
            name="target",
            y=labels,
            x=targets,
            marker={"symbol": "line-ns", "size": 10 + 20 * len(runs), "line": {"width": 3, "color": ORANGE}},
            hovertemplate="%{y}: target %{x:.2f}<extra></extra>",
        )
    )
    title = "test accuracy" if score == "test_accuracy" else "TPE on test"
    height = 120 + (30 + 22 * len(runs)) * len(names)
    return figure(data, x=title, height=height, xaxis_rangemode="tozero")


def _bounds(row: Row, key: str) -> tuple[float, float]:
    """Return the distances of the 95 % interval's ends from the value; 0 without an interval."""
    known = all(row.get(name) is not None for name in (key, "ci_low", "ci_high")) and row["test_accuracy"]
    return scoring.interval_distances(row, key) if known else (0.0, 0.0)


def _error_bars(bounds: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Return plotly's error bars for distances (below, above)."""
    below, above = [low for low, _ in bounds], [high for _, high in bounds]
    return {"type": "data", "symmetric": False, "array": above, "arrayminus": below, "color": INK, "thickness": 1.5}


def waterfall(losses: Sequence[Loss], now: float, target: float) -> go.Figure:
    """Draw what separates a Global TPE from that of a network without an error: a bar per loss, and the target.

    Args:
        losses: what is lost, in order; each is >= 0.
        now: the Global TPE that is left.
        target: the Global TPE to reach, drawn as a line.
    """
    ceiling = now + math.fsum(loss.tpe for loss in losses)
    values = [ceiling, *(-loss.tpe for loss in losses), now]
    said = ["without an error", *(loss.name.removeprefix("errors on ") for loss in losses), "now"]
    names = [f"{name} {value:.3f}" for name, value in zip(said, values, strict=True)]
    bars = go.Waterfall(
        orientation="h",
        y=names,
        x=values,
        measure=["absolute", *("relative" for _ in losses), "total"],
        connector={"line": {"color": INK, "width": 1}},
        decreasing={"marker": {"color": ORANGE}},
        totals={"marker": {"color": BLUE}},
        hovertemplate="%{y}<extra></extra>",
        showlegend=False,
    )
    line = _dashed([target, target], [names[0], names[-1]], f"target {target:.2f}")
    drawn = figure([bars, line], x="Global TPE", height=110 + 34 * len(names), yaxis_autorange="reversed")
    return drawn.update_xaxes(range=[max(0.0, min(now, target) - 0.15), max(ceiling, target) + 0.02])


def effects(found: Sequence[Effect]) -> go.Figure:
    """Draw the share of the variance that each parameter explains, the largest on top, with its interval."""
    items = list(reversed(found))  # plotly draws the first at the bottom
    bars = go.Bar(
        orientation="h",
        y=[item.name for item in items],
        x=[item.share for item in items],
        marker={"color": BLUE},
        error_x=_error_bars([(max(0.0, i.share - i.low), max(0.0, i.high - i.share)) for i in items]),
        hovertemplate="%{y}: %{x:.2f}<extra></extra>",
    )
    title = "share of the variance explained, 95 % interval"
    return figure([bars], x=title, height=90 + TALL_PX * len(items), xaxis_range=[0, 1.02])


def parameter_slice(name: str, domain: Domain, points: Sequence[tuple[Any, float]]) -> go.Figure:
    """Draw scores against one parameter.

    Args:
        name: the parameter.
        domain: what it might be.
        points: its value and the score, per trial.
    """
    choice = isinstance(domain, Choice)
    marks = go.Scatter(
        mode="markers",
        x=[setting(value) if choice else value for value, _ in points],
        y=[score for _, score in points],
        marker={"color": BLUE, "size": 7},
        hovertemplate="%{x}: %{y:.3f}<extra></extra>",
    )
    drawn = figure([marks], x=name, height=250)
    if isinstance(domain, Choice):
        order = [setting(value) for value in domain.values]
        drawn.update_xaxes(type="category", categoryorder="array", categoryarray=order)
    return drawn


def pareto(trials: Rows, gate: float) -> go.Figure:
    """Draw best validation accuracy against lambda, the trials that no other beats in both, and what the gate needs."""
    scored = [row for row in trials if row.get("best_val_accuracy") is not None and row.get("lambda_theory")]
    groups = {kind: [row for row in scored if reason(row) == kind] for kind in COLOURS}
    data = [
        go.Scatter(
            mode="markers",
            name=kind,
            x=[row["lambda_theory"] for row in rows],
            y=[row["best_val_accuracy"] for row in rows],
            customdata=[row["trial"] for row in rows],
            marker={"color": COLOURS[kind], "symbol": SYMBOLS[kind], "size": 10},
            hovertemplate="trial %{customdata}: accuracy %{y:.3f}, lambda %{x:.2f}<extra></extra>",
        )
        for kind, rows in groups.items()
        if rows
    ]
    front = pareto_front([(row["lambda_theory"], row["best_val_accuracy"]) for row in scored])
    data.append(
        go.Scatter(  # straight from member to member: the corners of a step would lie on trials that are beaten
            mode="lines+markers",
            name="Pareto front",
            x=[x for x, _ in front],
            y=[y for _, y in front],
            line={"color": INK, "width": 1.5},
            marker={"symbol": "circle-open", "size": 17, "color": INK},
            hoverinfo="skip",
        )
    )
    if scored:
        low, high = (bound(row["lambda_theory"] for row in scored) for bound in (min, max))
        grid = [low * 0.98 + (high * 1.02 - low * 0.98) * n / 20 for n in range(21)]
        data.append(_dashed(grid, [accuracy_for(gate, lam) for lam in grid], f"gate {gate:.2f}"))
    return figure(data, x="lambda", y="best validation accuracy")


def pareto_front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points (cost, value) that no other beats in both, lower cost and higher value, by rising cost."""
    front: list[tuple[float, float]] = []
    for cost, value in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or value > front[-1][1]:
            front.append((cost, value))
    return front


def best_so_far(runs: Mapping[str, RecordedRun]) -> go.Figure:
    """Draw the best Local TPE by number of trials, one line per run."""
    data = []
    for n, (name, run) in enumerate(runs.items()):
        best, values = -math.inf, []
        for row in run.trials:
            best = max(best, row["best_local_tpe"] if row["best_local_tpe"] is not None else -math.inf)
            values.append(None if best == -math.inf else best)
        style = {"shape": "hv", "color": SERIES[n % len(SERIES)], "width": 2.5, "dash": DASHES[n % len(DASHES)]}
        x = list(range(1, len(values) + 1))
        data.append(
            go.Scatter(mode="lines", name=name, x=x, y=values, line=style, hovertemplate="trial %{x}: %{y:.3f}")
        )
    return figure(data, x="trials", y="best Local TPE so far")


def _dashed(x: Sequence[float], y: Sequence[float | str], name: str) -> go.Scatter:
    style = {"color": INK, "width": 2, "dash": "dash"}
    return go.Scatter(mode="lines", name=name, x=list(x), y=list(y), line=style, hoverinfo="name")
