"""`report.html`: one run, from the files in its folder alone.

Also for a run that is still going, was interrupted, or whose gate nobody passed: what is missing is left out and said.
"""

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from nkat_ray.config import Choice, TrainConfig, TrialConfig, field_names
from nkat_ray.files import REPORT_FILE, STUDY_FILE
from nkat_ray.metrics import LAMBDA_MODELS, STAGE2_DATASETS
from nkat_ray.report import charts, results, tables
from nkat_ray.report.page import VERDICT_CLASS, Page, cell, escaped, table
from nkat_ray.report.results import duration, number
from nkat_ray.report.run_folder import Run, load_run
from nkat_ray.report.study import load_study, study_importances

SLICES_SHOWN: Final = 8  # the most important parameters
FUNNEL: Final = (  # what is left, and the stop reasons that end a trial there
    ("no fault", ("nan", "error")),
    ("past smoke", ("smoke",)),
    ("past ASHA", ("asha",)),
)
STATE_CLASS: Final = {"met": "good", "missed": "bad", "open": "open"}


def write_report(run_folder: Path, out: Path | None = None) -> Path:
    """Write one run's report and return its path.

    Args:
        run_folder: the run's folder.
        out: the file; default: report.html in the run's folder.

    Raises:
        ValueError: the folder holds no run.
    """
    run = load_run(run_folder)
    out = out or run_folder / REPORT_FILE
    return run_page(run).save(out)


def run_page(run: Run) -> Page:
    """The report of one run, section by section."""
    page = Page(f"{run.name}: NKAT-Ray report")
    page.add(_head(run))
    page.section("Against the targets", _scores(run))
    page.section("From proposals to a winner", _funnel(run))
    page.section("Learning curves", *_learning(run, page))
    page.section("Datasets", *_datasets(run, page))
    page.section("What mattered", *_importance(run, page))
    page.section("Accuracy against lambda", *_pareto(run, page))
    page.section("Where the time went", *_timeline(run, page))
    page.section("The winner, to train again", _command(run))
    page.section("Data, versions, seeds", _provenance(run))
    return page


# --- the sections of one run ------------------------------------------------------------------------------------------


def _head(run: Run) -> str:
    verdict = results.verdict_of(run.known, run.stage2)
    notices = results.notices(run.known)
    if not run.ended:
        notices.append(f"This run has not ended: figures as of {datetime.now(UTC):%Y-%m-%d %H:%M} UTC")
    parts = [
        f"<h1>NKAT-Ray: {escaped(run.name)}</h1>",
        f'<p class="verdict {VERDICT_CLASS[verdict.status]}">{escaped(verdict.sentence)}</p>',
        *(f'<p class="notice">{escaped(notice)}</p>' for notice in notices),
    ]
    if run.winner is None and run.trials:
        parts.append(f"<p>{escaped(_miss(run))}</p>")
    return "\n".join(parts)


def _miss(run: Run) -> str:
    passed = [row["trial"] for row in run.trials if row.get("passed_gate")]
    if passed:
        return f"{len(passed)} of {len(run.trials)} trials passed the gate so far."
    miss = results.nearest_miss(run.trials, run.gate)
    if miss is None:
        return "No trial has a score."
    return (
        f"Best so far: trial {miss.trial} with an accuracy of {miss.accuracy:.3f}. At its lambda of "
        f"{miss.lambda_theory:.2f} the gate of {run.gate:.2f} asks for {miss.needed:.3f}."
    )


def _scores(run: Run) -> str:
    counted = f"{results.datasets_counted(run.stage2, run.winner)} of {len(STAGE2_DATASETS)}"
    rows = []
    for line in results.scorecard(run.stage2, run.winner):
        interval = "" if line.interval is None else _aside(f"[{line.interval[0]:.3f}, {line.interval[1]:.3f}]")
        known = not math.isnan(line.now) and run.winner is not None
        gap = f'<span class="{STATE_CLASS[line.state]}">{line.gap:+.3f}</span>'
        name = results.METRIC_NAMES[line.metric] + _aside(f"({counted})")
        now = f"{line.now:.3f}{interval}" if known else "-"
        met = _aside("met") if line.state == "met" else ""
        rows.append([name, f"{line.before:.2f}", now, f"&ge; {line.target:.2f}", gap + met if known else "-"])
    explained = (
        '<p class="soft">"Before" is what was measured before Round-2. The interval covers the choice of test images, '
        "not the spread between seeds.</p>"
    )
    models = ""
    if run.winner is not None:
        sentence = results.model_sentence(run.stage2, run.winner, run.summary.get("lambda_model"))
        models = f"<p>{escaped(sentence)}.</p>"
    scores = table(["metric", "before", "now", "target", "gap"], rows, numeric=(1, 2, 3, 4), minor=(1,))
    return scores + models + explained


