"""What limits a run, and what its reader can do next as commands to copy: every sentence follows from a rule here.

A rule that the data do not support says nothing.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeGuard, TypeVar

from nkat_ray.config import (
    IMAGE_SIZE,
    PRESETS,
    STAGE1_DATASET,
    RunConfig,
    TrialConfig,
    config_of_json,
    default_storage_path,
    field_names,
)
from nkat_ray.cost import epoch_flops, least_epochs
from nkat_ray.data.spec import KNOWN
from nkat_ray.errors import FAULT, UserError
from nkat_ray.flags import typed_text
from nkat_ray.metrics import (
    EPOCH,
    GLOBAL_TARGETS,
    STAGE2_DATASETS,
    TRAIN_ACCURACY,
    VAL_ACCURACY,
    accuracy_for,
    accuracy_needed,
    modulation_bound,
    tpe_score,
)
from nkat_ray.record import scoring
from nkat_ray.record.journal import FAILED_REASONS
from nkat_ray.record.run_folder import RecordedRun
from nkat_ray.record.tables import config_of
from nkat_ray.report.demand import Demand, demands, other_accuracies, stem_name
from nkat_ray.report.wording import after_the_fact, closest_sentence, command_line
from nkat_ray.space import SPACES, Domain, corner_configs

Row = Mapping[str, Any]
T = TypeVar("T")

RISING: Final = 0.01  # gain in accuracy over the last quarter of the epochs that counts as rising
OVERFIT: Final = 0.10  # training accuracy above validation accuracy that counts as overfitting
FEW_TOKENS: Final = 16
NO_EFFECT: Final = 0.001  # relative change of attention's output that cannot move an accuracy
MUON_LR: Final = 4e-3  # at which small networks trained best with Muon (docs/spec.md section 4)
OFFICIAL_SEEDS: Final = 3
LARGER: Final = {  # by whether the trials had a share of a GPU: the next preset that such a machine can run
    False: {"quick": "laptop"},
    True: {"quick": "gpu", "laptop": "gpu", "gpu": "round2"},
}
MOST_STEPS: Final = 3


@dataclass(frozen=True)
class Step:
    """A suggestion, with its command if there is one."""

    text: str
    command: str = ""
    cost_s: float | None = None
    """Seconds that the command takes on this run's machine, estimated; None where nothing says it."""


# --- what limits a run ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loss:
    """What separates the winner's Global TPE from that of no error at the space's lowest lambda: one part of it."""

    name: str
    tpe: float


