"""`report.html`: one run, or several side by side, from the files in its folder alone.

Also for a run that is still going, was interrupted, or whose gate nobody passed: what is missing is left out and said.
"""

import json
import math
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from nkat_ray.config import SPACES, Choice, Domain, TrainConfig, TrialConfig, field_names
from nkat_ray.domains import domain_of_json
from nkat_ray.metrics import LAMBDA_MODELS, STAGE2_DATASETS
from nkat_ray.report import charts, results, tables
from nkat_ray.report.page import Page, escaped, table
from nkat_ray.report.terminal import duration, number

SLICES_SHOWN: Final = 8  # the most important parameters
FUNNEL: Final = (  # what is left, and the stop reasons that end a trial there
    ("no fault", ("nan", "error")),
    ("past smoke", ("smoke",)),
    ("past ASHA", ("asha",)),
)
STATE_CLASS: Final = {"met": "good", "missed": "bad", "open": "open"}
VERDICT_CLASS: Final = {"reached": "reached", "not reached": "not-reached", "undecided": "undecided"}


@dataclass(frozen=True)
class Run:
    """A run folder's files; what is not there yet is empty."""

    folder: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)
    trials: Sequence[Mapping[str, Any]] = ()
    curves: Sequence[Mapping[str, Any]] = ()
    stage2: Sequence[Mapping[str, Any]] = ()

    @property
    def name(self) -> str:
        """The run's name."""
        return str(self.config.get("name") or self.folder.name)

    @property
    def gate(self) -> float:
        """Local TPE that a trial had to reach."""
        return float(self.summary.get("gate", self.config.get("gate", results.NOTES_GATE)))

    @property
    def known(self) -> dict[str, Any]:
        """The summary, or what is known of it before it is written."""
        data = self.config.get("found")
        if not isinstance(data, Mapping):  # described with the configuration, or only the flag
            data = {"all": {"source": "synthetic"}} if data == "synthetic" else {}
        start = {"gate": self.gate, "preset": self.config.get("preset"), "data": data}
        return {"winner": None, "exit_code": None, **start, **self.summary}

    @property
    def winner(self) -> int | None:
        """The best survivor's number, once Stage 2 has named it."""
        winner = self.summary.get("winner")
        return winner["trial"] if winner else None

    @property
    def ended(self) -> bool:
        """Whether the run has come to its end; an interrupted one has not."""
        return self.summary.get("exit_code") not in (None, results.INTERRUPTED)

    @property
    def searched(self) -> list[str]:
        """Names of the searched parameters."""
        return list(self.domains or SPACES["round2"])

    @property
    def domains(self) -> Mapping[str, Domain]:
        """What each of them might be; empty where the run does not say."""
        own = self.config.get("own_space")
        if own:
            return {name: domain_of_json(domain) for name, domain in own.items()}
        return SPACES.get(str(self.config.get("space")), {})


