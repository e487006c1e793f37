import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution

from nkat_ray.config import RunConfig, field_names
from nkat_ray.search.sampler import make_sampler

NAMES = ("tpe", "random", "gp", "nsga2")
SPACE = {"x": FloatDistribution(0.0, 1.0), "stem": CategoricalDistribution((None, "tiny"))}


def draws(name: str, seed: int, directions: tuple[str, ...] = ("maximize",), trials: int = 11) -> list[object]:
    study = optuna.create_study(directions=directions, sampler=make_sampler(name, seed=seed, num_samples=20))
    found = []  # ten random ones, then one by the sampler's own lights: gp is slow
    for _ in range(trials):
        trial = study.ask(fixed_distributions=SPACE)
        trial.set_constraint("gate", trial.params["x"] - 0.9)
        study.tell(trial, [trial.params["x"], *([0.5] if len(directions) > 1 else [])])
        found.append(tuple(trial.params.values()))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_each_is_seeded(name: str) -> None:
    one = draws(name, 1)
    assert draws(name, 1) == one
    assert draws(name, 2) != one


@pytest.mark.parametrize("name", NAMES)
def test_each_takes_two_objectives_and_a_constraint(name: str) -> None:
    assert len(draws(name, 1, ("maximize", "minimize"))) == 11


@pytest.mark.parametrize(("num_samples", "population"), [(1, 4), (20, 4), (50, 10), (250, 50), (100_000, 50)])
def test_nsga2_has_generations_within_the_run(num_samples: int, population: int) -> None:
    assert make_sampler("nsga2", seed=0, num_samples=num_samples)._population_size == population  # type: ignore[attr-defined]


def test_every_name_of_the_flag_is_known_and_no_other() -> None:
    assert "sampler" in field_names(RunConfig)
    for name in NAMES:
        make_sampler(RunConfig(sampler=name).sampler, seed=0, num_samples=5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sampler is 'cmaes'; allowed: tpe, random, gp, nsga2"):
        make_sampler("cmaes", seed=0, num_samples=5)
