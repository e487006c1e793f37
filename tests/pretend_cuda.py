"""A pretend CUDA device for machines without one: tensors that say they are on cuda:0 and hold a CPU tensor.

It refuses operations on mixed devices as CUDA does, follows CUDA's autocast rules for the functions that the network
uses, and counts what would be kernel launches and waits for the device. It says nothing about speed, and its numbers
are a CPU's: random numbers differ from CUDA's, and sums are rounded in another order.
"""

import importlib
import types
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import timm.utils.model_ema
import torch
import torch.nn.utils.clip_grad
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from nkat_ray.train.device import has_native_bfloat16

CUDA = torch.device("cuda:0")
MEMORY_BYTES = 16 * 2**30
CARD = types.SimpleNamespace(
    name="pretend", total_memory=MEMORY_BYTES, multi_processor_count=1, major=0, minor=0, L2_cache_size=50 * 2**20
)
OPTIMIZER: Any = importlib.import_module("torch.optim.optimizer")  # torch.optim deletes the name
# Of what the dispatcher sees, these launch nothing: they change how memory is read, or only allocate it.
VIEWS = frozenset(
    "view _unsafe_view transpose t permute expand slice select unsqueeze squeeze detach alias split split_with_sizes "
    "unbind as_strided _reshape_alias unfold mT chunk diagonal lift_fresh _unsafe_split empty empty_like new_empty "
    "empty_strided new_empty_strided is_same_size size stride _version".split()
)
# Results whose size depends on the data: the host has to wait for it.
DATA_DEPENDENT = frozenset(
    "nonzero masked_select unique _unique2 equal bincount unique_consecutive repeat_interleave".split()
)
INDEXING = frozenset("index index_put index_put_ _index_put_impl_ _unsafe_index".split())
COPIES = frozenset("copy_ _to_copy _copy_from".split())
# Computed in float32 and rounded to bfloat16 once, as a GPU does.
ACCUMULATED_IN_FLOAT32 = frozenset("convolution convolution_backward bmm addmm mm baddbmm".split())


class OnCuda(Tensor):
    """A tensor that says it is on cuda:0; `inner` holds its values on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnCuda":
        with torch._C._DisableTorchDispatch():
            shell = torch.empty_strided(inner.size(), inner.stride(), dtype=inner.dtype, device="meta")
            made: OnCuda = Tensor._make_subclass(  # type: ignore[call-arg]
                cls, shell, False, dispatch_device=True, device_for_backend_keys=CUDA
            )
        made.inner = inner
        return made

    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]
    is_meta = property(lambda self: False)  # type: ignore[assignment]

    def tolist(self) -> Any:
        """Values as Python numbers, for which the host waits."""
        _current().wait("tolist")
        return self.inner.tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnCuda({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation that was called outside the mode, such as one of the backward pass."""
        return _current().run(func, args, kwargs or {})


