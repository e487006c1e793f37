"""`nkat simulate`: what the notes' targets amount to under each lambda, and where their arithmetic does not close."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table

from nkat_ray.config import ScreenConfig, TrialConfig
from nkat_ray.exit_codes import DONE
from nkat_ray.metrics import (
    ACCURACY_TARGETS,
    GLOBAL_TARGETS,
    LAMBDA_MODELS,
    NOTES_GATE,
    STAGE2_DATASETS,
    TPE_TARGETS,
    accuracy_for,
    lambda_notes,
    lambda_theory,
    stage2_scores,
    tpe_score,
)
from nkat_ray.report.terminal import Screen

CLAIMED_GLOBAL_TPE = 0.72  # the notes' own figure for their four target accuracies


@dataclass(frozen=True, kw_only=True)
class SimulateConfig(ScreenConfig):
    """What the targets, or accuracies of your own, amount to."""

    accuracy: dict[str, float] = field(default_factory=dict)
    """What-if accuracies, 0..1: `--accuracy mnist 0.99 cifar10 0.8`, or with `=`; the others stay at their targets."""

    def __post_init__(self) -> None:
        for name, value in self.accuracy.items():
            if name not in STAGE2_DATASETS:
                raise ValueError(f"dataset is {name!r}; allowed: {', '.join(STAGE2_DATASETS)}")
            if not 0 <= value <= 1:
                raise ValueError(f"accuracy of {name} is {value}; allowed: 0..1")


def simulate(config: SimulateConfig, screen: Screen) -> int:
    """Print the expectation tables of docs/spec.md section 2; exit code 0."""
    accuracies = {**ACCURACY_TARGETS, **config.accuracy}
    lambdas = baseline_lambdas()
    screen.print(score_table(accuracies, lambdas))
    screen.print(demand_table())
    for line in contradictions():
        screen.print(f"- {line}", markup=False, highlight=False)
    scores = {name: _scores_at(accuracies, lam) for name, lam in lambdas.items()}
    lines = [f"{name} ({lambdas[name]:.4g}): Global TPE {each['global_tpe']:.3f}" for name, each in scores.items()]
    screen.conclude(
        {"accuracy": accuracies, "lambdas": lambdas, "scores": scores, "contradictions": contradictions()}, lines
    )  # fmt: skip
    return DONE


def baseline_lambdas() -> dict[str, float]:
    """lambda of the notes' lambda 20, and of the built baseline under each model."""
    from nkat_ray.model import count_nkat_parameters, count_parameters, create_nkat_vit

    baseline = TrialConfig()
    model = create_nkat_vit(baseline, num_classes=10)
    built = {
        name: lambda_theory(
            name, conv_stem=baseline.conv_stem, embed_dim=baseline.embed_dim,
            nkat_parameters=count_nkat_parameters(model), parameters=count_parameters(model),
        )
        for name in LAMBDA_MODELS
    }  # fmt: skip
    return {"lambda 20": 20.0, **built}


def score_table(accuracies: Mapping[str, float], lambdas: Mapping[str, float]) -> Table:
    """Local and Global TPE of some accuracies under each lambda; the notes' TPE targets beside them."""
    table = Table(title="TPE of these accuracies", title_justify="left")
    for name in ("dataset", "accuracy", "notes ask", *(f"{name} ({value:.4g})" for name, value in lambdas.items())):
        table.add_column(name, justify="left" if name == "dataset" else "right")
    for dataset in STAGE2_DATASETS:
        scores = [f"{tpe_score(accuracies[dataset], lam):.3f}" for lam in lambdas.values()]
        table.add_row(dataset, f"{accuracies[dataset]:.3f}", f"{TPE_TARGETS[dataset]:.2f}", *scores)
    table.add_section()
    whole = [stage2_scores({d: tpe_score(accuracies[d], lam) for d in STAGE2_DATASETS}) for lam in lambdas.values()]
    target = GLOBAL_TARGETS
    table.add_row("Global TPE", "", f"{target['global_tpe']:.2f}", *(f"{s.global_tpe:.3f}" for s in whole))
    table.add_row("Consistency", "", f"{target['consistency']:.2f}", *(f"{s.consistency:.3f}" for s in whole))
    table.add_row("Robustness", "", f"{target['robustness']:.2f}", *(f"{s.robustness:.2f}" for s in whole))
    return table


def _scores_at(accuracies: Mapping[str, float], lam: float) -> dict[str, Any]:
    local = {dataset: tpe_score(accuracies[dataset], lam) for dataset in STAGE2_DATASETS}
    return {"local_tpe": local, **asdict(stage2_scores(local))}


def demand_table() -> Table:
    """Accuracy that the gate and the Global target ask for at the notes' lambdas."""
    table = Table(title="Accuracy demanded", title_justify="left")
    for name in ("stem, width", "lambda", f"gate {NOTES_GATE:.2f} on CIFAR-10", "Global TPE 0.70 (mean accuracy)"):
        table.add_column(name, justify="left" if name.startswith("stem") else "right")
    for stem in ("off", "tiny", "small"):
        for width in (384, 512):
            lam = lambda_notes(stem, width)
            gate, target = accuracy_for(NOTES_GATE, lam), accuracy_for(GLOBAL_TARGETS["global_tpe"], lam)
            table.add_row(f"{stem}, {width}", f"{lam:.2f}", f"{gate:.3f}", f"{target:.3f}{_impossible(target)}")
    return table


def _impossible(accuracy: float) -> str:
    return " (impossible)" if accuracy > 1 else ""


def contradictions() -> list[str]:
    """Where the notes' own figures do not follow from each other, computed, not quoted."""
    mean = sum(ACCURACY_TARGETS.values()) / len(ACCURACY_TARGETS)
    at_20 = tpe_score(mean, 20.0)
    needed = 10 ** (mean / CLAIMED_GLOBAL_TPE) - 1
    lines = [
        f"The four target accuracies give a Global TPE of {at_20:.3f} at lambda 20, not the {CLAIMED_GLOBAL_TPE:.2f} "
        f"claimed; {CLAIMED_GLOBAL_TPE:.2f} would need lambda = {needed:.1f}.",
        f"The target for CIFAR-10 (accuracy {ACCURACY_TARGETS['cifar10']:.2f}, TPE {TPE_TARGETS['cifar10']:.2f}) "
        f"lies below the gate of {NOTES_GATE:.2f}, which asks for {accuracy_for(NOTES_GATE, 20.0):.3f} at lambda 20.",
        "Depth 7 has 12.6 M parameters, not about 8 M; the tiny stem has 19,584, not about 30 K; and 'lambda "
        "unchanged' stands beside 'x1.1'.",
    ]
    for dataset, accuracy in ACCURACY_TARGETS.items():
        given = tpe_score(accuracy, 20.0)
        if abs(given - TPE_TARGETS[dataset]) >= 0.005:
            asked = TPE_TARGETS[dataset]
            lines.append(f"{dataset}: accuracy {accuracy:.2f} gives TPE {given:.3f} at lambda 20, not {asked:.2f}.")
    return lines