@dataclass(frozen=True)
class Diagnosis:
    """What limits one trial, in one sentence; `rule` names the rule that found it."""

    trial: int
    rule: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What limits a run, in the order in which the report says it. Empty where the data say nothing."""

    demands: list[Demand]  # what each design of its space asks of CIFAR-10
    others: dict[str, float]  # accuracies on the other datasets that the demands rest on
    measured: list[str]  # those of them that this run has measured; the rest are assumed
    gap: str
    losses: list[Loss]
    reach: str
    diagnoses: list[Diagnosis]  # one per limited trial: the winner or the closest first, then by score
    steps: list[Step]


def limits_of(run: RecordedRun) -> Limits:
    """Work out what limits a run and what to do next."""
    others, measured = other_accuracies(run.stage2, run.winner)
    found = _demands(run, others)
    losses = losses_of(run, found)
    return Limits(
        demands=found, others=others, measured=measured, gap=gap_sentence(run, losses), losses=losses,
        reach=reach_sentence(run, found, others), diagnoses=diagnoses_of(run, others), steps=next_steps(run),
    )  # fmt: skip


def _demands(run: RecordedRun, others: Mapping[str, float]) -> list[Demand]:
    config = _known(RunConfig, {**run.config, "name": None})
    return [] if config is None else demands(config, run.searched, others.values())


def losses_of(run: RecordedRun, found: Sequence[Demand]) -> list[Loss]:
    """Split the distance of the winner's Global TPE from the ceiling into parts: a higher lambda, and datasets' errors.

    The ceiling is 1 / log10(1 + lambda) at the lowest lambda of the space. The losses add up to it minus the Global
    TPE. Empty without a winner for whom all four datasets count.
    """
    rows = scoring.of_trial(run.stage2, run.winner)
    if len(rows) < len(STAGE2_DATASETS) or not all(map(scoring.counts_on_test, rows.values())):
        return []
    lam = next(row["lambda_theory"] for row in run.trials if row["trial"] == run.winner)
    lowest = min([lam, *(demand.lambda_theory[0] for demand in found)])
    errors = {name: tpe_score(1 - rows[name]["test_accuracy"], lam) / len(rows) for name in STAGE2_DATASETS}
    by_lambda = Loss(f"lambda {lam:.4g} instead of {lowest:.4g}", tpe_score(1.0, lowest) - tpe_score(1.0, lam))
    return [
        *([by_lambda] if lam > lowest else []),
        *(Loss(f"errors on {scoring.dataset_name(name)}", loss) for name, loss in errors.items()),
    ]


def gap_sentence(run: RecordedRun, losses: Sequence[Loss]) -> str:
    """Say where the gap to Global TPE 0.70 comes from; without a winner, how far the closest trial is from the gate."""
    target = GLOBAL_TARGETS["global_tpe"]
    if run.winner is None:
        miss = None if run.survivors else scoring.nearest_miss(run.trials, run.gate)
        return "" if miss is None else closest_sentence(miss, run.gate)
    if not losses:
        return ""
    now = scoring.result_scores(run.stage2, run.winner).global_tpe
    side = "below" if now < target else "above"
    parts = [
        f"{loss.tpe:.3f} by {loss.name}" for loss in sorted(losses, key=lambda loss: -loss.tpe) if loss.tpe >= 5e-4
    ]
    ceiling = now + math.fsum(loss.tpe for loss in losses)
    return (
        f"Trial {run.winner} is {abs(now - target):.3f} {side} Global TPE {target:.2f}. A network without an error "
        f"could have {ceiling:.3f} in this space; of that it loses {', '.join(parts)}."
    )


def reach_sentence(run: RecordedRun, found: Sequence[Demand], others: Mapping[str, float]) -> str:
    """Say whether Global TPE 0.70 can be reached with the winner's design, or with that of the closest trial."""
    row, target = _best_design(run), GLOBAL_TARGETS["global_tpe"]
    if row is None:
        return ""
    needed = accuracy_needed(target, row["lambda_theory"], others.values())
    tested = scoring.of_trial(run.stage2, run.winner).get(STAGE1_DATASET, {}).get("test_accuracy")
    has = row["best_val_accuracy"] if tested is None else tested
    name = f"trial {row['trial']} ({stem_name(row['config/conv_stem'])}, width {row['config/embed_dim']})"
    if needed > 1:
        said = f"With the design of {name} Global TPE {target:.2f} is impossible: CIFAR-10 would need {needed:.3f}."
    elif has is not None and has >= needed:
        said = f"The design of {name} reaches Global TPE {target:.2f}: CIFAR-10 needs {needed:.3f} and has {has:.3f}."
    else:
        said = f"With the design of {name} Global TPE {target:.2f} needs {needed:.3f} on CIFAR-10; it has {has:.3f}."
    least = min(found, key=lambda demand: demand.target[0], default=None)
    if least is None:
        return said
    if least.target[0] > 1:
        return f"{said} No design of this space can reach it."
    if least.target[0] < needed - 5e-4:
        return f"{said} Least is needed with {least.design}: {least.target[0]:.3f}."
    return said


def _best_design(run: RecordedRun) -> Row | None:
    """Return the winner's row, or that of the trial closest to the gate."""
    miss = scoring.nearest_miss(run.trials, run.gate)
    trial = run.winner if run.winner is not None else miss and miss.trial
    return next((row for row in run.trials if row["trial"] == trial and row["lambda_theory"] is not None), None)


