"""Scores of docs/spec.md section 2: Theory-Practical Equilibrium (TPE), its lambda models, the Stage 2 aggregates.

Pure functions, standard library only. "TPE" here is never Optuna's TPESampler.
"""

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

# The keys under which a trial reports to Tune. Columns of the tables that hold the same have the same names.
EPOCH: Final = "epoch"
TRAIN_LOSS: Final = "train_loss"
TRAIN_ACCURACY: Final = "train_accuracy"
VAL_ACCURACY: Final = "val_accuracy"
LOCAL_TPE: Final = "local_tpe"
ATTENTION_ENTROPY: Final = "attention/entropy/block_"  # and the block's number: nats
NKAT_SCALARS: Final = ("alpha", "beta", "attention_gain", "mlp_gain")  # learned, one of each per block
NKAT_PREFIX: Final = "nkat/"  # before a scalar's name and its block: nkat/alpha/block_0
LAMBDA_THEORY: Final = "lambda_theory"
BEST_LOCAL_TPE: Final = "best_local_tpe"  # in the trial's checkpoint, so that the gate of a restarted driver knows it
STOP_REASON: Final = "stop_reason"
STOP_DETAIL: Final = "stop_detail"  # why, in one line
GPU_KIND: Final = "gpu_kind"  # that a trial is meant for; empty for any
SECONDS_LEFT: Final = "seconds_left"  # of Stage 1 when a trial was proposed; None without a limit
NOTICES: Final = "notices"  # notices of the training since its last report

LAMBDA_MODELS: Final = ("notes", "counted", "millions")
STAGE2_DATASETS: Final = ("mnist", "fashion_mnist", "emnist_letters", "cifar10")

NOTES_LAMBDA: Final = 20.0  # the notes' lambda at depth 7 without a stem
NOTES_EMBED_DIM: Final = 384  # the width at which the notes' lambda is 20
STEM_FACTOR: Final = {"off": 1.0, "tiny": 1.1, "small": 1.2}

NOTES_GATE: Final = 0.60  # Local TPE on CIFAR-10; every report says when another gate was used
SMOKE_EPOCH: Final = 10  # the notes' rule: after ten epochs on CIFAR-10 the validation accuracy must exceed 45 %
SMOKE_ACCURACY: Final = 0.45
GLOBAL_TARGETS: Final = {"global_tpe": 0.70, "consistency": 0.80, "robustness": 0.75}
BEFORE: Final = {"global_tpe": 0.53, "consistency": 0.84, "robustness": 1.00}  # measured before Round-2
# Behind BEFORE, at lambda 20: zapabob/NKAT-Ultimate-Unification, nkat_unified_results_20250601_192029.json (section 1)
BEFORE_ACCURACY: Final = {"mnist": 0.910, "fashion_mnist": 0.841, "emnist_letters": 0.693, "cifar10": 0.346}
BEFORE_SOURCE: Final = "zapabob/NKAT-Ultimate-Unification, Results/json/nkat_unified_results_20250601_192029.json"
# Accuracies that are assumed for the other datasets if none has been measured
ASSUMED_ACCURACY: Final = {"mnist": 0.995, "fashion_mnist": 0.94, "emnist_letters": 0.945}
ACCURACY_TARGETS: Final = {"mnist": 0.91, "fashion_mnist": 0.87, "emnist_letters": 0.75, "cifar10": 0.60}
TPE_TARGETS: Final = {"mnist": 0.69, "fashion_mnist": 0.67, "emnist_letters": 0.60, "cifar10": 0.45}


@dataclass(frozen=True)
class Stage2Scores:
    """Aggregates over the datasets that count: NaN, NaN, 0.0 when none does (spec section 2)."""

    global_tpe: float
    consistency: float
    robustness: float


def tpe_score(accuracy: float, lambda_theory: float) -> float:
    """Return TPE = accuracy / log10(1 + lambda_theory) (spec section 2).

    Args:
        accuracy: fraction of images classified correctly, 0..1.
        lambda_theory: complexity of the model, > 0 and finite.

    Raises:
        ValueError: lambda_theory <= 0 or not finite, or accuracy outside 0..1 (NaN included).
    """
    if not (lambda_theory > 0 and math.isfinite(lambda_theory)):
        raise ValueError(f"lambda_theory is {lambda_theory}; it must be finite and > 0")
    if not 0 <= accuracy <= 1:
        raise ValueError(f"accuracy is {accuracy}; it must lie in 0..1")
    return accuracy / math.log10(1 + lambda_theory)


