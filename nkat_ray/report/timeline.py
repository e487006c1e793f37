"""Show where a run's time went: which trial or task ran in which slot and when, and the phases of the run."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import plotly.graph_objects as go

from nkat_ray.record import scoring
from nkat_ray.record.run_folder import RecordedRun
from nkat_ray.report.charts import BLUE, COLOURS, TALL_PX, figure, reason

STAGE2: Final = "Stage 2"
PHASES: Final = {
    "start": "#999999", "Stage 1": "#009E73", STAGE2: "#0072B2", "test and report": "#CC79A7", "afterwards": "#CC79A7",
}  # fmt: skip


@dataclass(frozen=True)
class Work:
    """One trial, or one task of Stage 2, in its slot; times in seconds from the run's start."""

    name: str
    kind: str  # a stop reason, or `Stage 2`
    node: str
    start: float
    end: float
    trained: float  # seconds of it spent on training
    label: str = ""  # written on its bar


def work_of(run: RecordedRun) -> list[Work]:
    """Return every trial that started, and every task of Stage 2 whose start is known."""
    trials = [
        Work(
            name=f"trial {row['trial']}, {reason(row)}",
            kind=reason(row),
            node=str(row["node"] or "?"),
            start=row["started_s"],
            end=row["started_s"] + row["wall_s"],
            trained=min(row["wall_s"], row["train_s"] or 0.0),
            label=str(row["trial"]),
        )
        for row in run.trials
        if row["started_s"] is not None and row["wall_s"] is not None
    ]
    tasks = [
        Work(
            name=f"{scoring.dataset_name(row['dataset'])} of trial {row['trial']}",
            kind=STAGE2,
            node=str(row["node"] or "?"),
            start=row["started_s"],
            end=row["started_s"] + row["seconds"],
            trained=row["seconds"],
        )
        for row in run.stage2
        if row.get("started_s") is not None
    ]
    return trials + tasks


def phases(run: RecordedRun) -> list[tuple[str, float, float]]:
    """Return the phases of a run, from its start to its report, as (name, from, to) in seconds since the start."""
    stage1 = [work for work in work_of(run) if work.kind != STAGE2]
    stage2 = [work for work in work_of(run) if work.kind == STAGE2]
    if not stage1:
        return []
    first, last = min(work.start for work in stage1), max(work.end for work in stage1)
    found = [("start", 0.0, first), ("Stage 1", first, last)]
    if stage2:
        found.append((STAGE2, last, max(last, *(work.end for work in stage2))))
    until, wall_s = found[-1][2], float(run.summary["wall_s"])
    if run.ended and wall_s > until:  # it is less if a run was resumed, since the chart includes the pauses
        found.append(("test and report" if stage2 else "afterwards", until, wall_s))
    return found


def timeline(run: RecordedRun) -> go.Figure:
    """Draw the work in each slot over time, pale while the slot did not train, and the phases of the run below."""
    everything = work_of(run)
    lanes = pack_lanes({n: (work.node, work.start, work.end) for n, work in enumerate(everything)})
    data = []
    for kind in (*COLOURS, STAGE2):
        chosen = [(work, _lane_label(lanes[n])) for n, work in enumerate(everything) if work.kind == kind]
        if chosen:
            data += [_bars(kind, chosen, pale=True), _bars(kind, chosen, pale=False)]
    parts = phases(run)
    data.append(
        go.Bar(
            orientation="h",
            showlegend=False,
            y=["whole run"] * len(parts),
            base=[start for _, start, _ in parts],
            x=[end - start for _, start, end in parts],
            text=[name for name, *_ in parts],
            textposition="inside",
            insidetextanchor="middle",
            textangle=0,
            insidetextfont={"color": "#000000"},
            marker={"color": [PHASES[name] for name, *_ in parts], "opacity": 0.55},
            customdata=[f"{name}: {end - start:.0f} s" for name, start, end in parts],
            hovertemplate="%{customdata}<extra></extra>",
        )
    )
    order = ["whole run", *(_lane_label(lane) for lane in sorted(set(lanes.values()), reverse=True))]
    drawn = figure(data, x="seconds since the start", height=140 + TALL_PX * len(order), barmode="overlay")
    return drawn.update_yaxes(type="category", categoryorder="array", categoryarray=order)


def _bars(kind: str, chosen: list[tuple[Work, str]], *, pale: bool) -> go.Bar:
    """Draw work of one kind in its lanes: the whole time in the slot, pale, or the training in it."""
    seconds = "{0.name}: {1:.0f} s in the slot, {0.trained:.0f} s training"
    return go.Bar(
        orientation="h",
        name=kind,
        legendgroup=kind,
        showlegend=not pale,
        opacity=0.35 if pale else 1.0,
        y=[lane for _, lane in chosen],
        base=[work.start for work, _ in chosen],
        x=[work.end - work.start if pale else work.trained for work, _ in chosen],
        text=["" if pale else work.label for work, _ in chosen],
        textposition="inside",
        insidetextanchor="middle",
        textangle=0,
        insidetextfont={"color": "#000000" if kind in ("asha", "smoke", "error", "user") else "#ffffff"},
        customdata=[seconds.format(work, work.end - work.start) for work, _ in chosen],
        hovertemplate="%{customdata}<extra></extra>",
        marker={
            "color": COLOURS.get(kind, BLUE),
            "pattern": {"shape": "/" if kind == STAGE2 else ""},
            "line": {"width": 1 if kind == STAGE2 else 0, "color": BLUE},
        },
    )


def pack_lanes(spans: Mapping[Any, tuple[str, float, float]]) -> dict[Any, tuple[str, int]]:
    """Return the first free lane (node, number from 0) for each span (node, start, end), so that none overlap."""
    ends: dict[str, list[float]] = {}
    lanes = {}
    for name, (node, start, end) in sorted(spans.items(), key=lambda item: (item[1][1], item[0])):
        taken = ends.setdefault(node, [])
        free = next((n for n, until in enumerate(taken) if until <= start + 1e-6), len(taken))
        if free == len(taken):
            taken.append(end)
        taken[free] = end
        lanes[name] = (node, free)
    return lanes


def _lane_label(lane: tuple[str, int]) -> str:
    return f"{lane[0]} · {lane[1] + 1}"
