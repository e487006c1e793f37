"""Search spaces (docs/spec.md section 5): domains of parameters, built-in spaces, files, and the first two trials.

A run prepares its `SearchSpace` once, at the start; the content of a file is stored in the run's config.json.
"""

import itertools
import tomllib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from nkat_ray.config import RunConfig, TrialConfig, field_names
from nkat_ray.errors import UserError, suggestion
from nkat_ray.fields import FieldType, field_types, value_test

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution  # loading Optuna takes longer than refusing a flag

HOW: Final = "give a list of values, or { low = ..., high = ... }"
NOT_SEARCHED: Final = ("epochs", "train_images", "val_images", "randaugment")
COUPLED: Final = (  # parameters that ModelConfig and TrialConfig check together
    ("conv_stem", "stem_stride", "patch_size"),
    ("embed_dim", "num_heads"),
    ("num_heads", "split_heads"),
    ("mixup", "cutmix"),
)
COST_DECIDING: Final = (
    "conv_stem", "stem_stride", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "batch_size",
)  # fmt: skip
MOST_TRIED: Final = 64  # values of a stepped span that are tried one by one


@dataclass(frozen=True)
class Choice:
    """A parameter that takes one of some values."""

    values: tuple[str | int | float | bool | None, ...]


@dataclass(frozen=True)
class Span:
    """A parameter that takes a number between two bounds, both included."""

    low: float
    high: float
    step: int | None = None  # a step makes it a whole number
    log: bool = False


Domain = Choice | Span

_ROUND2: Mapping[str, Domain] = {
    "patch_size": Choice((2, 4)),
    "conv_stem": Choice(("off", "tiny", "small")),
    "embed_dim": Span(384, 512, step=64),
    "depth": Span(5, 9, step=1),
    "temperature": Span(0.6, 1.0),
    "top_p": Span(0.80, 0.95),
}

SPACES: Final[Mapping[str, Mapping[str, Domain]]] = {
    "round2": _ROUND2,
    "extended": {
        **_ROUND2,
        "optimizer": Choice(("adamw", "muon")),
        "lr": Span(1e-4, 6e-3, log=True),
        "weight_decay": Span(1e-2, 1e-1, log=True),
        "label_smoothing": Span(0.0, 0.1),
        "mlp_ratio": Choice((4.0, 1.0, 2.0)),
        "drop_path": Span(0.0, 0.1),
        "top_k": Choice((4, 6, 8, 16, None)),
        "nkat_strength": Span(0.001, 0.005),
        "dropout_attn": Span(0.05, 0.25),
        "dropout_embed": Span(0.0, 0.15),
        "mixup": Span(0.0, 0.5),
        "cutmix": Span(0.0, 0.5),
        "color_norm": Choice(("off", "layernorm", "residual")),
        "split_heads": Choice((False, True)),
        "channel_shuffle": Span(0.0, 0.5),
        "stem_stride": Choice((4, 2)),
    },
    # Networks without a stem that learn CIFAR-10 in an hour of one core; depth and MLP decide their cost.
    "laptop": {
        "depth": Choice((4, 5)),
        "mlp_ratio": Choice((1.0, 2.0)),
        "lr": Span(3e-3, 6e-3, log=True),
    },
    # One design that reaches the target; stochastic depth is what is left to choose.
    "gpu": {"drop_path": Span(0.0, 0.1)},
    # Sizes that a CPU trains in half a minute behind the tiny stem; the learning rate decides most (docs/LOG.md).
    "quick": {
        "embed_dim": Span(64, 96, step=32),
        "depth": Span(2, 3, step=1),
        "temperature": Span(0.6, 1.0),
        "top_p": Span(0.80, 0.95),
        "lr": Span(5e-4, 8e-3, log=True),
    },
}

# Round-1's best (docs/spec.md section 4), the second trial of every run once it is projected onto the space. Its stem
# and patches are Round-2's nearest to what it had.
ROUND1_BEST: Final[Mapping[str, Any]] = {
    "conv_stem": "off",
    "patch_size": 4,
    "temperature": 0.547,
    "top_k": 6,
    "top_p": 0.755,
    "nkat_strength": 0.00239,
    "nkat_decay": 0.9923,
    "lr": 2.35e-4,
    "label_smoothing": 0.0669,
    "dropout_attn": 0.175,
    "dropout_embed": 0.0788,
    "embed_dim": 384,
    "depth": 5,
}


@dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """The search space of one run, prepared once."""

    name: str  # a built-in space, or the file that it was read from
    contents: Mapping[str, Domain]  # all parameters, fixed ones included
    fixed: tuple[str, ...] = ()  # parameters that the user typed: they keep that value

    @property
    def domains(self) -> dict[str, Domain]:
        """Domains of the parameters that are searched."""
        return {name: domain for name, domain in self.contents.items() if name not in self.fixed}

    def to_json(self) -> dict[str, Any]:
        """Return the keys of config.json that `space_of_json` reads; `own_space` is None for a built-in space."""
        own = None if self.name in SPACES else {name: asdict(domain) for name, domain in self.contents.items()}
        return {"fixed": sorted(self.fixed), "own_space": own}


