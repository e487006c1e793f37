"""Each test here runs on a pretend GPU in the plain suite, and on a real one with `-m gpu` (docs/gpu.md).

This file is enough by itself (`--confcutdir tests/gpu`): what tests/conftest.py needs may be missing beside a GPU.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from cards import Card

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]


@pytest.fixture(params=["pretend", pytest.param("cuda", marks=pytest.mark.gpu)])
def card(request: pytest.FixtureRequest) -> "Iterator[Card]":
    """A pretend GPU, or the real one."""
    import cards
    import torch

    real = request.param == "cuda"
    if real and not torch.cuda.is_available():
        pytest.skip("PyTorch finds no CUDA device")
    with cards.card(real=real) as made:
        yield made


@pytest.fixture
def measured(record_property: Callable[[str, object], None]) -> Callable[[str, object], None]:
    """Prints a figure and keeps it in the file of `--junitxml`."""

    def keep(name: str, value: object) -> None:
        record_property(name, value)
        print(f"{name}: {value}")

    return keep
