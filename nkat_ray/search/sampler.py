"""Optuna's samplers, seeded, each as this search needs it."""

from collections.abc import Callable

from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler

GENERATION_SHARE = 5  # NSGA-II's population is a fifth of the trials: its usual 50 would be a random search
GENERATION_RANGE = (4, 50)


def make_sampler(name: str, *, seed: int, num_samples: int) -> BaseSampler:
    """The sampler called `name`.

    Args:
        name: tpe, random, gp or nsga2.
        seed: of its draws.
        num_samples: trials of the whole run, which decide NSGA-II's population.

    Raises:
        ValueError: an unknown name.
    """
    low, high = GENERATION_RANGE
    population = min(high, max(low, num_samples // GENERATION_SHARE))
    makers: dict[str, Callable[[], BaseSampler]] = {
        "tpe": lambda: TPESampler(seed=seed, multivariate=True, constant_liar=True),
        "random": lambda: RandomSampler(seed=seed),
        "gp": lambda: GPSampler(seed=seed),
        "nsga2": lambda: NSGAIISampler(seed=seed, population_size=population),
    }
    if name not in makers:
        raise ValueError(f"sampler is {name!r}; allowed: {', '.join(makers)}")
    return makers[name]()