def space_of(run: RunConfig, typed: Collection[str] = ()) -> SearchSpace:
    """Prepare the search space that `run.space` names; this is the only place that reads its file.

    Args:
        typed: flags that the user typed. A parameter of the space among them is fixed.

    Raises:
        UserError: there is no such space, or the file does not contain one.
    """
    if run.space in SPACES:
        contents = SPACES[run.space]
    elif run.space.endswith(".toml"):
        contents = read_space(Path(run.space))
    else:
        allowed = f"allowed: {', '.join(SPACES)}, or a file NAME.toml"
        run.refuse("space", allowed + suggestion(run.space, SPACES))
    return SearchSpace(name=run.space, contents=contents, fixed=tuple(name for name in contents if name in typed))


def space_of_json(saved: Mapping[str, Any]) -> SearchSpace:
    """Read the search space of a run from its config.json, without opening the file that the user gave.

    Raises:
        UserError: config.json does not contain a search space.
    """
    name, own = str(saved.get("space")), saved.get("own_space")
    try:
        contents = SPACES[name] if own is None else {key: _domain_of_json(domain) for key, domain in own.items()}
        return SearchSpace(name=name, contents=contents, fixed=tuple(saved.get("fixed", ())))
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"space is {name!r} and own_space {own!r}; no run has written that; {HOW}") from error


def _domain_of_json(saved: Mapping[str, Any]) -> Domain:
    return Choice(tuple(saved["values"])) if "values" in saved else Span(**saved)


# --- files ------------------------------------------------------------------------------------------------------------


def searchable() -> dict[str, FieldType]:
    """Return the fields of a trial that can be searched.

    Not among them: the epochs, since ASHA and the gate count them; the numbers of images, which are the same in all
    trials; and `randaugment`, which is a pair.
    """
    return {name: kind for name, kind in field_types(TrialConfig).items() if name not in NOT_SEARCHED}


def read_space(path: Path) -> dict[str, Domain]:
    """Read a search space from a TOML file with one line per parameter: a list of values, or bounds.

        conv_stem = ["off", "tiny"]
        depth = { low = 4, high = 8 }
        lr = { low = 1e-4, high = 1e-2, log = true }

    Raises:
        UserError: the file cannot be read or is not TOML, or a line is not allowed for its parameter.
    """
    try:
        lines = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"space is {str(path)!r}; the file cannot be read ({error.strerror})") from error
    except ValueError as error:  # of TOML, of UTF-8, or of the path
        raise UserError(f"space is {str(path)!r}; it is no TOML file: {error}") from error
    if not lines:
        raise UserError(f"space is {str(path)!r}; it names no parameter; {HOW}")
    kinds, space = searchable(), {}
    for name, given in lines.items():
        if name not in kinds:
            near = suggestion(name, kinds)
            raise UserError(f"space {path}: {name!r} cannot be searched{near or '; allowed: ' + ', '.join(kinds)}")
        try:
            space[name] = _domain(given, kinds[name])
        except UserError as error:
            raise UserError(f"space {path}: {name} is {given!r}; {error}") from error
    return space


def _domain(given: Any, kind: FieldType) -> Domain:
    if isinstance(given, list):
        values = tuple(_value(value, kind) for value in given)
        if not values or len(set(map(repr, values))) != len(values):
            raise UserError("a list needs at least one value, each once")
        return Choice(values)
    if isinstance(given, dict):
        return _span(given, kind)
    raise UserError(f"{HOW}; type a single value as a flag instead")


def _span(given: Mapping[str, Any], kind: FieldType) -> Span:
    if kind.core not in (int, float):
        raise UserError("it has no bounds; give a list of values")
    whole = kind.core is int
    if not {"low", "high"} <= set(given) <= ({"low", "high", "step"} if whole else {"low", "high", "log"}):
        raise UserError(f"allowed: low and high, and {'step' if whole else 'log'}")
    if any(isinstance(given[key], str) for key in ("low", "high")):
        raise UserError("low and high are numbers")
    low, high = _value(given["low"], kind), _value(given["high"], kind)
    if not low < high:
        raise UserError("low must be below high")
    if not whole:
        log = given.get("log", False)
        if not isinstance(log, bool) or (log and low <= 0):
            raise UserError("log is true or false, and needs low > 0")
        return Span(low, high, log=log)
    step = given.get("step", 1)
    if type(step) is not int or step < 1 or (high - low) % step:
        raise UserError("step must divide high - low")
    return Span(low, high, step=step)


def _value(given: Any, kind: FieldType) -> Any:
    """Convert a value of the file to the parameter's type; `off` becomes None for a parameter that can be off."""
    if given == kind.none_word and kind.optional:
        return None
    if not value_test(kind)(given):
        raise UserError(f"{given!r} is not allowed; allowed: {kind}")
    return float(given) if kind.core is float else given


# --- domains ----------------------------------------------------------------------------------------------------------


