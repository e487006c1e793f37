"""`report.html`: one run, from what its folder has recorded.

A run may be in progress, interrupted, or without survivors; the page states what is missing.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import plotly.graph_objects as go

from nkat_ray.files import REPORT_FILE, STAGE2_FILE
from nkat_ray.metrics import BEFORE_ACCURACY, BEFORE_SOURCE, EPOCH, GLOBAL_TARGETS, LAMBDA_MODELS, LOCAL_TPE
from nkat_ray.record import scoring
from nkat_ray.record.run_folder import RecordedRun, load_run
from nkat_ray.record.tables import CONFIG_PREFIX, config_of
from nkat_ray.report import charts
from nkat_ray.report.advice import Limits, limits_of, train_command, winner_command
from nkat_ray.report.demand import spoken_others
from nkat_ray.report.effects import Comparison, compare_trials
from nkat_ray.report.language import Code, own_language
from nkat_ray.report.page import Page, templates
from nkat_ray.report.parallel import parallel
from nkat_ray.report.timeline import phases, timeline

Row = Mapping[str, Any]
Rows = Sequence[Row]

SLICES_SHOWN: Final = 8  # of the parameters that explain most
FUNNEL: Final = (  # what is left, and the stop reasons that end a trial there
    ("without a fault", ("nan", "error")),
    ("past smoke", ("smoke",)),
    ("past ASHA", ("asha",)),
)
SPARK: Final = (90, 20)  # width and height of a trial's curve in the table, in pixels


def write_report(
    run_folder: Path, out: Path | None = None, *, summary: Mapping[str, Any] | None = None, lang: Code | None = None
) -> Path:
    """Write one run's report and return its path.

    Args:
        summary: the keys of summary.json if that file has not been written yet.
        lang: the report's language; None for that of the computer's user.

    Raises:
        UserError: the folder holds no run, or one of its files is missing or damaged.
    """
    return run_page(load_run(run_folder, summary), lang or own_language()).save(out or run_folder / REPORT_FILE)


def current_report(run: RecordedRun) -> Path:
    """Return a run's report; it is written again if it is missing or older than the run's tables."""
    page, tables = run.folder / REPORT_FILE, run.folder / STAGE2_FILE
    if not run.ended or not page.exists() or page.stat().st_mtime < tables.stat().st_mtime:
        write_report(run.folder)
    return page


def run_card(run: RecordedRun) -> str:
    """Return a run's verdict and scores as a piece of HTML, for a notebook."""
    return (
        templates()
        .get_template("run.html")
        .render(run=run, scorecard=scoring.scorecard(run.stage2, run.winner), notices=scoring.notices(run.summary))
    )


def run_page(run: RecordedRun, lang: Code) -> Page:
    """Return the report of one run in a language."""
    comparison, limits = compare_trials(run.trials, run.curves, list(run.searched)), limits_of(run)
    return Page(
        "report.html",
        _figures(run, comparison, limits),
        {
            "run": run,
            "title": f"{run.name}: NKAT-Ray report",
            "now": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
            "notices": scoring.notices(run.summary),
            "limits": limits,
            "target": GLOBAL_TARGETS["global_tpe"],
            "rests_on": spoken_others(limits.others, limits.measured),
            "limit_of": {one.trial: one.text for one in limits.diagnoses},
            "before": BEFORE_ACCURACY,
            "before_source": BEFORE_SOURCE,
            "scorecard": scoring.scorecard(run.stage2, run.winner),
            "counted": scoring.datasets_counted(run.stage2, run.winner),
            "models": _models(run),
            "lambda_models": LAMBDA_MODELS,
            "results": scoring.rows_by_dataset(run.stage2, run.winner),
            "ranked": _ranked(run),
            "trials": trial_views(run),
            "spark": SPARK,
            "colours": charts.COLOURS,
            "funnel": funnel(run.trials, run.winner),
            "comparison": comparison,
            "phases": phases(run),
            "command": winner_command(run),
            "facts": _facts(run),
            "config_json": json.dumps(run.config, indent=1, ensure_ascii=False),
        },
        lang,
    )


def _figures(run: RecordedRun, comparison: Comparison | None, limits: Limits) -> dict[str, go.Figure]:
    """Return the page's charts by name; those that have nothing to show are left out."""
    figures = {}
    if limits.losses and run.winner is not None:
        now = scoring.result_scores(run.stage2, run.winner).global_tpe
        figures["waterfall"] = charts.waterfall(limits.losses, now, GLOBAL_TARGETS["global_tpe"])
    if run.curves:
        figures["curves"] = charts.learning_curves(run)
    scored = [row for row in run.trials if row.get("best_val_accuracy") is not None]
    if scored:
        figures["pareto"] = charts.pareto(run.trials, run.gate)
    if len(scored) > 1:
        figures["parallel"] = parallel(run)
    if run.winner is not None:
        bars = {"measured, 95 % interval": scoring.rows_by_dataset(run.stage2, run.winner)}
        figures |= {name: charts.dataset_bars(bars, run.datasets, score=name) for name in ("test_accuracy", "tpe")}
    if comparison is not None:
        figures["effects"] = charts.effects(comparison.effects)
        rows_of = {row["trial"]: row for row in run.trials}
        for effect in comparison.effects[:SLICES_SHOWN]:
            points = [(rows_of[n].get(CONFIG_PREFIX + effect.name), score) for n, score in comparison.scores.items()]
            domain = run.searched[effect.name]
            figures[f"slice-{effect.name}"] = charts.parameter_slice(effect.name, domain, points)
    if phases(run):
        figures["timeline"] = timeline(run)
    return figures


