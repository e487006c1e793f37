from typing import get_args

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution

from nkat_ray.config import Sampler
from nkat_ray.search.sampler import make_sampler

NAMES: tuple[Sampler, ...] = ("tpe", "random", "gp")
SPACE = {"x": FloatDistribution(0.0, 1.0), "stem": CategoricalDistribution((None, "tiny"))}


def draws(name: Sampler, seed: int) -> list[object]:
    study = optuna.create_study(direction="maximize", sampler=make_sampler(name, seed=seed))
    found = []  # ten random ones, then one by the sampler's own model: gp is slow
    for _ in range(11):
        trial = study.ask(fixed_distributions=SPACE)
        trial.set_constraint("gate", trial.params["x"] - 0.9)
        study.tell(trial, trial.params["x"])
        found.append(tuple(trial.params.values()))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_each_is_seeded(name: Sampler) -> None:
    one = draws(name, 1)
    assert draws(name, 1) == one
    assert draws(name, 2) != one


def test_every_name_of_the_flag_is_a_sampler_of_its_own() -> None:
    assert get_args(Sampler) == NAMES
    assert len({type(make_sampler(name, seed=0)) for name in NAMES}) == 3
