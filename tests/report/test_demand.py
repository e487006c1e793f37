"""What designs ask of CIFAR-10, against the formulas of docs/spec.md section 2."""

import math
from collections.abc import Callable
from typing import Any

import pytest

from nkat_ray.config import RunConfig
from nkat_ray.metrics import accuracy_needed, tpe_score
from nkat_ray.report.demand import demands, other_accuracies, spoken_accuracy, spoken_others
from nkat_ray.space import SPACES, Choice, Span

OTHERS = [0.995, 0.94, 0.945]


@pytest.mark.parametrize("lam", [15.0, 20.0, 27.0])
def test_the_accuracy_needed_gives_the_global_tpe(lam: float) -> None:
    others = [0.5, 0.6, 0.7]
    needed = accuracy_needed(0.4, lam, others)
    assert sum(tpe_score(accuracy, lam) for accuracy in (needed, *others)) / 4 == pytest.approx(0.4)


def test_every_stem_and_width_of_round_2() -> None:
    found = {(d.conv_stem, d.widths): d for d in demands(RunConfig(), SPACES["round2"], OTHERS)}
    assert list(found) == [(stem, (width,)) for stem in ("off", "tiny", "small") for width in (384, 448, 512)]
    plain = found["off", (384,)]
    assert plain.lambda_theory == (20.0, 20.0)
    assert plain.gate == pytest.approx((0.6 * math.log10(21),) * 2)
    assert plain.target == pytest.approx((2.8 * math.log10(21) - 2.88,) * 2)


def test_widths_with_one_lambda_are_one_line() -> None:
    found = demands(RunConfig(gate=0.3, conv_stem="tiny"), SPACES["quick"], OTHERS)
    assert [(d.conv_stem, d.widths) for d in found] == [("tiny", (64, 96))]


def test_what_is_fixed_is_the_only_design() -> None:
    (one,) = demands(RunConfig(conv_stem="small", embed_dim=400), {"depth": Span(5, 9, step=1)}, OTHERS)
    assert (one.conv_stem, one.widths) == ("small", (400,))


def test_the_depth_decides_what_is_counted() -> None:
    (one,) = demands(RunConfig(lambda_model="counted"), {"depth": Choice((5, 9))}, OTHERS)
    assert one.lambda_theory == (20.0, 36.0)
    assert one.gate == pytest.approx((0.6 * math.log10(21), 0.6 * math.log10(37)))


@pytest.mark.parametrize(
    ("bounds", "said"),
    [
        ((0.5, 0.5), "0.500"),
        ((0.5, 0.6), "0.500 to 0.600"),
        ((0.9, 1.2), "0.900 to impossible"),
        ((1.1, 1.2), "impossible"),
        ((1.0, 1.0), "1.000"),
        ((-0.2, -0.2), "0.000"),
    ],
)
def test_an_accuracy_above_one_is_impossible(bounds: tuple[float, float], said: str) -> None:
    assert spoken_accuracy(bounds) == said


def test_accuracies_are_the_winners_own_where_it_was_tested(stage2_rows: Callable[..., Any]) -> None:
    rows = stage2_rows(3, 22.0, {"mnist": 0.98, "fashion_mnist": 0.05, "emnist_letters": None, "cifar10": 0.7})
    others, measured = other_accuracies(rows, 3)
    assert others == {"mnist": 0.98, "fashion_mnist": 0.94, "emnist_letters": 0.945}  # at chance counts for nothing
    assert measured == ["mnist"]
    assert spoken_others(others, measured).endswith("EMNIST letters 0.945 (assumed: Fashion-MNIST, EMNIST letters)")
    assert spoken_others(others, ()).endswith("0.945 (assumed)")
    assert other_accuracies(rows, None)[1] == []