def _models(run: RecordedRun) -> str:
    if run.winner is None:
        return ""
    return scoring.model_sentence(run.stage2, run.winner, run.summary["lambda_model"])


@dataclass(frozen=True)
class Ranked:
    """One survivor's place: validation figures decide, test figures are reported."""

    trial: int
    counted: int  # datasets that count, by validation
    validation: float
    test: float
    lambda_theory: float | None


def _ranked(run: RecordedRun) -> list[Ranked]:
    lambdas = {row["trial"]: row["lambda_theory"] for row in run.trials}
    found = []
    for trial in run.ranking:
        validation = scoring.validation_scores(run.stage2, trial)
        counted = sum(scoring.counts_on_validation(row) for row in scoring.of_trial(run.stage2, trial).values())
        test = scoring.result_scores(run.stage2, trial)
        found.append(Ranked(trial, counted, validation.global_tpe, test.global_tpe, lambdas.get(trial)))
    return found


@dataclass(frozen=True)
class TrialView:
    """One row of the trials table."""

    row: Row
    why: str  # in one line: the error, or what ended it
    curve: str  # points of its sparkline, as SVG has them
    command: str  # trains its configuration again


def trial_views(run: RecordedRun) -> list[TrialView]:
    """Return the rows of the trials table."""
    finite = [point for point in run.curves if point[LOCAL_TPE] is not None and math.isfinite(point[LOCAL_TPE])]
    low, high = (bound((point[LOCAL_TPE] for point in finite), default=0.0) for bound in (min, max))
    last = max((point[EPOCH] for point in finite), default=1)
    width, height = SPARK

    def place(point: Row) -> str:
        x = 2 + (width - 4) * (point[EPOCH] - 1) / max(1, last - 1)
        y = height - 2 - (height - 4) * (point[LOCAL_TPE] - low) / ((high - low) or 1)
        return f"{x:.1f},{y:.1f}"

    return [
        TrialView(
            row=row,
            why=" ".join(str(row.get("error") or row.get("stop_detail") or "").split()),
            curve=" ".join(place(point) for point in finite if point["trial"] == row["trial"]),
            command=train_command(config_of(row), run, seed=row.get("seed")),
        )
        for row in run.trials
    ]


@dataclass(frozen=True)
class Step:
    """One step of the funnel: trials left after it, and what it cost."""

    name: str
    left: int
    said: str


def funnel(trials: Rows, winner: int | None) -> list[Step]:
    """Return the steps from proposals to a winner, with the epochs spent at each, without those at which none ended.

    A trial that passed the gate is a survivor whatever ended it later, so it leaves at none of the earlier steps.
    """
    total = scoring.epochs_of(trials)
    steps = [Step("proposed", len(trials), f"{total} epochs in all")]
    left = list(trials)
    for name, ends in FUNNEL:
        gone = [row for row in left if charts.reason(row) in ends and not row["passed_gate"]]
        left = [row for row in left if row not in gone]
        if gone:
            kinds = ", ".join(sorted({charts.reason(row) for row in gone}))
            steps.append(Step(name, len(left), f"{len(gone)} ended here ({kinds}), {_share(gone, total)}"))
    survivors = [row for row in left if row["passed_gate"]]
    others = [row for row in left if not row["passed_gate"]]
    said = f"{_share(survivors, total)} on survivors"
    if others:
        kinds = ", ".join(sorted({charts.reason(row) for row in others}))
        said = f"{len(others)} did not reach it ({kinds}), {_share(others, total)}; {said}"
    steps.append(Step("survivors of the gate", len(survivors), said))
    best = [row for row in trials if row["trial"] == winner]
    return [*steps, Step("winner", len(best), f"trial {winner}, {_share(best, total)}" if best else "none yet")]


def _share(rows: Rows, total: int) -> str:
    epochs = scoring.epochs_of(rows)
    return f"{epochs} epochs ({100 * epochs / total:.0f} %)" if total else f"{epochs} epochs"


def _facts(run: RecordedRun) -> dict[str, Any]:
    summary = run.summary
    facts = {
        "preset": summary["preset"],
        "space": run.config.get("space"),
        "gate": run.gate,
        "lambda model": summary["lambda_model"],
        "seed": summary["seed"],
        "wall time": scoring.duration(summary["wall_s"]),
        "exit code": summary["exit_code"],
        **summary["versions"],
    }
    return {name: value for name, value in facts.items() if value is not None}
