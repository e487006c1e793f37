"""The report's charts as plotly figures: plain dicts of data and layout, no colours of the page in them.

Text from data is escaped, since plotly renders a subset of HTML. Colours are Okabe and Ito's, which colour-blind
readers tell apart; markers differ as well. The page's script adds what depends on dark or light.
"""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from nkat_ray.metrics import EPOCH, LOCAL_TPE, STAGE2_DATASETS, VAL_ACCURACY, accuracy_for
from nkat_ray.report import results, tables

Figure = dict[str, Any]
Rows = Sequence[Mapping[str, Any]]

RUNNING: Final = "running"  # the report's word for a stop reason of null
COLOURS: Final = {
    "finished": "#009E73", "asha": "#E69F00", "smoke": "#56B4E9", "gate": "#0072B2", "nan": "#D55E00",
    "error": "#CC79A7", "budget": "#666666", RUNNING: "#666666",
}  # fmt: skip
SYMBOLS: Final = {
    "finished": "circle", "asha": "triangle-up", "smoke": "square", "gate": "diamond", "nan": "x", "error": "cross",
    "budget": "star", RUNNING: "circle-open",
}  # fmt: skip
SERIES: Final = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
PATTERNS: Final = ("", "/", ".", "x", "-", "+")
INK: Final = "ink"  # replaced by the page's text colour, dark or light
TALL_PX: Final = 26  # of one row in a horizontal chart


def reason(row: Mapping[str, Any]) -> str:
    """A trial's stop reason, or `running`."""
    return str(row.get("stop_reason") or RUNNING)


def learning_curves(trials: Rows, curves: Rows, *, gate: float, winner: int | None, searched: Sequence[str]) -> Figure:
    """Local TPE by epoch, a line a trial coloured by its stop reason, the gate as a line."""
    by_trial: dict[int, list[Mapping[str, Any]]] = {}
    for point in curves:
        by_trial.setdefault(point["trial"], []).append(point)
    named: set[str] = set()
    data = []
    order = {kind: n for n, kind in enumerate(COLOURS)}
    for row in sorted(trials, key=lambda row: (row["trial"] == winner, order.get(reason(row), len(order)))):
        points = sorted(by_trial.get(row["trial"], []), key=lambda point: point[EPOCH])
        if points:
            group = f"winner (trial {winner})" if row["trial"] == winner else reason(row)
            data.append(_curve(row, points, group=group, first=group not in named, searched=searched))
            named.add(group)
    last = max((point[EPOCH] for point in curves), default=1)
    data.append(_line([0.5, last + 0.5], [gate, gate], f"gate {gate:.2f}"))
    layout = _layout("epoch", "Local TPE on validation")
    if last <= 10:
        layout["xaxis"]["dtick"] = 1  # plotly would label half epochs
    return {"data": data, "layout": layout}


def _curve(
    row: Mapping[str, Any], points: Rows, *, group: str, first: bool, searched: Sequence[str]
) -> Mapping[str, Any]:
    kind = reason(row)
    best = group != kind  # the winner is a group of its own
    config = "<br>".join(f"{name} {_text(row.get(tables.CONFIG_PREFIX + name))}" for name in searched)
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": group,
        "legendgroup": group,
        "showlegend": first,
        "x": [point[EPOCH] for point in points],
        "y": [point[LOCAL_TPE] for point in points],
        "customdata": [point[VAL_ACCURACY] for point in points],
        "line": {"color": COLOURS.get(kind, INK), "width": 4 if best else 1.7},
        "marker": {"symbol": SYMBOLS.get(kind, "circle"), "size": 9 if best else 6},
        "meta": f"<b>trial {row['trial']}</b>, {_text(kind)}<br>{config}",
        "hovertemplate": "%{meta}<br>epoch %{x}: Local TPE %{y:.3f}, accuracy %{customdata:.3f}<extra></extra>",
    }


