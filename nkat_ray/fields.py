"""Types, ranges and words for None of a configuration's fields, each stated once, beside the field.

Checks, error messages, the command line, its help and docs/reference.md all use `field_types`.
"""

import dataclasses
import functools
import math
import sys
import types
import typing
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NoReturn, cast, get_args, get_origin

from nkat_ray.errors import UserError

UTF8_ADVICE: Final = "; set PYTHONUTF8=1"
LARGEST: Final = 2**53  # no number is larger: up to here a float holds every whole number


@dataclass(frozen=True, kw_only=True)
class Range:
    """Bounds of a number: `depth: Annotated[int, Range(ge=1, le=48)]`. Every number lies in -LARGEST..LARGEST."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    @property
    def lowest(self) -> float:
        """The smallest number allowed."""
        low = -LARGEST if self.ge is None else self.ge
        return low if self.gt is None else math.nextafter(self.gt, math.inf)

    @property
    def highest(self) -> float:
        """The largest number allowed."""
        high = LARGEST if self.le is None else self.le
        return high if self.lt is None else math.nextafter(self.lt, -math.inf)

    def __str__(self) -> str:
        """Format the bounds: `1..48`, `>= 10`, `> 0 and <= 1`."""
        if self.ge is not None and self.le is not None:
            return f"{self.ge:.16g}..{self.le:.16g}"
        bounds = {">=": self.ge, ">": self.gt, "<=": self.le, "<": self.lt}
        return " and ".join(f"{sign} {bound:.16g}" for sign, bound in bounds.items() if bound is not None)


@dataclass(frozen=True)
class NoneWord:
    """The word that stands for None on the command line: `off` or `auto`."""

    word: str


@dataclass(frozen=True)
class Positional:
    """Mark a field whose value is typed without the field's name."""


@dataclass(frozen=True)
class Place:
    """Mark a text as a path, or a URI."""


@dataclass(frozen=True, kw_only=True)
class FieldType:
    """The parts of a field's type."""

    core: Any  # int, float, bool, str, Path, a Literal, a tuple or a dict
    bounds: Range = Range()  # of a number
    optional: bool = False  # None is allowed
    none_word: str | None = None
    positional: bool = False
    place: bool = False  # a path

    def __str__(self) -> str:
        """Describe the allowed values: `a whole number, 1..48`."""
        args = get_args(self.core)
        names = {int: "a whole number", float: "a number", str: "text", bool: "True or False", Path: "a path"}
        if get_origin(self.core) is Literal:
            text = ", ".join(map(str, args))
        elif get_origin(self.core) is tuple:
            parts = [str(field_type(arg)) for arg in args if arg is not ...]
            text = f"a tuple of {parts[0]}" if ... in args else f"({'; '.join(parts)})"
        else:
            text = names.get(self.core, str(self.core))
            text += " with a path" if self.place and self.core is str else ""
            text += f", {self.bounds}" if self.bounds != Range() else ""
        return text + (f", or {self.none_word or 'None'}" if self.optional else "")


@functools.cache
def field_type(hint: Hashable) -> FieldType:
    """Split a type hint into its parts; a union may only add None."""
    core, *marks = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    members = get_args(core) if isinstance(core, types.UnionType) else (core,)
    return FieldType(
        core=members[0],
        bounds=next((mark for mark in marks if isinstance(mark, Range)), Range()),
        optional=types.NoneType in members,
        none_word=next((mark.word for mark in marks if isinstance(mark, NoneWord)), None),
        positional=any(isinstance(mark, Positional) for mark in marks),
        place=members[0] is Path or any(isinstance(mark, Place) for mark in marks),
    )


@functools.cache
def field_types(config: Any) -> dict[str, FieldType]:
    """Return the types of a configuration's fields, in order of definition."""
    hints = typing.get_type_hints(config, include_extras=True)
    return {field.name: field_type(hints[field.name]) for field in dataclasses.fields(cast(Any, config))}


class Checked:
    """Base of a configuration: it checks the type and range of every field when it is created.

    The error names the value, what is allowed and what to do. Nothing is converted: "3" and True are not numbers. A
    whole number is allowed for a float.
    """

    def __post_init__(self) -> None:
        config: Any = type(self)
        values: dict[str, Any] = vars(self)
        for name, kind, low, high, allows in _checks(config):
            value = values[name]
            if type(value) is kind and low <= value <= high:  # most are numbers: without a call, for speed
                continue
            if not allows(value):
                field = field_types(config)[name]
                fault = place_fault(str(value)) if field.place and isinstance(value, str | Path) else ""
                self.refuse(name, f"{fault}{'; ' if fault else ''}allowed: {field}")

    def refuse(self, name: str, allowed: str, advice: str = "") -> NoReturn:
        """Raise a UserError about a field: its value, what is allowed, what to do."""
        raise UserError(f"{name} is {getattr(self, name)!r}; {allowed}{'; ' + advice if advice else ''}")


_Check = tuple[str, Any, float, float, Callable[[Any], bool]]


@functools.cache
def _checks(config: Hashable) -> tuple[_Check, ...]:
    """Prepare the checks of all fields once, since a search creates thousands of configurations.

    A check consists of the field's name, the type of a number (else None) with its bounds, and the complete test.
    """
    return tuple(
        (
            name,
            field.core if field.core in (int, float) else None,
            field.bounds.lowest,
            field.bounds.highest,
            value_test(field),
        )
        for name, field in field_types(config).items()
    )


def value_test(field: FieldType) -> Callable[[Any], bool]:
    """Return a function that tests whether a field may have a value."""
    args, origin = get_args(field.core), get_origin(field.core)
    if field.optional:
        allows = value_test(dataclasses.replace(field, optional=False))
        return lambda value: value is None or allows(value)
    if origin is Literal:
        kinds = {type(arg) for arg in args}
        return lambda value: type(value) in kinds and value in args
    if origin is tuple:
        tests = [value_test(field_type(arg)) for arg in args if arg is not ...]
        if ... in args:
            return lambda value: isinstance(value, tuple) and all(map(tests[0], value))
        return lambda value: (
            isinstance(value, tuple)
            and len(value) == len(tests)
            and all(test(item) for test, item in zip(tests, value, strict=True))
        )
    if field.core in (int, float):
        abstract: Any = Integral if field.core is int else Real
        low, high = field.bounds.lowest, field.bounds.highest
        return lambda value: isinstance(value, abstract) and not isinstance(value, bool) and bool(low <= value <= high)
    if field.place:
        return lambda value: isinstance(value, field.core) and not place_fault(str(value))
    return lambda value: isinstance(value, origin or field.core)


def place_fault(text: str) -> str:
    """Return why a text cannot be a path (`Path("")` would be the current folder); an empty string if it can."""
    try:
        text.encode()
    except UnicodeEncodeError:  # its bytes were not decoded: Ray and JSON take only UTF-8
        encoding = sys.getfilesystemencoding()
        return f"it is not in {encoding}, Python's encoding of names here{'' if encoding == 'utf-8' else UTF8_ADVICE}"
    if not text.strip():
        return "it is empty"
    return "it contains a NUL byte" if "\0" in text else ""
