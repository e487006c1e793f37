"""NKAT-Ray: two-stage tuning of a small vision transformer on Ray.

    import nkat_ray as nkat

    run = nkat.tune(preset="quick", num_samples=6)

Importing the package loads neither torch nor Ray, so that a command line can refuse bad input at once: the Python
interface (api.py) is loaded when one of its names is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nkat_ray.api import Best, Run, Runs, UserError, compare, runs, train, tune

__version__ = "0.2.0"
__all__ = ["Best", "Run", "Runs", "UserError", "compare", "runs", "train", "tune"]


def __getattr__(name: str) -> Any:
    """Load a public name; `train` is also the package of the training loop, which can be called (train/__init__.py)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "train":
        return importlib.import_module("nkat_ray.train")
    return getattr(importlib.import_module("nkat_ray.api"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
