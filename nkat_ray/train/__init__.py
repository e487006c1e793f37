"""Training in plain PyTorch, without Ray: augmentation, optimizer, loop and checkpoints.

`nkat_ray.train(...)` is also a function of the Python interface: see `nkat_ray.api.train`.
"""

import importlib
import sys
import types
from typing import Any


class _CallableModule(types.ModuleType):
    """A package that can be called, since the Python interface has a function of the same name."""

    def __call__(self, **settings: Any) -> dict[str, Any]:
        """Train one configuration on one dataset, as `nkat train` does; see `nkat_ray.api.train`."""
        result: dict[str, Any] = importlib.import_module("nkat_ray.api").train(**settings)
        return result

    def __reduce__(self) -> tuple[Any, ...]:  # pickle knows plain modules only
        return importlib.import_module, (self.__name__,)


sys.modules[__name__].__class__ = _CallableModule