def _aside(text: str) -> str:
    """A smaller text behind a figure; on a phone, below it."""
    return f' <span class="aside">{escaped(text)}</span>'


def _funnel(run: Run) -> str:
    """Bars in plain markup: trials that are left after each step, and the epochs spent on those that ended there."""
    if not run.trials:
        return "<p>No trial has been proposed yet.</p>"
    steps = funnel(run.trials, run.winner)
    most = steps[0].left
    rows = [
        f'<div class="what">{escaped(step.name)}: {step.left}</div>'
        f'<div><div class="bar" style="width:{100 * step.left / most:.1f}%"></div>'
        f'<div class="said">{escaped(step.said)}</div></div>'
        for step in steps
    ]
    return f'<div class="funnel">{"".join(rows)}</div>'


@dataclass(frozen=True)
class Step:
    """One step of the funnel: trials left after it, and what it cost."""

    name: str
    left: int
    said: str


def funnel(trials: Sequence[Mapping[str, Any]], winner: int | None) -> list[Step]:
    """Proposed, smoke, ASHA, gate, survivors, winner, with the epochs spent at each step.

    A trial that passed the gate is a survivor whatever ended it later, so it leaves at none of the earlier steps.
    """
    total = results.epochs_of(trials)
    steps = [Step("proposed", len(trials), f"{total} epochs in all")]
    left = list(trials)
    for name, ends in FUNNEL:
        gone = [row for row in left if charts.reason(row) in ends and not row.get("passed_gate")]
        left = [row for row in left if row not in gone]
        ended = f"{len(gone)} ended here ({', '.join(ends)}), {_share(results.epochs_of(gone), total)}"
        steps.append(Step(name, len(left), ended if gone else "none ended here"))
    survivors = [row for row in left if row.get("passed_gate")]
    others = [row for row in left if not row.get("passed_gate")]
    said = _share(results.epochs_of(survivors), total) + " on survivors"
    if others:
        kinds = ", ".join(sorted({charts.reason(row) for row in others}))
        said = f"{len(others)} did not reach it ({kinds}), {_share(results.epochs_of(others), total)}; {said}"
    steps.append(Step("survivors of the gate", len(survivors), said))
    best = [row for row in trials if row["trial"] == winner]
    chosen = f"trial {winner}, {_share(results.epochs_of(best), total)}" if best else "none yet"
    return [*steps, Step("winner", len(best), chosen)]


def _share(epochs: int, total: int) -> str:
    return f"{epochs} epochs ({100 * epochs / total:.0f} %)" if total else f"{epochs} epochs"


def _learning(run: Run, page: Page) -> list[str]:
    if not run.curves:
        return []
    figure = charts.learning_curves(run.trials, run.curves, gate=run.gate, winner=run.winner, searched=run.searched)
    note = (
        '<p class="soft">Each line is a trial, coloured by what ended it; the winner is thick. Point at one for its '
        "configuration, click the legend to hide a group.</p>"
    )
    chart = page.chart(figure, "Local TPE by epoch for every trial, coloured by stop reason, with the gate as a line")
    return [chart, note, _trial_table(run)]


def _trial_table(run: Run) -> str:
    header = ["trial", "end", "epochs", "accuracy", "Local TPE", "lambda", *run.searched, "seed", "why"]
    rows = [
        [
            str(row["trial"]),
            escaped(charts.reason(row)) + (" (passed)" if row.get("passed_gate") else ""),
            str(row.get("epochs") or 0),
            number(row.get("best_val_accuracy")),
            number(row.get("best_local_tpe")),
            number(row.get("lambda_theory"), 2),
            *(cell(row.get(tables.CONFIG_PREFIX + name)) for name in run.searched),
            "-" if row.get("seed") is None else str(row["seed"]),
            escaped(" ".join(str(row.get("error") or row.get("stop_detail") or "").split())[:200]),
        ]
        for row in run.trials
    ]
    body = table(header, rows, numeric=(0, 2, 3, 4, 5))
    return f'<details class="printed"><summary>All {len(rows)} trials as a table</summary>{body}</details>'


