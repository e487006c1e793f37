"""`nkat evaluate`: what it refuses. What it does is Stage 2's, which the tests of whole runs go through."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def refused(nkat_script: Callable[..., Any]) -> Callable[..., str]:
    """Runs `nkat evaluate`, which must end with exit code 2 and one line; returns the line."""

    def run(*words: object) -> str:
        code, _, error = nkat_script("evaluate", *words)
        assert code == 2
        assert error.startswith("error: ")
        assert error.strip().count("\n") == 0
        return str(error)

    return run


def test_a_target_that_is_not_there(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "neither a run's folder nor a model" in refused(tmp_path / "never-was", "--data", "synthetic")


def test_a_folder_with_neither_run_nor_model(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "neither a run's folder nor a model" in refused(tmp_path, "--data", "synthetic")
    assert not list(tmp_path.iterdir())


def test_weights_that_are_none(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").write_bytes(b"not a model")
    assert "weights.safetensors cannot be read" in refused(tmp_path, "--data", "synthetic")
    assert [path.name for path in tmp_path.iterdir()] == ["weights.safetensors"]


def test_a_folder_that_belongs_to_a_flag_is_no_target(refused: Callable[..., str], tmp_path: Path) -> None:
    model, data = tmp_path / "model", tmp_path / "data"
    model.mkdir()
    data.mkdir()
    (model / "weights.safetensors").write_bytes(b"not a model")
    assert f"target is {str(model)!r}" in refused("--data_dir", data, model)


@pytest.mark.parametrize(("flag", "value", "said"), [("--transfer", "guess", "guess"), ("--transfer_epochs", 0, "0")])
def test_flags_out_of_range(refused: Callable[..., str], tmp_path: Path, flag: str, value: object, said: str) -> None:
    (tmp_path / "weights.safetensors").touch()
    assert said in refused(tmp_path, flag, value)
