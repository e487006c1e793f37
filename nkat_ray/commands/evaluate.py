"""`nkat evaluate`: Stage 2 alone, on the survivors of a run or on one checkpoint."""

import contextlib
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from nkat_ray.cluster.resources import refuse_oversized, trial_share
from nkat_ray.config import (
    ClusterConfig,
    CompileConfig,
    DataConfig,
    ImageLimit,
    LambdaModel,
    OptionalFloat,
    OptionalInt,
    RunConfig,
    ScreenConfig,
    Seed,
    Stage2Config,
    config_of_json,
    field_names,
)
from nkat_ray.data import Dataset, Missing
from nkat_ray.data.suite import Datasets, describe_data, open_datasets, refuse_other_data
from nkat_ray.errors import DONE, FAULT, UserError
from nkat_ray.fields import Positional, Range
from nkat_ray.files import CONFIG_FILE, JOURNAL_FILE, STAGE2_FILE, WEIGHTS_FILE
from nkat_ray.flags import Program
from nkat_ray.record import scoring, tables
from nkat_ray.record.journal import KEPT_BEST, Journal, TrialRecord, read_state
from nkat_ray.record.observer import Observers
from nkat_ray.record.run import Run
from nkat_ray.record.storage import RunStorage
from nkat_ray.report.progress import Progress
from nkat_ray.report.terminal import Screen, final_report, result_lines, screen_of