def _datasets(run: Run, page: Page) -> list[str]:
    if run.winner is None:
        return []
    rows = results.of_trial(run.stage2, run.winner)
    figures = [
        page.chart(charts.dataset_bars(rows, score=score), f"{score} on the four datasets against the targets")
        for score in ("accuracy", "tpe")
    ]
    pair = f'<div class="pair"><div>{figures[0]}</div><div>{figures[1]}</div></div>'
    return [pair, _dataset_table(rows), _survivor_table(run)]


def _dataset_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    header = ["dataset", "status", "test accuracy", "95 % interval", "n", "TPE", *LAMBDA_MODELS, "note"]
    cells = []
    for name in STAGE2_DATASETS:
        row = rows.get(name, {"status": "missing"})
        interval = "-" if row.get("ci_low") is None else f"{row['ci_low']:.3f} to {row['ci_high']:.3f}"
        status = f'<span class="{"" if row["status"] == "ok" else "open"}">{escaped(row["status"])}</span>'
        scores = [number(row.get(key)) for key in ("tpe", *(f"tpe_{model}" for model in LAMBDA_MODELS))]
        note = "; ".join(filter(None, [row.get("mode"), row.get("error")]))
        accuracy, n = number(row.get("test_accuracy")), cell(row.get("n_test") or "-")
        cells.append([results.DATASET_NAMES[name], status, accuracy, interval, n, *scores, escaped(note)])
    return table(header, cells, numeric=(2, 3, 4, 5, 6, 7, 8))


def _survivor_table(run: Run) -> str:
    lambdas = {row["trial"]: row["lambda_theory"] for row in run.trials if row.get("lambda_theory") is not None}
    order = results.rank(run.stage2, lambdas)
    if len(order) < 2:
        return ""
    rows = []
    for place, trial in enumerate(order, 1):
        validation, test = results.validation_scores(run.stage2, trial), results.result_scores(run.stage2, trial)
        counted = round(validation.robustness * len(STAGE2_DATASETS))
        cells = [str(place), str(trial), f"{counted} of {len(STAGE2_DATASETS)}", number(validation.global_tpe)]
        rows.append([*cells, number(test.global_tpe), number(lambdas.get(trial), 2)])
    header = ["rank", "trial", "datasets", "Global TPE, validation", "Global TPE, test", "lambda"]
    note = '<p class="soft">Ranked by validation; test images are only reported.</p>'
    return f"<h3>Survivors</h3>{table(header, rows, numeric=(0, 1, 2, 3, 4, 5))}{note}"


def _importance(run: Run, page: Page) -> list[str]:
    journal = run.folder / STUDY_FILE
    if not journal.is_file():
        return []
    study = load_study(journal)
    if study is None:
        return []
    values, complete, points = study_importances(study)
    if not points:
        return []
    parts = []
    if values:
        parts.append(page.chart(charts.importances(values), "Hyperparameter importances from the study"))
        parts.append(
            f'<p class="soft">Optuna\'s own importances (PED-ANOVA) from {complete} completed trials'
            f"{': too few to trust' if complete < 20 else ''}.</p>"
        )
    fed_back = run.config.get("feedback") == "global"
    score = "Score" if fed_back else "Local TPE"
    shown = [name for name in (values or points) if name in points][:SLICES_SHOWN]
    slices = [
        page.chart(charts.slice_of(name, points[name], _choices(run, name)), f"{score} against {name}")
        for name in shown
    ]
    parts.append(f'<div class="many">{"".join(f"<div>{item}</div>" for item in slices)}</div>')
    parts.append(
        f'<p class="soft">{score} of each trial against one parameter. A hollow mark is a trial that was stopped '
        f"early: its last {'Local TPE; a full one shows Global TPE on validation' if fed_back else 'value'}.</p>"
    )
    return parts


def _choices(run: Run, name: str) -> Sequence[Any]:
    domain = run.domains.get(name)
    return domain.values if isinstance(domain, Choice) else ()