def load_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        ValueError: the folder is not there, or holds none of a run's files.
    """
    readers: dict[str, tuple[str, Callable[[Path], Any]]] = {
        "config": (tables.CONFIG_FILE, tables.read_summary),
        "summary": (tables.SUMMARY_FILE, tables.read_summary),
        "trials": (tables.TRIALS_FILE, tables.read_trials),
        "curves": (tables.CURVES_FILE, tables.read_curves),
        "stage2": (tables.STAGE2_FILE, tables.read_stage2),
    }
    found: dict[str, Any] = {
        name: read(folder / file) for name, (file, read) in readers.items() if (folder / file).is_file()
    }
    if not found:
        raise ValueError(f"{folder} holds no run; a run's folder has {', '.join(file for file, _ in readers.values())}")
    return Run(folder, **found)


def write_report(run_folder: Path, out: Path | None = None) -> Path:
    """Write one run's report and return its path.

    Args:
        run_folder: the run's folder.
        out: the file; default: report.html in the run's folder.

    Raises:
        ValueError: the folder holds no run.
    """
    run = load_run(run_folder)
    out = out or run_folder / tables.REPORT_FILE
    return _save(out, run_page(run))


def compare(*run_folders: Path, out: Path) -> Path:
    """Write one page that sets several runs side by side and return its path.

    Raises:
        ValueError: fewer than two folders, or one that holds no run.
    """
    if len(run_folders) < 2:
        raise ValueError(f"compare needs at least two runs, {len(run_folders)} given")
    return _save(out, compare_page([load_run(folder) for folder in run_folders]))


def _save(out: Path, page: Page) -> Path:
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    temporary.write_text(page.render(), encoding="utf-8")
    os.replace(temporary, out)
    return out


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
        values = results.global_tpe_by_model(run.stage2, run.winner)
        shown = ", ".join(f"{model} {number(value)}" for model, value in values.items())
        models = f"<p>Global TPE by lambda model: {shown} (chosen: {escaped(run.summary.get('lambda_model'))}).</p>"
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
    total = _epochs(trials)
    steps = [Step("proposed", len(trials), f"{total} epochs in all")]
    left = list(trials)
    for name, ends in FUNNEL:
        gone = [row for row in left if charts.reason(row) in ends and not row.get("passed_gate")]
        left = [row for row in left if row not in gone]
        ended = f"{len(gone)} ended here ({', '.join(ends)}), {_share(_epochs(gone), total)}"
        steps.append(Step(name, len(left), ended if gone else "none ended here"))
    survivors = [row for row in left if row.get("passed_gate")]
    others = [row for row in left if not row.get("passed_gate")]
    said = _share(_epochs(survivors), total) + " on survivors"
    if others:
        kinds = ", ".join(sorted({charts.reason(row) for row in others}))
        said = f"{len(others)} did not reach it ({kinds}), {_share(_epochs(others), total)}; {said}"
    steps.append(Step("survivors of the gate", len(survivors), said))
    best = [row for row in trials if row["trial"] == winner]
    chosen = f"trial {winner}, {_share(_epochs(best), total)}" if best else "none yet"
    return [*steps, Step("winner", len(best), chosen)]


def _epochs(rows: Sequence[Mapping[str, Any]]) -> int:
    return sum(row.get("epochs") or 0 for row in rows)


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
            *(_value(row.get(tables.CONFIG_PREFIX + name)) for name in run.searched),
            "-" if row.get("seed") is None else str(row["seed"]),
            escaped(" ".join(str(row.get("error") or row.get("stop_detail") or "").split())[:200]),
        ]
        for row in run.trials
    ]
    body = table(header, rows, numeric=(0, 2, 3, 4, 5))
    return f'<details class="printed"><summary>All {len(rows)} trials as a table</summary>{body}</details>'


def _value(value: Any) -> str:
    return "off" if value is None else f"{value:.4g}" if isinstance(value, float) else escaped(value)


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
        accuracy, n = number(row.get("test_accuracy")), _value(row.get("n_test") or "-")
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
    journal = run.folder / tables.JOURNAL_FILE
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


def load_study(journal: Path) -> Any:
    """The Optuna study in a run's journal, or None where it holds none yet. Nothing is unpickled or written."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    storage = JournalStorage(JournalFileBackend(str(journal)))
    names = optuna.get_all_study_names(storage)
    return optuna.load_study(study_name=names[-1], storage=storage) if names else None


def study_importances(study: Any) -> tuple[dict[str, float], int, dict[str, list[tuple[Any, float, bool]]]]:
    """Importances, the number of completed trials, and each parameter's points (value, objective, complete).

    Of a study with two objectives the points show the first, Local TPE; the importances are those for both. An earlier
    run's trials (`--warm_start`) are no points, since the page shows this run's, but they count in the importances.
    """
    import optuna

    points: dict[str, list[tuple[Any, float, bool]]] = {}
    complete = 0
    for trial in study.get_trials(deepcopy=False):
        if "warm_start" in trial.user_attrs:
            continue
        done = trial.state == optuna.trial.TrialState.COMPLETE
        score = (
            trial.values[0]
            if done
            else trial.intermediate_values.get(trial.last_step)
            if trial.last_step is not None
            else None
        )
        if score is None or not math.isfinite(score):
            continue
        complete += done
        for name, value in trial.params.items():
            points.setdefault(name, []).append((value, score, done))
    if complete < 2:
        return {}, complete, points
    try:
        return optuna.importance.get_param_importances(study), complete, points
    except (ValueError, RuntimeError):  # Optuna refuses a study in which nothing varies
        return {}, complete, points


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


# --- several runs -----------------------------------------------------------------------------------------------------