def dataset_bars(rows: Mapping[str, Mapping[str, Any]], *, score: str) -> Figure:
    """A survivor's four datasets as bars with 95 % intervals, each target as a line across.

    Args:
        rows: its stage2 rows by dataset.
        score: "accuracy" or "tpe".
    """
    key = "test_accuracy" if score == "accuracy" else "tpe"
    names = list(reversed(STAGE2_DATASETS))  # plotly draws the first at the bottom
    found = [rows.get(name, {}) for name in names]
    values = [row.get(key) for row in found]
    labels = [results.DATASET_NAMES[name] for name in names]
    bounds = [_bounds(row, key) for row in found]
    targets = [results.dataset_targets(name)[0 if score == "accuracy" else 1] for name in names]
    bars = {
        "type": "bar",
        "orientation": "h",
        "name": "measured, 95 % interval",
        "y": labels,
        "x": values,
        "text": [_status(row, value) for row, value in zip(found, values, strict=True)],
        "textposition": "inside",
        "insidetextanchor": "start",
        "insidetextfont": {"color": "#ffffff"},
        "marker": {"color": "#0072B2"},
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": [high for _, high in bounds],
            "arrayminus": [low for low, _ in bounds],
            "color": INK,
            "thickness": 1.5,
        },
        "hovertemplate": "%{y}: %{x:.3f}<extra></extra>",
    }
    marks = {
        "type": "scatter",
        "mode": "markers",
        "name": "target",
        "y": labels,
        "x": targets,
        "marker": {"symbol": "line-ns", "size": 30, "line": {"width": 3, "color": "#D55E00"}},
        "hovertemplate": "%{y}: target %{x:.2f}<extra></extra>",
    }
    layout = _layout("test accuracy" if score == "accuracy" else "TPE on test", "")
    layout["xaxis"] |= {"rangemode": "tozero"}
    absent = [label for label, value in zip(labels, values, strict=True) if value is None]
    layout["annotations"] = [
        {"x": 0, "y": label, "text": "missing", "showarrow": False, "xanchor": "left", "xshift": 6} for label in absent
    ]
    return {"data": [bars, marks], "layout": layout, "height": 330}


def _bounds(row: Mapping[str, Any], key: str) -> tuple[float, float]:
    """Distances of the 95 % interval's ends from the value; TPE's follow from accuracy's by their ratio."""
    if any(row.get(name) is None for name in (key, "ci_low", "ci_high", "test_accuracy")) or not row["test_accuracy"]:
        return 0.0, 0.0
    scale = row[key] / row["test_accuracy"]
    return scale * (row["test_accuracy"] - row["ci_low"]), scale * (row["ci_high"] - row["test_accuracy"])


def _status(row: Mapping[str, Any], value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" + ("" if row.get("status") == "ok" else " (failed)")


def importances(values: Mapping[str, float]) -> Figure:
    """Hyperparameter importances, the largest on top."""
    items = sorted(values.items(), key=lambda item: item[1])
    bars = {
        "type": "bar",
        "orientation": "h",
        "y": [_text(name) for name, _ in items],
        "x": [value for _, value in items],
        "text": [f"{value:.2f}" for _, value in items],
        "textposition": "auto",
        "marker": {"color": "#0072B2"},
        "hovertemplate": "%{y}: %{x:.3f}<extra></extra>",
    }
    layout = _layout("importance (they sum to 1)", "")
    return {"data": [bars], "layout": layout | {"showlegend": False}, "height": 90 + TALL_PX * len(items)}


def slice_of(name: str, points: Sequence[tuple[Any, float, bool]], values: Sequence[Any] = ()) -> Figure:
    """The objective against one parameter.

    Args:
        name: the parameter.
        points: its value, the objective, and whether the trial was complete; a trial stopped early is drawn hollow.
        values: the parameter's choices in order, when it is one of some values.
    """
    choice = bool(values) or not all(_is_number(value) for value, _, _ in points)
    data = []
    for complete, label in ((True, "complete"), (False, "stopped early")):
        chosen = [(value, score) for value, score, done in points if done == complete]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": label,
                "x": [_text(value) if choice else value for value, _ in chosen],
                "y": [score for _, score in chosen],
                "marker": {"color": "#0072B2", "size": 9, "symbol": "circle" if complete else "circle-open"},
                "hovertemplate": "%{x}: %{y:.3f}<extra></extra>",
            }
        )
    layout = _layout(_text(name), "")
    if choice:
        order = [_text(value) for value in values]
        layout["xaxis"] |= {"type": "category", "categoryorder": "array", "categoryarray": order}
    return {"data": data, "layout": layout | {"showlegend": False}, "height": 250}


