"""What a searched parameter may be, and a search space read from a TOML file."""

import difflib
import math
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

MOST_STEPS: Final = 64  # values of a stepped span: every pair of values is tried before a run starts
HOW = "give a list of values, or { low = ..., high = ... }"


@dataclass(frozen=True)
class Choice:
    """One of some values."""

    values: tuple[str | int | float | bool | None, ...]


@dataclass(frozen=True)
class Span:
    """A number between two bounds, both included."""

    low: float
    high: float
    step: int | None = None  # a step makes it a whole number
    log: bool = False


Domain = Choice | Span


def domain_of_json(saved: Mapping[str, Any]) -> Domain:
    """A domain from config.json, which holds its fields.

    Raises:
        ValueError: it holds others.
    """
    try:
        return Choice(tuple(saved["values"])) if "values" in saved else Span(**saved)
    except TypeError as error:
        raise ValueError(f"own_space has {saved!r}; {HOW}") from error


def read_space(path: Path, hints: Mapping[str, Any]) -> dict[str, Domain]:
    """A search space from a file: a line a parameter, a list of values or a table with low and high.

        conv_stem = ["off", "tiny"]
        depth = { low = 4, high = 8 }
        lr = { low = 1e-4, high = 1e-2, log = true }

    Args:
        path: a TOML file.
        hints: what may be searched: parameter -> type.

    Raises:
        ValueError: no such file, no TOML, or a line that is no domain of its parameter; in one line.
    """
    try:
        lines = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"space is {str(path)!r}; the file cannot be read ({error.strerror})") from error
    except ValueError as error:  # of TOML or of UTF-8
        raise ValueError(f"space is {str(path)!r}; it is no TOML file: {error}") from error
    if not lines:
        raise ValueError(f"space is {str(path)!r}; it names no parameter; {HOW}")
    space = {}
    for name, given in lines.items():
        if name not in hints:
            near = difflib.get_close_matches(name, hints, 1)
            advice = f"did you mean {near[0]}?" if near else f"allowed: {', '.join(hints)}"
            raise ValueError(f"space {path}: {name!r} cannot be searched; {advice}")
        try:
            space[name] = _domain(given, hints[name])
        except ValueError as error:
            raise ValueError(f"space {path}: {name} is {given!r}; {error}") from error
    return space


def _domain(given: Any, hint: Any) -> Domain:
    if isinstance(given, list):
        values = tuple(_value(value, hint) for value in given)
        if not values or len(set(map(repr, values))) != len(values):
            raise ValueError("a list needs at least one value, each once")
        return Choice(values)
    if isinstance(given, dict):
        return _span(given, hint)
    raise ValueError(f"{HOW}; a single value is typed as a flag instead")


def _span(given: Mapping[str, Any], hint: Any) -> Span:
    kind = next((kind for kind in _kinds(hint) if kind in (int, float)), None)
    if kind is None or typing.get_origin(hint) is Literal:
        raise ValueError("it has no bounds; give a list of values")
    whole = kind is int
    allowed = {"low", "high", "step"} if whole else {"low", "high", "log"}
    if not {"low", "high"} <= set(given) <= allowed:
        raise ValueError(f"allowed: low and high, and {'step' if whole else 'log'}")
    low, high = (_value(given[key], kind) for key in ("low", "high"))
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError("low must be below high")
    if not whole:
        log = given.get("log", False)
        if not isinstance(log, bool) or (log and low <= 0):
            raise ValueError("log is true or false, and needs low > 0")
        return Span(low, high, log=log)
    step = given.get("step", 1)
    if type(step) is not int or step < 1 or (high - low) % step or (high - low) // step >= MOST_STEPS:
        raise ValueError(f"step must divide high - low, into fewer than {MOST_STEPS} steps")
    return Span(low, high, step=step)


def _value(given: Any, hint: Any) -> Any:
    """A value as the parameter has it; `off` is None where the parameter can be off."""
    if typing.get_origin(hint) is Literal:
        allowed = typing.get_args(hint)
        if not any(given == value and type(given) is type(value) for value in allowed):
            raise ValueError(f"allowed: {', '.join(map(str, allowed))}")
        return given
    kinds = _kinds(hint)
    if given == "off" and types.NoneType in kinds:
        return None
    if float in kinds and type(given) is int:
        return float(given)
    if type(given) not in kinds:
        names = ["off" if kind is types.NoneType else kind.__name__ for kind in kinds]
        raise ValueError(f"{given!r} is not of its type ({' or '.join(names)})")
    return given


def _kinds(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