def compare_page(runs: Sequence[Run]) -> Page:
    """Several runs side by side."""
    named = _distinct(runs)
    page = Page("NKAT-Ray: " + " against ".join(named))
    page.add(f"<h1>NKAT-Ray: {len(runs)} runs compared</h1>")
    best = _best_run(named)
    page.add(f'<p class="verdict">{escaped(best)}</p>')
    for name, run in named.items():
        for notice in results.notices(run.known):
            page.add(f'<p class="notice">{escaped(name)}: {escaped(notice)}</p>')
    page.section("Against the targets", _run_table(named))
    figure = charts.runs_bars({name: _winner_rows(run) for name, run in named.items()})
    page.section("Datasets", page.chart(figure, "Test accuracy of each run's winner on the four datasets"))
    figure = charts.best_so_far({name: run.trials for name, run in named.items()})
    page.section("The search", page.chart(figure, "Best Local TPE by number of trials"), _reason_table(named))
    page.section("Winners' configurations", _config_table(named))
    return page


def _distinct(runs: Sequence[Run]) -> dict[str, Run]:
    """Runs by name; where names repeat, by folder."""
    names = [run.name for run in runs]
    return {run.name if names.count(run.name) == 1 else str(run.folder): run for run in runs}


def _winner_rows(run: Run) -> dict[str, Mapping[str, Any]]:
    return {} if run.winner is None else results.of_trial(run.stage2, run.winner)


def _best_run(named: Mapping[str, Run]) -> str:
    """One sentence: the run with the best Global TPE among those that count on all four, by validation."""
    scored = {
        name: results.validation_scores(run.stage2, run.winner).global_tpe
        for name, run in named.items()
        if run.winner is not None and results.datasets_counted(run.stage2, run.winner) == len(STAGE2_DATASETS)
    }
    if not scored:
        return "No run has a winner that counts on all four datasets."
    best = max(scored, key=lambda name: scored[name])
    return f"{best} has the highest Global TPE on validation ({scored[best]:.3f})."


def _run_table(named: Mapping[str, Run]) -> str:
    header = ["run", "preset", "gate", "trials", "survivors", "winner", "datasets"]
    header += [*results.METRIC_NAMES.values(), "time", "verdict"]
    rows = []
    for name, run in named.items():
        verdict = results.verdict_of(run.known, run.stage2)
        wall = run.summary.get("wall_s")
        known = run.winner is not None
        rows.append(
            [
                escaped(name),
                escaped(run.config.get("preset", run.summary.get("preset", "-"))),
                f"{run.gate:.2f}",
                str(len(run.trials)),
                str(sum(bool(row.get("passed_gate")) for row in run.trials)),
                str(run.winner) if known else "-",
                f"{results.datasets_counted(run.stage2, run.winner)} of {len(STAGE2_DATASETS)}",
                *(number(line.now if known else None) for line in results.scorecard(run.stage2, run.winner)),
                "-" if wall is None else duration(wall),
                f'<span class="{VERDICT_STYLE[verdict.status]}">{verdict.status}</span>',
            ]
        )
    return table(header, rows, numeric=tuple(range(2, 11)))


VERDICT_STYLE: Final = {"reached": "good", "not reached": "bad", "undecided": "open"}


def _reason_table(named: Mapping[str, Run]) -> str:
    rows = []
    for name, run in named.items():
        counts = results.stop_counts(run.trials)
        rows.append(
            [escaped(name), *(str(counts.get(kind, 0)) for kind in tables.STOP_REASONS), str(_epochs(run.trials))]
        )
    numeric = tuple(range(1, len(tables.STOP_REASONS) + 2))
    return table(["run", *tables.STOP_REASONS, "epochs"], rows, numeric=numeric)


def _config_table(named: Mapping[str, Run]) -> str:
    """The fields in which the winners or the runs' configurations differ."""
    configs = {
        name: dict(run.config) | (dict(run.summary["winner"]["config"]) if run.winner is not None else {})
        for name, run in named.items()
    }
    keys = [key for key in next(iter(configs.values()), {}) if len({str(c.get(key)) for c in configs.values()}) > 1]
    rows = [[escaped(key), *(_value(config.get(key)) for config in configs.values())] for key in keys if key != "name"]
    return table(["field", *named], rows) if rows else "<p>They do not differ.</p>"