def pareto(trials: Rows, *, gate: float) -> Figure:
    """Best validation accuracy against lambda, the Pareto front of the two, and what the gate asks for."""
    scored = [row for row in trials if row.get("best_val_accuracy") is not None and row.get("lambda_theory")]
    data = []
    for kind in COLOURS:
        mine = [row for row in scored if reason(row) == kind]
        if mine:
            data.append(_pareto_points(kind, mine))
    front = pareto_front([(row["lambda_theory"], row["best_val_accuracy"]) for row in scored])
    step = {"shape": "hv", "color": INK, "width": 1.5}
    data.append(
        {
            "type": "scatter", "mode": "lines", "name": "Pareto front", "line": step, "hoverinfo": "skip",
            "x": [x for x, _ in front], "y": [y for _, y in front],
        }
    )  # fmt: skip
    if scored:
        low, high = (bound(row["lambda_theory"] for row in scored) for bound in (min, max))
        grid = [low * 0.98 + (high * 1.02 - low * 0.98) * n / 20 for n in range(21)]
        data.append(_line(grid, [accuracy_for(gate, lam) for lam in grid], f"gate {gate:.2f}"))
    return {"data": data, "layout": _layout("lambda_theory", "best validation accuracy")}


def _pareto_points(kind: str, rows: Rows) -> Mapping[str, Any]:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": kind,
        "x": [row["lambda_theory"] for row in rows],
        "y": [row["best_val_accuracy"] for row in rows],
        "customdata": [row["trial"] for row in rows],
        "marker": {"color": COLOURS[kind], "symbol": SYMBOLS[kind], "size": 10},
        "hovertemplate": "trial %{customdata}: accuracy %{y:.3f}, lambda %{x:.2f}<extra></extra>",
    }