class Counting(TorchDispatchMode):
    """Runs every operation on the tensors inside, and counts launches and waits by name while `on`."""

    def __init__(self) -> None:
        super().__init__()
        self.on = True
        self.sync_debug_mode: int | str = 0
        self.launches: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def wait(self, name: str) -> None:
        """Count a wait of the host for the device; raise where CUDA is told to."""
        if self.sync_debug_mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        if self.on:
            self.waits[name] += 1

    def reset(self) -> None:
        """Forget what was counted."""
        self.launches.clear()
        self.waits.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run one operation of the dispatcher."""
        if func is torch.ops.prim.device.default:
            return torch.device("meta")
        name = func._schema.name.split("::")[1]
        flat, spec = tree_flatten((args, kwargs))
        tensors = [value for value in flat if isinstance(value, Tensor)]
        target = None if kwargs.get("device") is None else torch.device(kwargs["device"]).type
        here = any(isinstance(tensor, OnCuda) for tensor in tensors)
        if not here and target not in ("cuda", "meta"):
            return func(*args, **kwargs)  # on the CPU throughout
        if name == "_to_copy" and here and target != "cpu" and _changes_nothing(tensors[0], kwargs):
            return OnCuda(tensors[0].inner)  # type: ignore[attr-defined]  # `.to` of the own device: CUDA does nothing
        self._refuse_mixed(name, tensors, here)
        self._count(name, args, kwargs, tensors, target)
        inside = [_inside(value) for value in flat]
        inner_args, inner_kwargs = tree_unflatten(inside, spec)
        if inner_kwargs.get("device") is not None:
            inner_kwargs["device"] = torch.device("cpu")
        inner_kwargs.pop("pin_memory", None)
        with torch._C._DisableTorchDispatch():
            out = _in_float32(func, inner_args, inner_kwargs, name in ACCUMULATED_IN_FLOAT32)
        return kwargs["out"] if "out" in kwargs else self._outside(name, args, inner_args, out, target)

    def _refuse_mixed(self, name: str, tensors: list[Tensor], here: bool) -> None:
        for tensor in tensors if here and name not in COPIES else ():
            if isinstance(tensor, OnCuda) or tensor.dim() == 0:  # CUDA takes numbers from the CPU
                continue
            if name not in INDEXING:
                raise RuntimeError(f"Expected all tensors to be on the same device: {name} of {tuple(tensor.shape)}")
            self.wait("index from the CPU")

    def _count(self, name: str, args: Any, kwargs: Any, tensors: list[Tensor], target: str | None) -> None:
        if self.on and name not in VIEWS:
            self.launches[name] += 1
        if name == "_local_scalar_dense":
            self.wait("item")
        elif name == "_to_copy" and isinstance(tensors[0], OnCuda) and target == "cpu":
            self.wait("copy to the CPU")
        elif name == "_to_copy" and not isinstance(tensors[0], OnCuda):
            self.wait("copy from the CPU")
        elif name == "copy_" and not (isinstance(args[0], OnCuda) and isinstance(args[1], OnCuda)):
            self.wait("copy between devices")
        elif name in DATA_DEPENDENT:
            self.wait(name)
        elif name in INDEXING:
            masks = [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
            if masks and not (name != "index" and args[2].numel() == 1):
                self.wait("index by a mask")

    def _outside(self, name: str, args: Any, inner_args: Any, out: Any, target: str | None) -> Any:
        """Wrap results; what is changed in place keeps its wrapper."""
        if name == "_local_scalar_dense" or (name == "_to_copy" and target == "cpu") or name == "is_same_size":
            return out
        if name == "_to_copy" and out is inner_args[0]:
            out = out.clone()
        if name.startswith(("_foreach", "_fused")) and name.endswith("_"):
            return out if out is None else args[0]
        if name.endswith("_") and isinstance(args[0], Tensor):
            return args[0]
        return tree_map(lambda value: OnCuda(value) if isinstance(value, Tensor) else value, out)


def _changes_nothing(tensor: Tensor, kwargs: dict[str, Any]) -> bool:
    return kwargs.get("dtype") in (None, tensor.dtype) and isinstance(tensor, OnCuda)


def _inside(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type in ("cuda", "meta"):
        return torch.device("cpu")
    return value.inner if isinstance(value, OnCuda) else value


def _in_float32(func: Any, args: Any, kwargs: Any, accumulates: bool) -> Any:
    tensors = [value for value in tree_flatten(args)[0] if isinstance(value, Tensor)]
    if not accumulates or tensors[0].dtype != torch.bfloat16 or "out" in kwargs:
        return func(*args, **kwargs)
    args = tree_map(lambda x: x.float() if isinstance(x, Tensor) and x.dtype == torch.bfloat16 else x, args)
    return tree_map(lambda x: x.bfloat16() if isinstance(x, Tensor) else x, func(*args, **kwargs))


class Autocast(TorchFunctionMode):
    """CUDA's autocast rules for the functions that the network calls, with its cache of weights."""

    LOW = (
        torch.nn.functional.linear, torch.conv2d, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm,
        torch.baddbmm, torch._C._nn.linear, torch.nn.functional.scaled_dot_product_attention,
    )  # fmt: skip  # computed in bfloat16
    HIGH = (torch.layer_norm, torch.softmax, Tensor.softmax, torch.cumsum, Tensor.cumsum, torch.log_softmax, Tensor.sum)

    def __init__(self) -> None:
        super().__init__()
        self._weights: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.to:  # PyTorch would ask the driver which card "cuda" is
            args, kwargs = tree_map(
                lambda value: CUDA if isinstance(value, torch.device) and value.type == "cuda" else value,
                (args, kwargs),
            )
        if not torch.is_autocast_enabled("cuda"):
            self._weights.clear()  # the cache lasts as long as the context
        elif func in self.LOW:
            args, kwargs = tree_map(self._low, (args, kwargs))
        elif func in self.HIGH:
            args, kwargs = tree_map(_high, (args, kwargs))
        return func(*args, **kwargs)

    def _low(self, value: Any) -> Any:
        if not isinstance(value, OnCuda) or value.dtype != torch.float32:
            return value
        if not (value.is_leaf and value.requires_grad and torch.is_grad_enabled()):
            return value.to(torch.bfloat16)
        if id(value) not in self._weights:
            self._weights[id(value)] = value.to(torch.bfloat16)
        return self._weights[id(value)]


