"""The search space as Optuna distributions, and the two trials that every run begins with (docs/spec.md section 4,
5)."""

import itertools
from collections.abc import Collection, Mapping
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from nkat_ray.config import ROUND1_BEST, Choice, Domain, RunConfig, Span, TrialConfig, field_names


def domains(run: RunConfig, fixed: Collection[str] = ()) -> dict[str, Domain]:
    """The parameters that are searched: the space without those that the user typed."""
    return {name: domain for name, domain in run.domains.items() if name not in fixed}


def distribution(domain: Domain) -> BaseDistribution:
    """The domain as Optuna draws from it."""
    if isinstance(domain, Choice):
        return CategoricalDistribution(domain.values)
    if domain.step is not None:
        return IntDistribution(int(domain.low), int(domain.high), step=domain.step)
    return FloatDistribution(domain.low, domain.high, log=domain.log)


def contains(domain: Domain, value: Any) -> bool:
    """Whether the domain can draw the value."""
    if isinstance(domain, Choice):
        return any(value is v or (value == v and type(value) is type(v)) for v in domain.values)
    on_step = domain.step is None or (value - domain.low) % domain.step == 0
    return bool(domain.low <= value <= domain.high and on_step)


def clip(domain: Domain, value: Any) -> Any:
    """The nearest value that a span can draw (its lowest for `off`); a choice has no nearest, so the value itself."""
    if isinstance(domain, Choice):
        return value
    value = domain.low if value is None else value
    clipped = min(max(value, domain.low), domain.high)
    if domain.step is None:
        return clipped
    return int(domain.low + round((clipped - domain.low) / domain.step) * domain.step)


def baseline_point(run: RunConfig, space: Mapping[str, Domain]) -> dict[str, Any]:
    """The notes' baseline (the run's own trial fields) within the space; a choice without its value gives its first."""
    point = {name: clip(domain, getattr(run, name)) for name, domain in space.items()}
    for name, domain in space.items():
        if isinstance(domain, Choice) and not contains(domain, point[name]):
            point[name] = domain.values[0]
    return point


def round1_point(run: RunConfig, space: Mapping[str, Domain]) -> tuple[dict[str, Any], list[str]]:
    """Round-1's best projected onto the space, and the lines that say where it had to bend.

    In a space of its own sizes (`quick`) the sizes are the preset's, so that both enqueued trials cost the same.
    """
    baseline = baseline_point(run, space)
    sizes = ("embed_dim", "depth") if run.space == "quick" else ()
    point, notes = dict(baseline), []
    for name, domain in space.items():
        if name not in ROUND1_BEST or name in sizes:
            continue
        value = clip(domain, ROUND1_BEST[name])
        point[name] = value if contains(domain, value) else baseline[name]
        if point[name] != ROUND1_BEST[name]:
            notes.append(f"{name} {ROUND1_BEST[name]} -> {point[name]}")
    unused = [name for name in ROUND1_BEST if name not in space and ROUND1_BEST[name] != getattr(run, name)]
    if unused:
        notes.append(f"not searched, so the baseline's: {', '.join(unused)}")
    return point, notes


def trial_config(run: RunConfig, params: Mapping[str, Any]) -> TrialConfig:
    """The full configuration of a trial: the baseline with the proposed values.

    Raises:
        ValueError: an impossible combination.
    """
    fields = {name: getattr(run, name) for name in field_names(TrialConfig)}
    return TrialConfig(**{**fields, **{name: value for name, value in params.items() if name in fields}})


def corner_configs(run: RunConfig, fixed: Collection[str]) -> list[TrialConfig]:
    """The configurations at the corners of what decides cost: stem, patches, width and depth."""
    space = domains(run, fixed)
    base = baseline_point(run, space)
    names = [name for name in ("conv_stem", "stem_stride", "patch_size", "embed_dim", "depth") if name in space]
    corners = itertools.product(*(_extremes(space[name]) for name in names))
    return [trial_config(run, {**base, **dict(zip(names, corner, strict=True))}) for corner in corners]


def refuse_impossible(run: RunConfig, fixed: Collection[str]) -> None:
    """Build every pair of the space's values with the rest of the baseline, so that an impossible one is refused
    before any work starts.

    Raises:
        ValueError: a value that the user fixed cannot go with one that the space may draw.
    """
    space = domains(run, fixed)
    base = baseline_point(run, space)
    for name, domain in space.items():
        for value in _extremes(domain):
            for other, partner in space.items():
                for partner_value in _extremes(partner):
                    trial_config(run, {**base, name: value, other: partner_value})


def _extremes(domain: Domain) -> tuple[Any, ...]:
    if isinstance(domain, Choice):
        return domain.values
    if isinstance(domain, Span) and domain.step is not None:
        return tuple(range(int(domain.low), int(domain.high) + 1, domain.step))
    return (domain.low, domain.high)