def diagnoses_of(run: RecordedRun, others: Mapping[str, float]) -> list[Diagnosis]:
    """Return what limits each trial: those that missed the gate, and survivors while the verdict is not `reached`.

    Left out are trials that have not ended, that ended by a fault, and those about which no rule says anything.
    """
    found = []
    best = _best_design(run)
    for row in sorted(run.trials, key=lambda row: (row is not best, -(row["best_local_tpe"] or -math.inf))):
        fault = row["stop_reason"] in (None, *FAILED_REASONS) or row["best_local_tpe"] is None
        if fault or (row["passed_gate"] and run.verdict.status == "reached"):
            continue
        lam = row["lambda_theory"]
        target = accuracy_needed(GLOBAL_TARGETS["global_tpe"], lam, others.values())
        needed = target if row["passed_gate"] else accuracy_for(run.gate, lam)
        if (one := diagnose(row, _curve(run, row["trial"]), needed)) is not None:
            found.append(one)
    return found


def diagnose(row: Row, curve: Sequence[Row], needed: float) -> Diagnosis | None:
    """Return what limits one trial, by the first rule that matches; None where no rule does.

    Rules about accuracies apply to trials that were not stopped early: of the others nobody knows the end.

    Args:
        row: its row of trials.parquet.
        curve: its rows of curves.parquet, by epoch.
        needed: accuracy that it should have, above 1 where none suffices.
    """
    config, points = _known(TrialConfig, config_of(row)), [point for point in curve if _finite(point[VAL_ACCURACY])]
    if config is None or not points:
        return None
    accuracies = [point[VAL_ACCURACY] for point in points]
    last, trained, tokens = accuracies[-1], points[-1].get(TRAIN_ACCURACY), config.tokens
    whole, span = row["epochs"] == config.epochs or row["stop_reason"] == "budget", max(1, len(points) // 4)
    gain = last - max(accuracies[:-span], default=last)
    if whole and len(points) >= 4 and gain >= RISING and last == max(accuracies):
        text = f"still rising at its last epoch: {gain:+.3f} in the last {span} of {len(points)} epochs"
        return Diagnosis(row["trial"], "still rising", text)
    if whole and _finite(trained) and trained - last >= OVERFIT:
        text = f"it overfits: training accuracy {trained:.3f}, validation accuracy {last:.3f}"
        return Diagnosis(row["trial"], "overfits", text)
    if whole and _finite(trained) and max(trained, last) < min(1.0, needed):
        text = (
            f"training accuracy {trained:.3f} and validation accuracy {last:.3f} are both below the {needed:.3f} "
            f"needed: the network or its training is too small{f', with {tokens} tokens' * (tokens <= FEW_TOKENS)}"
        )
        return Diagnosis(row["trial"], "both low", text)
    if tokens <= FEW_TOKENS:
        side = IMAGE_SIZE // math.isqrt(tokens)
        text = f"{tokens} tokens: each stands for {side}x{side} pixels; smaller patches or --stem_stride 2 give more"
        return Diagnosis(row["trial"], "few tokens", text)
    if config.top_k is not None and config.top_k >= tokens:
        text = f"top_k {config.top_k} keeps all {tokens} tokens: it filters nothing"
        return Diagnosis(row["trial"], "top_k without effect", text)
    if (change := largest_modulation(config, points[-1])) is not None and change < NO_EFFECT:
        text = f"the NKAT modulation changes attention by at most {100 * change:.2g} %: it has no effect on the score"
        return Diagnosis(row["trial"], "modulation without effect", text)
    return None


def largest_modulation(config: TrialConfig, point: Row) -> float | None:
    """Return how far the modulation's factor can be from 1 in any block; None if not known."""
    alpha, beta = point.get("alpha"), point.get("beta")
    if not alpha or not beta:
        return None
    strengths = (config.nkat_strength * config.nkat_decay**block for block in range(len(alpha)))
    return max(map(modulation_bound, strengths, alpha, beta))


def _known(kind: type[T], saved: Mapping[str, Any]) -> T | None:
    """Return a saved configuration; None for one that this version does not know, about which nothing is said."""
    try:
        return config_of_json(kind, saved)
    except UserError:
        return None


def _curve(run: RecordedRun, trial: int) -> list[Row]:
    return sorted((point for point in run.curves if point["trial"] == trial), key=lambda point: point[EPOCH])


def _finite(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


# --- what to do next --------------------------------------------------------------------------------------------------


def next_steps(run: RecordedRun) -> list[Step]:
    """Return what to do next with a run, the most useful first, three at most."""
    return _steps(run)[:MOST_STEPS]


def _steps(run: RecordedRun) -> list[Step]:
    if not run.ended:
        return _unfinished(run)
    if run.winner is None:
        return [_closest(run), *_after_the_fact(run), *_search_on(run)]
    folder = str(run.folder.absolute())
    steps = _unsettled(run)
    if run.verdict.status == "reached" or (run.verdict.status == "undecided" and not steps):
        text = "Retrain the winner with several seeds, for a verdict on all of them:"
        steps.append(Step(text, command_line(["nkat", "evaluate", "--official", folder]), _official_s(run)))
    if run.verdict.status == "not reached":
        steps += _search_on(run)
    return [*steps, Step("See where the winner's attention goes:", command_line(["nkat", "explain", folder]))]


def _unfinished(run: RecordedRun) -> list[Step]:
    resume = ["python", "tune_round2.py", "--resume", "--name", run.name]
    where = str(run.config.get("storage_path") or default_storage_path())
    if where != default_storage_path():
        resume += ["--storage_path", where]
    if run.summary["exit_code"] is not None:
        ended = "A fault ended this run" if run.summary["exit_code"] == FAULT else "This run was interrupted"
        return [Step(f"{ended}. Continue it:", command_line(resume))]
    again = command_line(["nkat", "report", str(run.folder.absolute())])
    return [
        Step("The run is in progress. Update this page:", again),
        Step("If its driver has died, continue it:", command_line(resume)),
    ]


def _closest(run: RecordedRun) -> Step:
    """Train the trial that came closest again, with what its diagnosis asks for."""
    miss = scoring.nearest_miss(run.trials, run.gate)
    if miss is None:
        return Step('No trial has a score: the column "why" of the table says what ended each.')
    if miss.needed > 1:
        return Step(f"No accuracy passes the gate of {run.gate:.2f} at a lambda of {miss.lambda_theory:.2f}: lower it.")
    row = next(row for row in run.trials if row["trial"] == miss.trial)
    config, found = config_of(row), diagnose(row, _curve(run, miss.trial), miss.needed)
    rule, changed = found.rule if found else "", dict[str, Any]()
    if rule == "overfits" and config.get("train_images") is not None:
        how, changed = "on all training images, since it overfits", {"train_images": None}
    elif rule == "both low" and config.get("optimizer") == "adamw":
        how, changed = "with Muon, which learns more per epoch", {"optimizer": "muon", "lr": MUON_LR}
    else:
        how, changed = "for twice as many epochs, to see whether it passes", {"epochs": 2 * config["epochs"]}
    again, seconds = {**config, **changed}, _epoch_s(run, row)
    cost_s = None if seconds is None else seconds * again["epochs"] * _images(run, again) / _images(run, config)
    text = f"Trial {miss.trial} came closest. Train it {how}:"
    return Step(text, train_command(again, run, seed=row["seed"]), cost_s)


def _after_the_fact(run: RecordedRun) -> list[Step]:
    command = after_the_fact(run.summary, run.folder)
    if not command:
        return []
    cost_s = _transfers_s(run, run.summary["weights_kept"], run.datasets)
    return [Step("Take the best trials through Stage 2 all the same:", command, cost_s)]


def _unsettled(run: RecordedRun) -> list[Step]:
    """Return what keeps the verdict open besides its interval: generated, missing or unselected datasets."""
    if scoring.synthetic_datasets(run.summary):
        return [Step("The images were generated. Repeat the run with real ones:", "nkat data fetch")]
    missing = [name for name in run.datasets if run.summary["data"][name].get("missing")]
    if missing:
        return [Step(f"Fetch what was missing ({_names(missing)}), then run again:", "nkat data fetch")]
    absent = [name for name in STAGE2_DATASETS if name not in run.datasets]
    if absent:
        words = ["nkat", "evaluate", str(run.folder.absolute()), "--datasets", *STAGE2_DATASETS]
        text = f"The verdict needs all four datasets, so evaluate the survivors on {_names(absent)} too:"
        return [Step(text, command_line(words), _transfers_s(run, run.survivors, absent))]
    return []


def _search_on(run: RecordedRun) -> list[Step]:
    """Search on: only where Global TPE 0.70 is possible, if the best design so far cannot reach it."""
    row, preset = _best_design(run), run.summary["preset"]
    others, _ = other_accuracies(run.stage2, run.winner)
    least = min(_demands(run, others), key=lambda demand: demand.target[0], default=None)
    target = GLOBAL_TARGETS["global_tpe"]
    if row is not None and least is not None and least.target[0] <= 1 and preset in PRESETS:
        needed = accuracy_needed(target, row["lambda_theory"], others.values())
        if needed > 1:
            design: dict[str, Any] = {"conv_stem": least.conv_stem, "embed_dim": least.widths[-1]}
            if run.config["space"] != PRESETS[preset].get("space", RunConfig.space):
                design["space"] = run.config["space"]
            full = _known(RunConfig, {"preset": preset, **PRESETS[preset], **design})
            if full is not None:  # the preset's heads may not divide that width
                words = ["python", "tune_round2.py", "--preset", preset]
                words += [word for name, value in design.items() for word in (f"--{name}", str(value))]
                text = f"Search only designs that can reach Global TPE {target:.2f} ({least.design}):"
                return [Step(text, command_line(words), _search_s(run, full, _without(run.searched, design)))]
    larger = LARGER[any(row["gpus"] for row in run.trials)].get(preset)
    if larger is not None:
        full = RunConfig.from_preset(larger, name=None)
        text = (
            f"The preset {preset} is a small search. The next one for this machine is {larger}, with "
            f"{full.num_samples} trials of {full.epochs} epochs:"
        )
        command = command_line(["python", "tune_round2.py", "--preset", larger])
        return [Step(text, command, _search_s(run, full, SPACES[full.space]))]
    words = ["python", "tune_round2.py", "--preset", preset, "--warm_start", str(run.folder.absolute())]
    return [Step("Search on, starting from what this run has learned:", command_line(words), run.summary["wall_s"])]


def _without(space: Mapping[str, Domain], fixed: Mapping[str, Any]) -> dict[str, Domain]:
    return {name: domain for name, domain in space.items() if name not in fixed}


# --- what a step costs: this run's own speed, with as many trials at a time -------------------------------------------


def _size(run: RecordedRun, dataset: str) -> int:
    """Return the training images of a dataset, of its release where the run did not find it; 0 for an unknown one."""
    found = run.summary["data"].get(dataset, {}).get("images") or {}
    return int(found.get("train") or (KNOWN[dataset].release.sizes["train"] if dataset in KNOWN else 0))


def _images(run: RecordedRun, config: Mapping[str, Any]) -> int:
    """Return the training images of a trial per epoch."""
    return int(config["train_images"] or 0) or max(1, _size(run, STAGE1_DATASET) - config["val_images"])


def _epoch_s(run: RecordedRun, row: Row) -> float | None:
    seconds = [point["epoch_s"] for point in run.curves if point["trial"] == row["trial"]]
    return statistics.median(seconds) if seconds else None


def _at_a_time(run: RecordedRun) -> float:
    """Return how many trials trained at a time, on average; at least 1."""
    if not run.curves:
        return 1.0
    span = max(p["started_s"] + p["epoch_s"] for p in run.curves) - min(p["started_s"] for p in run.curves)
    return max(1.0, float(math.fsum(point["epoch_s"] for point in run.curves) / max(span, 1e-9)))


def _flops_per_s(run: RecordedRun) -> float | None:
    """Return the operations per second of one trial, as `epoch_flops` counts them; None without an epoch."""
    trials = {row["trial"]: _known(TrialConfig, config_of(row)) for row in run.trials}
    each = {number: epoch_flops(trial, _images(run, vars(trial))) for number, trial in trials.items() if trial}
    points = [point for point in run.curves if point["trial"] in each]
    seconds = math.fsum(point["epoch_s"] for point in points)
    return math.fsum(each[point["trial"]] for point in points) / seconds if seconds else None


def _search_s(run: RecordedRun, full: RunConfig, space: Mapping[str, Domain]) -> float | None:
    """Estimate the least seconds of Stage 1 of a search at this run's speed; None where nothing says it."""
    speed = _flops_per_s(run)
    if not speed:
        return None
    corners = corner_configs(full, space)
    epoch = math.fsum(epoch_flops(trial, _images(run, vars(trial))) for trial in corners) / len(corners)
    seconds = full.num_samples * least_epochs(full) * epoch / speed / _at_a_time(run)
    return seconds if full.stage1_hours is None else min(seconds, 3600 * full.stage1_hours)


def _transfers_s(
    run: RecordedRun, trials: Sequence[int], datasets: Sequence[str], *, whole: bool = False
) -> float | None:
    """Estimate the seconds of some trials' transfers at this run's speed, on `whole` datasets or on as many images as
    the run takes; None where nothing says it."""
    changed = {"name": None, "transfer_images": None} if whole else {"name": None}
    speed, config = _flops_per_s(run), _known(RunConfig, {**run.config, **changed})
    designs = {row["trial"]: _known(TrialConfig, config_of(row)) for row in run.trials if row["trial"] in trials}
    sizes = [_size(run, name) for name in datasets if name != STAGE1_DATASET]
    if not speed or config is None or not all(sizes) or not all(designs.values()):
        return None
    taken = [min(size, config.transfer_images or size) for size in sizes]
    images = sum(config.stage2_epochs(size) * size for size in taken)
    each = {number: epoch_flops(design, images) for number, design in designs.items() if design}
    flops = math.fsum(each[number] for number in trials)
    return flops / speed / _at_a_time(run)


def _official_s(run: RecordedRun) -> float | None:
    """Estimate the seconds of the official recalculation: its trainings, a few at a time, and their transfers."""
    row = next(row for row in run.trials if row["trial"] == run.winner)
    seconds, config = _epoch_s(run, row), config_of(row)
    transfers_s = _transfers_s(run, [row["trial"]] * OFFICIAL_SEEDS, run.datasets, whole=True)
    if seconds is None or transfers_s is None:
        return None
    longer = _images(run, {**config, "train_images": None}) / _images(run, config)
    rounds = OFFICIAL_SEEDS / min(OFFICIAL_SEEDS, _at_a_time(run))
    return rounds * int(config["epochs"]) * seconds * longer + transfers_s


def _names(datasets: Sequence[str]) -> str:
    return ", ".join(scoring.dataset_name(name) for name in datasets)


def winner_command(run: RecordedRun) -> str:
    """Return `nkat train` with the winner's configuration; empty without a winner."""
    row = next((row for row in run.trials if row["trial"] == run.winner), None)
    return "" if row is None else train_command(config_of(row), run, seed=row.get("seed"))


def train_command(config: Mapping[str, Any], run: RecordedRun, *, seed: int | None) -> str:
    """Return `nkat train` with the flags that differ from its defaults, quoted for a shell.

    Args:
        config: a trial's configuration.
        run: the run whose data are used.
        seed: the trial's.
    """
    words, default = ["nkat", "train"], TrialConfig()
    for name in field_names(TrialConfig):
        value = config.get(name, getattr(default, name))
        value = tuple(value) if isinstance(value, list) else value
        if isinstance(value, bool) and value != getattr(default, name):
            words.append(f"--{name}" if value else f"--no_{name}")
        elif value != getattr(default, name):
            words += [f"--{name}", *typed_text(value).split()]
    if seed:  # 0 is the default
        words += ["--seed", str(seed)]
    if scoring.synthetic_datasets(run.summary):
        words += ["--data", "synthetic"]
    elif run.config.get("data_dir") is not None:
        words += ["--data_dir", run.config["data_dir"]]
    return command_line(words)