def _pareto(run: Run, page: Page) -> list[str]:
    if not any(row.get("best_val_accuracy") is not None for row in run.trials):
        return []
    note = (
        '<p class="soft">A higher lambda asks for a higher accuracy: the dashed line is what the gate asks for. '
        "Trials on the solid line are beaten by no other in both.</p>"
    )
    return [page.chart(charts.pareto(run.trials, gate=run.gate), "Best validation accuracy against lambda"), note]


def _timeline(run: Run, page: Page) -> list[str]:
    if not charts.trial_spans(run.trials, run.curves):
        return []
    share = run.summary.get("training_share")
    said = "" if share is None else f"{100 * share:.0f} % of the slots' time went into training. "
    start_s = run.summary.get("trial_start_s")
    said += "" if start_s is None else f"From a trial's proposal to its first step: {start_s:.2g} s (median). "
    note = f'<p class="soft">{said}A bar is a trial in its slot, pale where the slot was held without training.</p>'
    return [page.chart(charts.timeline(run.trials, run.curves), "Which trial held which slot when"), note]


def _command(run: Run) -> str:
    if run.winner is None:
        return ""
    row = next((row for row in run.trials if row["trial"] == run.winner), None)
    config = tables.config_of(row) if row else dict(run.summary["winner"]["config"])
    seed = row.get("seed") if row else None
    generated = bool(results.synthetic_datasets(run.known))
    command = train_command(config, seed=seed, data_dir=run.config.get("data_dir"), synthetic=generated)
    note = '<p class="soft">What is not named has its default.</p>'
    return f'<pre id="command">{escaped(command)}</pre><button data-copy="command">Copy</button>{note}'


def train_command(
    config: Mapping[str, Any], *, seed: int | None = None, data_dir: str | None = None, synthetic: bool = False
) -> str:
    """`nkat train` with the flags that differ from its defaults, quoted for a shell."""
    default = TrialConfig()
    words = ["nkat", "train"]
    for name in field_names(TrialConfig):
        value = config.get(name, getattr(default, name))
        value = tuple(value) if isinstance(value, list) else value
        if value != getattr(default, name):
            words += _flag(name, value)
    if seed is not None and seed != TrainConfig.seed:
        words += _flag("seed", seed)
    if synthetic:
        words += _flag("data", "synthetic")
    elif data_dir is not None:
        words += _flag("data_dir", data_dir)
    return shlex.join(words)


def _flag(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no_{name}"]
    values = value if isinstance(value, tuple) else ("off" if value is None else value,)
    return [f"--{name}", *(str(item) for item in values)]


def _provenance(run: Run) -> str:
    parts = []
    if data := run.known["data"]:
        rows = [_data_cells(name, item) for name, item in data.items()]
        parts.append(table(["dataset", "source", "digest", "images", "note"], rows))
    facts = {
        "preset": run.config.get("preset", run.summary.get("preset")),
        "space": run.config.get("space"),
        "gate": run.gate,
        "lambda model": run.summary.get("lambda_model", run.config.get("lambda_model")),
        "seed": run.summary.get("seed", run.config.get("seed")),
        "wall time": None if run.summary.get("wall_s") is None else duration(run.summary["wall_s"]),
        "exit code": run.summary.get("exit_code"),
        **(run.summary.get("versions") or {}),
    }
    parts.append(table(["what", "value"], [[escaped(k), escaped(v)] for k, v in facts.items() if v is not None]))
    if run.config:
        text = escaped(json.dumps(run.config, indent=1, ensure_ascii=False))
        parts.append(f"<details><summary>The run's whole configuration</summary><pre>{text}</pre></details>")
    return "".join(parts)


def _data_cells(name: str, item: Mapping[str, Any]) -> list[str]:
    images = item.get("images") or "-"
    if isinstance(images, Mapping):
        images = ", ".join(f"{split} {n}" for split, n in images.items())
    rest = {key: value for key, value in item.items() if key not in ("source", "digest", "images", "verified")}
    notes = ["not verified"] if item.get("verified") is False else []
    notes += [f"{key}: {value}" for key, value in rest.items()]
    return [
        escaped(results.DATASET_NAMES.get(name, name)),
        escaped(item.get("source") or "-"),
        f"<code>{escaped(str(item.get('digest') or '-')[:23])}</code>",
        escaped(images),
        escaped("; ".join(notes)),
    ]
