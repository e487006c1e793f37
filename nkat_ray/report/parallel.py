"""Parallel coordinates: one line per trial across all searched parameters and its scores."""

import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from nkat_ray.record.run_folder import RecordedRun
from nkat_ray.record.scoring import setting
from nkat_ray.record.tables import CONFIG_PREFIX
from nkat_ray.report.charts import figure, hover_of, reason
from nkat_ray.space import Choice, Domain, Span


def parallel(run: RecordedRun) -> go.Figure:
    """Draw one line per trial with a score; a menu chooses the parameter or score that the colour shows.

    The lines are plain scatter traces: plotly's own parallel coordinates need WebGL, which not every browser has.
    """
    rows = [row for row in run.trials if row["best_local_tpe"] is not None]
    columns = {name: CONFIG_PREFIX + name for name in run.searched}
    columns |= {"lambda": "lambda_theory", "accuracy": "best_val_accuracy", "Local TPE": "best_local_tpe"}
    values = {title: [row[column] for row in rows] for title, column in columns.items()}
    axes = {title: _axis(run.searched.get(title), values[title]) for title in columns}
    colours = {title: sample_colorscale("Viridis", places) for title, (places, _) in axes.items()}
    lines = []
    for n, row in enumerate(rows):
        said = [f"trial {row['trial']}, {reason(row)}", *(f"{name} {setting(values[name][n])}" for name in columns)]
        lines.append(
            go.Scatter(
                mode="lines",
                x=list(range(len(axes))),
                y=[places[n] for places, _ in axes.values()],
                line={"color": colours["Local TPE"][n], "width": 4 if row["trial"] == run.winner else 1.7},
                meta=said,
                hovertemplate=hover_of(said),
                showlegend=False,
            )
        )
    marks = [
        {"x": n, "y": at, "text": text, "xanchor": "left", "xshift": 4, "showarrow": False, "font": {"size": 11}}
        for n, (_, ticks) in enumerate(axes.values())
        for at, text in ticks
    ]
    buttons = [
        {"label": f"colour: {title}", "method": "restyle", "args": [{"line.color": colours[title]}]}
        for title in reversed(columns)
    ]
    drawn = figure(lines, height=420, annotations=marks, margin={"t": 76, "b": 12, "l": 12})
    drawn.update_layout(updatemenus=[{"buttons": buttons, "x": 0, "xanchor": "left", "y": 1.16, "yanchor": "bottom"}])
    drawn.update_xaxes(tickvals=list(range(len(axes))), ticktext=list(axes), side="top", range=[-0.4, len(axes) - 0.4])
    return drawn.update_yaxes(visible=False, range=[-0.06, 1.06])


def _axis(domain: Domain | None, values: Sequence[Any]) -> tuple[list[float], list[tuple[float, str]]]:
    """Return each value's position on an axis, 0..1, and the axis's labels as (position, text).

    Choices have equal distances, in their own order; numbers between the smallest and the largest that occur.
    """
    if isinstance(domain, Choice):
        places = {setting(value): n / max(1, len(domain.values) - 1) for n, value in enumerate(domain.values)}
        return [places.get(setting(value), 0.0) for value in values], [(at, text) for text, at in places.items()]
    scale = math.log if isinstance(domain, Span) and domain.log else float
    low, high = min(values), max(values)
    if low == high:
        return [0.0] * len(values), [(0.0, setting(low))]
    places_of = [(scale(value) - scale(low)) / (scale(high) - scale(low)) for value in values]
    return places_of, [(0.0, setting(low)), (1.0, setting(high))]
