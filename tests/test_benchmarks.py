"""Check that the benchmarks still fit the package: every name that they import from it exists."""

import ast
import importlib
import importlib.util
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


def exists(module: str, name: str) -> bool:
    """Return whether a module has a name, or a submodule of that name."""
    return hasattr(importlib.import_module(module), name) or importlib.util.find_spec(f"{module}.{name}") is not None


@pytest.mark.parametrize("script", sorted(FOLDER.rglob("*.py")), ids=lambda path: path.name)
def test_the_names_that_a_benchmark_imports_exist(script: Path) -> None:
    imports = [node for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.ImportFrom)]
    names = [(node.module or "", alias.name) for node in imports for alias in node.names]
    assert [name for name in names if name[0].startswith("nkat_ray") and not exists(*name)] == []
