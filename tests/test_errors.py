"""Errors reduced to what a person reads."""

from typing import Any

import pytest

from nkat_ray.errors import one_line


@pytest.mark.parametrize(
    ("error", "expected"),
    [("a\nb\n", "b"), ("", "str"), (None, "None"), (ValueError(""), "ValueError"), ("x" * 600, "x" * 500)],
)
def test_one_line(error: Any, expected: str) -> None:
    assert one_line(error) == expected