CHOOSE = ("gate", "best")  # flags that choose trials whatever the run's own gate


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(DataConfig, ClusterConfig, Stage2Config, CompileConfig, ScreenConfig):
    """The configuration of `nkat evaluate`: transfer, validation, ranking and test, without Stage 1."""

    target: Annotated[Path, Positional()]
    """Folder to evaluate: a run (all its survivors), or one model (`best/`, a checkpoint: weights.safetensors)."""
    gate: Annotated[OptionalFloat, Range(gt=0, le=1)] = None
    """Evaluate the run's trials whose best Local TPE reaches this gate instead of the run's own."""
    best: Annotated[OptionalInt, Range(ge=1, le=1000)] = None
    """Evaluate so many of the run's best trials. It keeps the weights of its survivors and of its three best."""
    lambda_model: LambdaModel = "notes"
    """Lambda in the TPE score: notes, counted or millions."""
    seed: Seed = 0
    """Seed of the transfers."""
    out: Path | None = None
    """Folder for the results. Default: <target>/evaluations/<UTC time>; with --official <target>/official."""
    official: bool = False
    """Retrain the run's winner in full with several seeds and evaluate each: the official recalculation. To continue it
    after an interruption, repeat the command."""
    seeds: Annotated[int, Range(ge=1, le=100)] = 3
    """Number of trainings for --official, one seed per training."""
    train_images: ImageLimit = None
    """CIFAR-10 training images for --official. The subset is stratified and fixed; off uses all but validation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.official and self.train_images is not None:
            self.refuse("train_images", "only --official trains on CIFAR-10", "add it")
        if not self.official and self.compile:
            self.refuse("compile", "only --official trains for long enough", "add it, or leave this out")
        if self.gate is not None and self.best is not None:
            self.refuse("best", "--gate chooses the trials already", "give one of the two")
        for name in CHOOSE:
            if self.official and getattr(self, name) is not None:
                self.refuse(name, "--official trains the run's winner", "leave it out")


PROGRAM = Program(
    name="nkat evaluate",
    config=EvaluateConfig,
    summary="Run Stage 2 alone, on a run's survivors or on one model; with --official recalculate the winner's scores.",
    groups={
        "Start here": (
            "target",
            "gate",
            "best",
            "official",
            "seeds",
            "compile",
            "out",
            "data_dir",
            "data",
            "train_images",
            "lambda_model",
            "seed",
        ),
        "Stage 2": field_names(Stage2Config),
        "Cluster": field_names(ClusterConfig),
        "Output": field_names(ScreenConfig),
    },
    examples=(
        "nkat evaluate runs/quick-20260101-120000 --transfer probe",
        "nkat evaluate runs/quick-20260101-120000 --best 3",
        "nkat evaluate --official runs/quick-20260101-120000",
    ),
)


def main(argv: Sequence[str]) -> int:
    """Evaluate the run or the model that the command line names; return the exit code."""
    from nkat_ray.commands.official import recalculate

    config = read(argv)
    with screen_of(config) as screen:
        return recalculate(config, screen) if config.official else evaluate(config, screen)


def read(argv: Sequence[str]) -> EvaluateConfig:
    """Read the configuration from the command line; a flag that is not given has the run's own value.

    Raises:
        UserError: a flag is not allowed, or the target is neither a run nor a model.
    """
    typed = PROGRAM.read(argv)
    EvaluateConfig(**typed)  # refuses a bad value before the target is read
    own = with_defaults_of(typed["target"], official=typed.get("official", False))
    return dataclasses.replace(own, **typed)


class WithoutNotices(Observers):
    """Observers of an evaluation, without notices: here it is normal that weights come from disk."""

    def on_notice(self, text: str) -> None:
        """Do nothing."""


SHARED = sorted(  # flags that a run has too, without those of the screen
    (set(field_names(EvaluateConfig)) & set(field_names(RunConfig)))
    - {*field_names(ScreenConfig), "train_images", "gate"}
)
LIMITS = ("transfer_images", "test_images")


def with_defaults_of(target: Path, *, official: bool = False) -> EvaluateConfig:
    """Return the default configuration for a target.

    A run's own settings and data are the defaults, so that the evaluation equals the run's Stage 2.

    Args:
        official: whether to leave out the run's limits on images, so that all images are used.

    Raises:
        UserError: the target is neither a run nor a model.
    """
    _refuse_unknown_target(target)
    if not _is_run(target):
        return EvaluateConfig(target=target)
    saved = config_of_json(RunConfig, tables.read_summary(target / CONFIG_FILE))
    taken = [name for name in SHARED if not (official and name in LIMITS)]
    return EvaluateConfig(target=target, **{name: getattr(saved, name) for name in taken})


def evaluate(config: EvaluateConfig, screen: Screen) -> int:
    """Evaluate a target and print the report.

    Returns:
        The exit code: 0, or 1 if no dataset counts.

    Raises:
        UserError: the target is neither a run nor a model, or has no trial to evaluate; or a dataset is missing or
            differs from the run's.
    """
    from nkat_ray.cluster.connect import connected, describe_cluster
    from nkat_ray.search.vault import open_vault
    from nkat_ray.stage2.stage2 import Stage2
    from nkat_ray.stage2.survivor import model_survivor, survivor_of

    _refuse_unknown_target(config.target)
    run = run_config(config)
    records, notices = chosen_trials(config, run.gate)
    out = config.out or config.target / "evaluations" / f"{datetime.now(UTC):%Y%m%d-%H%M%S}"
    if out.exists():
        raise UserError(f"out is {str(out)!r}; it exists; choose another folder")
    with screen.phase("reading the datasets"):
        run, datasets = open_datasets(run, screen)
    if _is_run(config.target):
        datasets = refuse_changed_data(config.target, datasets)
    progress = Progress(run, datasets, title=config.target.name, console=screen)
    with screen.entering("starting Ray", connected(run.address, verbose=run.verbose)):
        cluster = describe_cluster(run.gpus_per_trial)
        survivors = [survivor_of(record, run, cluster) for record in records] or [
            model_survivor(config.target, trial_share(run.trial, run, cluster))
        ]
        refuse_oversized((survivor.share for survivor in survivors), cluster)
        out.mkdir(parents=True)
        tables.write_json(out / CONFIG_FILE, {**dataclasses.asdict(config), "notices": notices})
        journal = Journal(out)
        journal.write("run")
        for text in notices:
            journal.write("notice", text=text)
        context = Run(config=run, domains={}, datasets=datasets, storage=RunStorage(out, None), journal=journal)
        observer = WithoutNotices([progress])
        with progress, contextlib.closing(journal):
            stage2 = Stage2(context, cluster=cluster, vault=open_vault(out.name), observer=observer)
            winner = stage2.evaluate(survivors)
    rows = list(journal.state.tested.values())
    tables.write_rows(out / STAGE2_FILE, rows, metadata={"notices": "; ".join(notices)} if notices else None)
    code = DONE if scoring.datasets_counted(rows, winner) else FAULT
    summary = _summary(run, rows, winner, describe_data(datasets), notices)
    final_report(summary, [], rows, screen)
    screen.print(f"results: {out}", markup=False, highlight=False, soft_wrap=True)
    document = {**summary, "exit_code": code, "stage2": rows, "folder": out.absolute()}
    screen.conclude(document, [*result_lines(summary, rows), f"results: {out}"])
    return code


def refuse_changed_data(target: Path, datasets: Datasets) -> dict[str, Dataset | Missing]:
    """Return the datasets, after checking that those the run used are unchanged.

    Raises:
        UserError: a dataset has other images now than in the run.
    """
    saved = tables.read_summary(target / CONFIG_FILE, "found")["found"]
    before = {name: saved.get(name, described) for name, described in describe_data(datasets).items()}
    return refuse_other_data(before, datasets)


def _is_run(target: Path) -> bool:
    return (target / JOURNAL_FILE).exists() and (target / CONFIG_FILE).exists()


def _refuse_unknown_target(target: Path) -> None:
    if not _is_run(target) and not (target / WEIGHTS_FILE).exists():
        raise UserError(f"target is {str(target)!r}; it is neither a run's folder nor a model with {WEIGHTS_FILE}")


def run_config(config: EvaluateConfig) -> RunConfig:
    """Return the run's configuration (for a model, its trial's) with this command's flags."""
    flags = {name: getattr(config, name) for name in SHARED}
    if _is_run(config.target):
        return config_of_json(RunConfig, tables.read_summary(config.target / CONFIG_FILE), **flags)
    from nkat_ray.train.checkpoint import CheckpointError, Weights

    try:
        trial = Weights.from_bytes((config.target / WEIGHTS_FILE).read_bytes()).config
    except CheckpointError as error:
        raise UserError(f"target is {str(config.target)!r}; its {WEIGHTS_FILE} cannot be read: {error}") from error
    return RunConfig(**{**vars(trial), "grace": min(5, trial.epochs), **flags})


