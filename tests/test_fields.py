"""What a field may be: ranges, types, and the words for people."""

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytest

from nkat_ray.fields import LARGEST, NoneWord, Positional, Range, field_type, value_test

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("bounds", "text", "lowest", "highest"),
    [
        (Range(ge=1, le=48), "1..48", 1, 48),
        (Range(ge=0, le=2**32 - 1), "0..4294967295", 0, 2**32 - 1),
        (Range(ge=10), ">= 10", 10, LARGEST),
        (Range(gt=0, le=1), "> 0 and <= 1", 5e-324, 1),
        (Range(gt=0, lt=1), "> 0 and < 1", 5e-324, math.nextafter(1, 0)),
        (Range(), "", -LARGEST, LARGEST),
    ],
)
def test_a_range_says_its_bounds(bounds: Range, text: str, lowest: float, highest: float) -> None:
    assert (str(bounds), bounds.lowest, bounds.highest) == (text, lowest, highest)


@pytest.mark.parametrize(
    ("hint", "allowed", "refused"),
    [
        (int, [0, -5, np.int64(4), LARGEST], ["3", True, 2.0, None, LARGEST + 1, 10**400]),
        (float, [0, 0.5, np.float64(2)], ["0.5", True, None, NAN, INF, 1j]),
        (Annotated[float, Range(gt=0, lt=1)], [1e-300, 0.5, math.nextafter(1, 0)], [0, 0.0, 1, 1.0, -0.1, NAN]),
        (Annotated[int | None, Range(ge=1)], [1, None], [0, NAN, "off"]),
        (bool, [True, False], [0, 1, "yes", None]),
        (str, ["", "a"], [5, None, b"a"]),
        (Literal["off", "tiny"], ["off"], ["", None, [], "OFF"]),
        (Literal[2, 4], [2], [2.0, "2", True, 3]),
        (tuple[str, ...], [(), ("a",)], [["a"], "a", (1,)]),
        (tuple[int, Annotated[int, Range(le=9)]] | None, [(2, 9), None], [(2, 10), (2,), [2, 9], (2.0, 9)]),
        (Path | None, [Path("x"), None], ["x"]),
        (dict[str, float], [{}, {"a": 1}], [[], None]),
    ],
)
def test_a_value_is_of_its_type_and_in_its_range(hint: Any, allowed: list[Any], refused: list[Any]) -> None:
    allows = value_test(field_type(hint))
    assert [value for value in allowed if not allows(value)] == []
    assert [value for value in refused if allows(value)] == []


@pytest.mark.parametrize(
    ("hint", "text"),
    [
        (int, "a whole number"),
        (Annotated[float, Range(ge=0, le=1)], "a number, 0..1"),
        (Annotated[int | None, NoneWord("auto"), Range(ge=1)], "a whole number, >= 1, or auto"),
        (str | None, "text, or None"),
        (Annotated[Path, Positional()], "a path"),
        (Literal["a", 2], "a, 2"),
        (tuple[str, ...], "a tuple of text"),
        (tuple[int, Annotated[int, Range(le=9)]], "(a whole number; a whole number, <= 9)"),
    ],
)
def test_a_type_is_described_for_people(hint: Any, text: str) -> None:
    assert str(field_type(hint)) == text