def accuracy_for(tpe: float, lambda_theory: float) -> float:
    """Return the accuracy at which `tpe_score` equals `tpe`; above 1 the score is out of reach."""
    return tpe * math.log10(1 + lambda_theory)


def accuracy_needed(tpe: float, lambda_theory: float, others: Iterable[float]) -> float:
    """Return the accuracy on one dataset at which the mean over it and the others gives a Global TPE.

    Args:
        tpe: the Global TPE.
        lambda_theory: complexity of the model, > 0.
        others: accuracies on the other datasets, 0..1.

    Returns:
        The accuracy; above 1 the score is out of reach, and at or below 0 the others suffice.
    """
    known = list(others)
    return (len(known) + 1) * accuracy_for(tpe, lambda_theory) - math.fsum(known)


def lambda_notes(conv_stem: str, embed_dim: int) -> float:
    """Return the notes' lambda: 20 x stem x width, never below 20 (spec section 2).

    Args:
        conv_stem: "off", "tiny" or "small".
        embed_dim: width of the tokens, >= 1; below 384 it counts as 384.

    Raises:
        ValueError: an unknown stem, or a width below 1.
    """
    if conv_stem not in STEM_FACTOR:
        raise ValueError(f"conv_stem is {conv_stem!r}; it must be one of {', '.join(STEM_FACTOR)}")
    if embed_dim < 1:
        raise ValueError(f"embed_dim is {embed_dim}; it must be >= 1")
    width = 1 + math.log10(max(embed_dim, NOTES_EMBED_DIM) / NOTES_EMBED_DIM)
    return NOTES_LAMBDA * STEM_FACTOR[conv_stem] * width


def lambda_theory(lambda_model: str, *, conv_stem: str, embed_dim: int, nkat_parameters: int, parameters: int) -> float:
    """Return lambda under one of the three models of spec section 2.

    Args:
        lambda_model: "notes", "counted" (scalar NKAT parameters) or "millions" (all parameters / 1e6).
        conv_stem, embed_dim: the configuration, for "notes".
        nkat_parameters: scalar NKAT parameters of the built model.
        parameters: all parameters of the built model.

    Raises:
        ValueError: an unknown model.
    """
    if lambda_model == "notes":
        return lambda_notes(conv_stem, embed_dim)
    if lambda_model == "counted":
        return float(nkat_parameters)
    if lambda_model == "millions":
        return parameters / 1e6
    raise ValueError(f"lambda_model is {lambda_model!r}; it must be one of {', '.join(LAMBDA_MODELS)}")


def modulation_bound(strength: float, alpha: float, beta: float) -> float:
    """Return how far the modulation's factor can be from 1 (spec section 3), since tanh and sigmoid are within 1."""
    return float(strength * (abs(alpha) + abs(beta)))


def counts(accuracy: float | None, classes: int) -> bool:
    """Return whether a dataset counts: its accuracy is known and above chance, 1 / classes (spec section 2)."""
    return accuracy is not None and accuracy > 1 / classes


def stage2_scores(local_tpes: Mapping[str, float | None]) -> Stage2Scores:
    """Return Global TPE, Consistency and Robustness (spec section 2).

    Args:
        local_tpes: the Local TPE of every dataset of Stage 2 (normally four); None = does not count.

    Raises:
        ValueError: no dataset given, or a score that is NaN or infinite: a dataset that failed is None.
    """
    if not local_tpes:
        raise ValueError("no dataset given; pass every Stage 2 dataset, None where it does not count")
    scores = [score for score in local_tpes.values() if score is not None]
    if not all(math.isfinite(score) for score in scores):
        raise ValueError(f"local_tpes are {dict(local_tpes)}; each must be finite, or None where it does not count")
    if not scores:
        return Stage2Scores(math.nan, math.nan, 0.0)
    return Stage2Scores(
        global_tpe=statistics.fmean(scores),
        consistency=1 - statistics.pstdev(scores),
        robustness=len(scores) / len(local_tpes),
    )


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a proportion (Wilson 1927): bounds in 0..1.

    Raises:
        ValueError: n < 1, or successes outside 0..n.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"successes is {successes} of n = {n}; need n >= 1 and 0 <= successes <= n")
    z = statistics.NormalDist().inv_cdf(0.975)
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    low = 0.0 if successes == 0 else centre - half  # exact at the ends, where rounding would leave 1e-17
    high = 1.0 if successes == n else centre + half
    return low, high
