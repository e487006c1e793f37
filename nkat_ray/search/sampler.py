"""Optuna's samplers with the settings that this search uses."""

from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler

from nkat_ray.config import Sampler


def make_sampler(name: Sampler, *, seed: int) -> BaseSampler:
    """Create a sampler."""
    if name == "tpe":
        return TPESampler(seed=seed, multivariate=True, constant_liar=True)
    return RandomSampler(seed=seed) if name == "random" else GPSampler(seed=seed)