def _high(value: Any) -> Any:
    return value.float() if isinstance(value, OnCuda) and value.dtype == torch.bfloat16 else value


_MODES: list[Counting] = []


def _current() -> Counting:
    return _MODES[-1] if _MODES else Counting()


@contextmanager
def pretend_cuda() -> Iterator[Counting]:
    """Make cuda:0 usable inside the context; yields what counts launches and waits."""
    tensor, generator, save = torch.tensor, torch.Generator, torch.save

    def tensor_on(data: Any, *, dtype: Any = None, device: Any = None, **options: Any) -> Tensor:
        made = tensor(data, dtype=dtype, **options)
        return made if device is None or torch.device(device).type == "cpu" else made.to(device)

    ema_torch = types.SimpleNamespace(**{name: getattr(torch, name) for name in dir(torch)})
    ema_torch.Generator = lambda device="cpu": generator()
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        for name in ("empty_cache", "synchronize", "set_per_process_memory_fraction"):
            patch.setattr(torch.cuda, name, lambda *_: None)
        patch.setattr(torch.cuda, "mem_get_info", lambda *_: (MEMORY_BYTES, MEMORY_BYTES))
        patch.setattr(torch.cuda, "get_device_properties", lambda *_: CARD)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
        patch.setattr(torch.cuda, "get_rng_state", lambda device="cuda": torch.get_rng_state())
        patch.setattr(torch.cuda, "set_rng_state", lambda state, device="cuda": torch.set_rng_state(state))
        patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        patch.setattr(torch, "tensor", tensor_on)
        patch.setattr(torch, "save", lambda value, *args: save(tree_map(_inside, value), *args))
        patch.setattr(timm.utils.model_ema, "torch", ema_torch)
        patch.setattr(torch.nn.utils.clip_grad, "_has_foreach_support", lambda *_, **__: True)
        patch.setattr(OPTIMIZER, "_foreach_supported_types", [*OPTIMIZER._foreach_supported_types, OnCuda])
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        has_native_bfloat16.cache_clear()
        mode = Counting()
        _MODES.append(mode)
        patch.setattr(torch.cuda, "get_sync_debug_mode", lambda: mode.sync_debug_mode)
        patch.setattr(torch.cuda, "set_sync_debug_mode", lambda value: setattr(mode, "sync_debug_mode", value))
        try:
            with torch.autograd.set_multithreading_enabled(False), mode, Autocast():
                yield mode
        finally:
            _MODES.pop()
            torch.__future__.set_overwrite_module_params_on_conversion(before)
            has_native_bfloat16.cache_clear()
