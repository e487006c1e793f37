"""Compute the CIFAR-10 accuracy that a design needs: for the gate, and for Global TPE 0.70 (docs/spec.md section 2)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from nkat_ray.config import STAGE1_DATASET, RunConfig
from nkat_ray.cost import parameter_estimate
from nkat_ray.metrics import (
    ASSUMED_ACCURACY,
    GLOBAL_TARGETS,
    NKAT_SCALARS,
    STEM_FACTOR,
    accuracy_for,
    accuracy_needed,
    lambda_theory,
)
from nkat_ray.record import scoring
from nkat_ray.space import Domain, design_configs

Bounds = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Demand:
    """CIFAR-10 accuracies that one stem needs at some widths: lowest and highest over the rest of the search space."""

    conv_stem: str
    widths: tuple[int, ...]
    lambda_theory: Bounds
    gate: Bounds  # accuracy at which a trial passes the gate; above 1 none suffices
    target: Bounds  # accuracy at which Global TPE reaches its target; above 1 none suffices

    @property
    def design(self) -> str:
        """Stem and widths as text."""
        return f"{stem_name(self.conv_stem)}, width {' or '.join(map(str, self.widths))}"


def demands(run: RunConfig, space: Mapping[str, Domain], others: Iterable[float]) -> list[Demand]:
    """Compute the demands of every stem and width of a search space; widths with the same lambda share one."""
    known, target = list(others), GLOBAL_TARGETS["global_tpe"]
    lambdas: dict[tuple[str, int], list[float]] = {}
    for config in design_configs(run, space):
        lam = lambda_theory(
            run.lambda_model, conv_stem=config.conv_stem, embed_dim=config.embed_dim,
            nkat_parameters=len(NKAT_SCALARS) * config.depth, parameters=parameter_estimate(config),
        )  # fmt: skip
        lambdas.setdefault((config.conv_stem, config.embed_dim), []).append(lam)
    order = list(STEM_FACTOR)
    widths: dict[tuple[str, Bounds], list[int]] = {}
    for (stem, width), found in sorted(lambdas.items(), key=lambda item: (order.index(item[0][0]), item[0][1])):
        widths.setdefault((stem, (min(found), max(found))), []).append(width)
    return [
        Demand(
            conv_stem=stem, widths=tuple(same), lambda_theory=(low, high),
            gate=(accuracy_for(run.gate, low), accuracy_for(run.gate, high)),
            target=(accuracy_needed(target, low, known), accuracy_needed(target, high, known)),
        )
        for (stem, (low, high)), same in widths.items()
    ]  # fmt: skip


def other_accuracies(rows: scoring.Rows, winner: int | None) -> tuple[dict[str, float], list[str]]:
    """Return the accuracies of the datasets other than CIFAR-10, and the names of those that were measured.

    Args:
        winner: the trial whose test accuracies are used; for a dataset without one ASSUMED_ACCURACY is.
    """
    tested = scoring.of_trial(rows, winner)
    measured = {n: r["test_accuracy"] for n, r in tested.items() if n != STAGE1_DATASET and scoring.counts_on_test(r)}
    return {**ASSUMED_ACCURACY, **measured}, [name for name in ASSUMED_ACCURACY if name in measured]


def spoken_accuracy(bounds: Bounds) -> str:
    """Format the accuracies of a demand: `0.822`, `0.822 to 0.914`, or `impossible` above 1."""
    low, high = ("impossible" if value > 1 else f"{max(0.0, value):.3f}" for value in bounds)
    return low if low == high else f"{low} to {high}"


def spoken_span(bounds: Bounds, digits: int = 2) -> str:
    """Format two numbers, `20.00 to 22.00`, or one where they are the same."""
    low, high = (scoring.number(value, digits) for value in bounds)
    return low if bounds[0] == bounds[1] else f"{low} to {high}"


def spoken_others(others: Mapping[str, float], measured: Iterable[str]) -> str:
    """List the accuracies that a demand is based on, and say which of them are assumed."""
    known = set(measured)
    parts = [f"{scoring.dataset_name(name)} {value:.3f}" for name, value in others.items()]
    assumed = [scoring.dataset_name(name) for name in others if name not in known]
    said = "" if not assumed else " (assumed)" if not known else f" (assumed: {', '.join(assumed)})"
    return f"{', '.join(parts[:-1])} and {parts[-1]}{said}"


def stem_name(conv_stem: str) -> str:
    """Return a stem's display name."""
    return "no stem" if conv_stem == "off" else f"{conv_stem} stem"