def chosen_trials(config: EvaluateConfig, run_gate: float) -> tuple[list[TrialRecord], list[str]]:
    """Return the trials to evaluate, none for a model; with --gate or --best also one line that says so.

    Raises:
        UserError: there is no such trial, or the run has kept the weights of none.
    """
    chosen = next((name for name in CHOOSE if getattr(config, name) is not None), None)
    if not _is_run(config.target):
        if chosen:
            config.refuse(chosen, "the target is one model, not a run with trials to choose from", "leave it out")
        return [], []
    state, name = read_state(config.target), str(config.target)
    if chosen is None:
        passed = [state.trials[number] for number in state.survivors(run_gate)]
        if not passed:
            advice = "evaluate its best trials with --best 3" if state.by_score() else "none has a score"
            raise UserError(f"target is {name!r}; none of its trials passed the gate of {run_gate}; {advice}")
        return passed, []
    scored = state.by_score()
    if not scored:
        raise UserError(f"target is {name!r}; none of its trials has a score; choose another run")
    wanted = [r for r in scored if r.passed(config.gate)] if config.gate is not None else scored[: config.best]
    if not wanted:
        best = f"its best trial, {scored[0].trial}, has Local TPE {scored[0].best_score:.4f}"
        config.refuse("gate", f"no trial of {name} reaches it", f"{best}: choose a lower one, or --best 1")
    return _with_weights(wanted, config, run_gate)


def _with_weights(
    wanted: Sequence[TrialRecord], config: EvaluateConfig, run_gate: float
) -> tuple[list[TrialRecord], list[str]]:
    from nkat_ray.stage2.weights import weights_on_disk

    found = [record for record in wanted if weights_on_disk(record.checkpoints[::-1]) is not None]
    lost = ", ".join(str(record.trial) for record in wanted if record not in found)
    if not found:
        kept = f"a run keeps those of its survivors and its {KEPT_BEST} best trials, and earlier versions kept fewer"
        raise UserError(f"target is {str(config.target)!r}; it has no weights of trials {lost} ({kept}); run it again")
    best = "its best trial" if config.best == 1 else f"its {config.best} best trials"
    how = best if config.gate is None else f"gate {_gate(config.gate)}"
    text = f"{scoring.AFTER_THE_FACT} with {how}; the run's gate was {_gate(run_gate)}"
    return found, [f"{text}; left out without weights: trials {lost}" if lost else text]


def _gate(gate: float) -> str:
    return f"{gate:.2f}" if gate == round(gate, 2) else f"{gate:g}"


def _summary(
    run: RunConfig, rows: list[dict[str, Any]], winner: int, data: dict[str, Any], notices: list[str]
) -> dict[str, Any]:
    """Return the keys of summary.json that apply to an evaluation."""
    summary = {
        "preset": run.preset, "gate": run.gate, "lambda_model": run.lambda_model, "data": data, "exit_code": 0,
        "notices": notices, "survivors": sorted({row["trial"] for row in rows}), "stop_reasons": {},
        "winner": {"trial": winner, **dataclasses.asdict(scoring.result_scores(rows, winner))},
    }  # fmt: skip
    verdict = scoring.verdict_of(summary, rows)
    return {**summary, "verdict": verdict.status, "verdict_sentence": verdict.sentence}