def pareto_front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points (cost, value) that no other beats in both: lower cost, higher value; by rising cost."""
    front: list[tuple[float, float]] = []
    for cost, value in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or value > front[-1][1]:
            front.append((cost, value))
    return front


def timeline(trials: Rows, curves: Rows) -> Figure:
    """Which trial held which slot when: a bar a trial, pale where its slot did not train, so that waste is seen."""
    spans = trial_spans(trials, curves)
    lanes = pack_lanes(spans)
    rows = {row["trial"]: row for row in trials}
    labels = sorted(set(lanes.values()), reverse=True)  # plotly draws the first at the bottom
    data = []
    for kind in COLOURS:
        mine = [trial for trial in spans if reason(rows[trial]) == kind]
        if mine:
            data.append(_timeline_bars(kind, mine, rows, spans, lanes, pale=True))
            data.append(_timeline_bars(kind, mine, rows, spans, lanes, pale=False))
    layout = _layout("seconds since the start", "")
    order = [_lane_label(lane) for lane in labels]
    layout["yaxis"] |= {"type": "category", "categoryorder": "array", "categoryarray": order}
    return {"data": data, "layout": layout | {"barmode": "overlay"}, "height": 140 + TALL_PX * len(labels)}


def trial_spans(trials: Rows, curves: Rows) -> dict[int, tuple[str, float, float]]:
    """Node, start and end of each trial that started, in seconds; one still running ends with its last epoch."""
    spans = {}
    for row in trials:
        start = row.get("started_s")
        if start is not None:
            wall_s = row.get("wall_s")
            length = _epochs_s(row["trial"], curves) if wall_s is None else wall_s
            spans[row["trial"]] = (str(row.get("node") or "?"), float(start), float(start + length))
    return spans


def _epochs_s(trial: int, curves: Rows) -> float:
    """Seconds from the start of a trial's first epoch to the end of its last; the clock's zero does not matter."""
    mine = [row for row in curves if row["trial"] == trial and None not in (row.get("started_s"), row.get("epoch_s"))]
    if not mine:
        return 0.0
    return float(max(row["started_s"] + row["epoch_s"] for row in mine) - min(row["started_s"] for row in mine))


def pack_lanes(spans: Mapping[int, tuple[str, float, float]]) -> dict[int, tuple[str, int]]:
    """A lane (node, number from 0) for each trial so that trials in one lane do not overlap: the first that is free."""
    ends: dict[str, list[float]] = {}
    lanes = {}
    for trial, (node, start, end) in sorted(spans.items(), key=lambda item: (item[1][1], item[0])):
        taken = ends.setdefault(node, [])
        free = next((n for n, until in enumerate(taken) if until <= start + 1e-6), len(taken))
        if free == len(taken):
            taken.append(end)
        taken[free] = end
        lanes[trial] = (node, free)
    return lanes


def _timeline_bars(
    kind: str,
    chosen: Sequence[int],
    rows: Mapping[int, Mapping[str, Any]],
    spans: Mapping[int, tuple[str, float, float]],
    lanes: Mapping[int, tuple[str, int]],
    *,
    pale: bool,
) -> Mapping[str, Any]:
    whole = {trial: spans[trial][2] - spans[trial][1] for trial in chosen}
    trained = {trial: min(whole[trial], rows[trial].get("train_s") or 0.0) for trial in chosen}
    shown = whole if pale else trained
    said = [f"trial {n}, {kind}: {whole[n]:.0f} s in the slot, {trained[n]:.0f} s training" for n in chosen]
    return {
        "type": "bar",
        "orientation": "h",
        "name": kind,
        "legendgroup": kind,
        "showlegend": not pale,
        "opacity": 0.35 if pale else 1.0,
        "y": [_lane_label(lanes[trial]) for trial in chosen],
        "base": [spans[trial][1] for trial in chosen],
        "x": [shown[trial] for trial in chosen],
        "text": ["" if pale else str(trial) for trial in chosen],
        "textposition": "inside",
        "insidetextanchor": "middle",
        "textangle": 0,
        "insidetextfont": {"color": "#000000" if kind in ("asha", "smoke", "error") else "#ffffff"},
        "customdata": said,
        "hovertemplate": "%{customdata}<extra></extra>",
        "marker": {"color": COLOURS[kind]},
    }


def _lane_label(lane: tuple[str, int]) -> str:
    return f"{_text(lane[0])} · {lane[1] + 1}"


def best_so_far(runs: Mapping[str, Rows]) -> Figure:
    """The best Local TPE by number of trials, a line a run."""
    data = []
    for n, (name, trials) in enumerate(runs.items()):
        best, values = -math.inf, []
        for row in sorted(trials, key=lambda row: row["trial"]):
            best = max(best, row["best_local_tpe"] if row.get("best_local_tpe") is not None else -math.inf)
            values.append(None if best == -math.inf else best)
        data.append(
            {
                "type": "scatter", "mode": "lines", "name": _text(name),
                "x": list(range(1, len(values) + 1)), "y": values,
                "line": {"shape": "hv", "color": SERIES[n % len(SERIES)], "width": 2.5, "dash": _dash(n)},
                "hovertemplate": "trial %{x}: %{y:.3f}",
            }
        )  # fmt: skip
    return {"data": data, "layout": _layout("trials", "best Local TPE so far")}


def runs_bars(runs: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Figure:
    """Each run's winner on the four datasets, test accuracy with intervals, targets as lines.

    Args:
        runs: by the run's name, its winner's stage2 rows by dataset.
    """
    labels = [results.DATASET_NAMES[name] for name in STAGE2_DATASETS]
    data: list[Mapping[str, Any]] = []
    for n, (run, rows) in enumerate(runs.items()):
        found = [rows.get(name, {}) for name in STAGE2_DATASETS]
        bounds = [_bounds(row, "test_accuracy") for row in found]
        data.append(
            {
                "type": "bar", "name": _text(run), "x": labels, "y": [row.get("test_accuracy") for row in found],
                "marker": {"color": SERIES[n % len(SERIES)], "pattern": {"shape": PATTERNS[n % len(PATTERNS)]}},
                "error_y": {
                    "type": "data", "symmetric": False, "color": INK, "thickness": 1.5,
                    "array": [high for _, high in bounds], "arrayminus": [low for low, _ in bounds],
                },
                "hovertemplate": "%{x}: %{y:.3f}",
            }
        )  # fmt: skip
    data.append(
        {
            "type": "scatter", "mode": "markers", "name": "target", "x": labels,
            "y": [results.dataset_targets(name)[0] for name in STAGE2_DATASETS],
            "marker": {"symbol": "line-ew", "size": 40, "line": {"width": 3, "color": INK}},
            "hovertemplate": "%{x}: target %{y:.2f}<extra></extra>",
        }
    )  # fmt: skip
    return {"data": data, "layout": _layout("", "test accuracy")}


def _dash(n: int) -> str:
    return ("solid", "dash", "dot", "dashdot", "longdash")[n % 5]


def _line(x: Sequence[float], y: Sequence[float], name: str) -> Mapping[str, Any]:
    style = {"color": INK, "width": 2, "dash": "dash"}
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "x": list(x),
        "y": list(y),
        "line": style,
        "hoverinfo": "name",
    }


def _layout(x: str, y: str) -> dict[str, Any]:
    return {
        "xaxis": {"title": {"text": x}, "zeroline": False, "automargin": True},
        "yaxis": {"title": {"text": y}, "zeroline": False, "automargin": True},
        "margin": {"l": 56, "r": 12, "t": 12, "b": 48},
        "legend": {"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0},
        "hovermode": "closest",
        "dragmode": False,  # a finger scrolls the page, not the chart
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text(value: Any) -> str:
    """Data as text that plotly cannot take for markup; None is `off`, numbers are short."""
    if value is None:
        return "off"
    return f"{value:.4g}" if isinstance(value, float) else html.escape(str(value))