def distribution(domain: Domain) -> "BaseDistribution":
    """Convert a domain to Optuna's distribution."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(domain, Choice):
        return CategoricalDistribution(domain.values)
    if domain.step is not None:
        return IntDistribution(int(domain.low), int(domain.high), step=domain.step)
    return FloatDistribution(domain.low, domain.high, log=domain.log)


def describe_domain(domain: Domain) -> str:
    """Describe a domain in one line: `off, 1, 2`, or `4 to 8, step 1`."""
    if isinstance(domain, Choice):
        return ", ".join("off" if value is None else str(value) for value in domain.values)
    step = f", step {domain.step}" if domain.step else ""
    return f"{domain.low:g} to {domain.high:g}{step}{', log' if domain.log else ''}"


def contains(domain: Domain, value: Any) -> bool:
    """Return whether a domain contains a value."""
    if isinstance(domain, Choice):
        return any(value is v or (value == v and type(value) is type(v)) for v in domain.values)
    on_step = domain.step is None or (value - domain.low) % domain.step == 0
    return bool(domain.low <= value <= domain.high and on_step)


def clip(domain: Domain, value: Any) -> Any:
    """Return the value of a span that is nearest to `value` (the lowest for None); for a choice, `value` itself."""
    if isinstance(domain, Choice):
        return value
    value = domain.low if value is None else value
    clipped = min(max(value, domain.low), domain.high)
    if domain.step is None:
        return clipped
    return int(domain.low + round((clipped - domain.low) / domain.step) * domain.step)


def _ends(domain: Domain) -> tuple[Any, ...]:
    """Return the smallest and the largest value; for a choice without an order, every value."""
    if isinstance(domain, Span):
        return (domain.low, domain.high)
    ordered = all(type(value) in (int, float) for value in domain.values)
    return (min(domain.values), max(domain.values)) if ordered else domain.values  # type: ignore[type-var]


def _decisive(domain: Domain) -> tuple[Any, ...]:
    """Return the values that suffice to find out whether any value of a domain conflicts with another parameter.

    These are all values of a choice, both ends of a span, and every step of a span with steps. Of more than MOST_TRIED
    steps the first two and the last suffice, since a divisor of the first two divides all.
    """
    if isinstance(domain, Choice):
        return domain.values
    if domain.step is None:
        return (domain.low, domain.high)
    steps = range(int(domain.low), int(domain.high) + 1, domain.step)
    return tuple(steps) if len(steps) <= MOST_TRIED else (steps[0], steps[1], steps[-1])


# --- trials -----------------------------------------------------------------------------------------------------------


def trial_config(run: RunConfig, params: Mapping[str, Any]) -> TrialConfig:
    """Return the configuration of a trial: the run's fields with the proposed values.

    Raises:
        UserError: the combination is not possible.
    """
    fields = {name: getattr(run, name) for name in field_names(TrialConfig)}
    return TrialConfig(**{**fields, **{name: value for name, value in params.items() if name in fields}})


def baseline_point(run: RunConfig, space: Mapping[str, Domain]) -> dict[str, Any]:
    """Return the first trial: the run's values, moved into the space (a choice without that value: its first one)."""
    point = {name: clip(domain, getattr(run, name)) for name, domain in space.items()}
    for name, domain in space.items():
        if isinstance(domain, Choice) and not contains(domain, point[name]):
            point[name] = domain.values[0]
    return point


def round1_point(run: RunConfig, space: Mapping[str, Domain]) -> tuple[dict[str, Any], list[str]]:
    """Return the second trial, Round-1's best projected onto the space, and one note per change.

    In the space `quick` it has the preset's sizes, so that both trials cost the same.
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


def corner_configs(run: RunConfig, space: Mapping[str, Domain]) -> list[TrialConfig]:
    """Return one trial per combination of the extremes of all parameters that determine memory and time."""
    return list(_combinations(run, space, {name: _ends(space[name]) for name in COST_DECIDING if name in space}))


def design_configs(run: RunConfig, space: Mapping[str, Domain]) -> list[TrialConfig]:
    """Return trials with every stem and width, each at the extremes of the other parameters that determine the size."""
    values = {name: _ends(space[name]) for name in COST_DECIDING if name in space}
    values |= {name: _decisive(space[name]) for name in ("conv_stem", "embed_dim") if name in space}
    return list(_combinations(run, space, values))


def refuse_impossible(run: RunConfig, space: Mapping[str, Domain]) -> None:
    """Refuse a search that could propose a trial which the model does not allow, before any work starts.

    Raises:
        UserError: a value conflicts with another one that can be proposed, or that the user fixed.
    """
    alone = [(name,) for name in space if not any(name in group for group in COUPLED)]
    for group in (*COUPLED, *alone):
        for _ in _combinations(run, space, {name: _decisive(space[name]) for name in group if name in space}):
            pass


def _combinations(
    run: RunConfig, space: Mapping[str, Domain], values: Mapping[str, tuple[Any, ...]]
) -> Iterator[TrialConfig]:
    """Yield a trial per combination of the given values; the other parameters are those of the baseline."""
    base = baseline_point(run, space)
    for combination in itertools.product(*values.values()):
        yield trial_config(run, {**base, **dict(zip(values, combination, strict=True))})
