"""A share of a machine, set up; GPUs that cannot be used."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from nkat_ray.cost import GPU_CONTEXT_BYTES
from nkat_ray.errors import UserError
from nkat_ray.train import device as module
from nkat_ray.train.device import (
    DeviceError,
    device_for,
    float32_notice,
    gpu_fault,
    has_native_bfloat16,
    own_device,
)

TOTAL = 16 * 2**30
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The limits on a GPU's memory that were set, where there is a GPU of 16 GiB that works."""
    made: list[float] = []
    monkeypatch.setattr(module, "gpu_fault", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (TOTAL, TOTAL))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", made.append)
    return made


def failing(monkeypatch: pytest.MonkeyPatch, message: str) -> None:
    """A build with CUDA whose first use of the GPU fails."""

    def ones(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError(message)

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch, "ones", ones)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (5, 2))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_90"])


@pytest.mark.parametrize(("cpus", "expected"), [(2, 2), (1, 1), (0, 1)])
def test_without_a_share_of_a_gpu_the_device_is_the_cpu(limits: list[float], cpus: int, expected: int) -> None:
    assert device_for(0.0, cpus) == torch.device("cpu")
    assert torch.get_num_threads() == expected
    assert limits == []


@pytest.mark.parametrize("gpus", [0.125, 0.25, 0.5])
def test_a_share_of_a_gpu_limits_its_memory_and_leaves_room_for_the_contexts(limits: list[float], gpus: float) -> None:
    assert device_for(gpus, 1) == CUDA
    assert limits == [gpus - GPU_CONTEXT_BYTES / TOTAL]


def test_a_share_smaller_than_a_context_still_has_memory(limits: list[float]) -> None:
    device_for(0.01, 1)
    assert limits == [0.005]


@pytest.mark.parametrize("gpus", [1.0, 2.0])
def test_a_whole_gpu_has_no_limit(limits: list[float], gpus: float) -> None:
    assert device_for(gpus, 1) == CUDA
    assert limits == []


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (
            "The NVIDIA driver on your system is too old (found version 12040). Please update your GPU driver.\nmore",
            "cannot use it: The NVIDIA driver on your system is too old (found version 12040)",
        ),
        (
            "CUDA error: no kernel image is available for execution on the device\nmore",
            "the GPU is sm_52, PyTorch is built for sm_75, sm_90",
        ),
        ("CUDA error: CUDA-capable device(s) is/are busy or unavailable", "another process uses it;"),
        ("CUDA error: out of memory", "its memory is full, or it is reserved: another process uses it;"),
    ],
)
def test_a_gpu_that_ray_counts_and_torch_cannot_use_is_an_error_and_no_training_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, message: str, said: str
) -> None:
    failing(monkeypatch, message)
    with pytest.raises(DeviceError) as raised:
        device_for(0.125, 1)
    assert said in str(raised.value)
    assert "--gpus_per_trial 0" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert issubclass(DeviceError, UserError)


def test_memory_is_handed_out_in_segments_that_can_grow(limits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    device_for(0.5, 1)
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64")
    device_for(0.5, 1)
    assert os.environ["PYTORCH_ALLOC_CONF"] == "max_split_size_mb:64"  # the user's own


def test_a_build_without_cuda_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    version = torch.__version__.partition("+")[0]
    command = f"`uv pip install --torch-backend=auto --reinstall torch=={version} torchvision=="
    assert str(gpu_fault()).startswith(f"PyTorch {torch.__version__} is built without CUDA; {command}")
    assert "`uv run --no-sync`" in str(gpu_fault())


@pytest.mark.parametrize(
    ("shown", "hidden", "found"), [("GPU 0: one", None, True), ("GPU 0", "", False), ("", None, False)]
)
def test_without_ray_a_card_that_a_cpu_build_cannot_see_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shown: str, hidden: str | None, found: bool
) -> None:
    """PyPI's PyTorch for Windows is a CPU build: it sees no GPU at all."""
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\necho '{shown}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    with pytest.raises(DeviceError, match="built without CUDA") if found else contextlib.nullcontext():
        assert own_device() == torch.device("cpu")


@pytest.mark.parametrize(("count", "expected"), [(0, "cpu"), (1, "cuda")])
def test_without_ray_the_machines_gpu_is_used(
    monkeypatch: pytest.MonkeyPatch, limits: list[float], count: int, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert own_device() == torch.device(expected)


def test_without_ray_a_gpu_that_torch_cannot_use_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, "too old")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(DeviceError, match=r"this machine has a GPU, .* too old; .* CUDA_VISIBLE_DEVICES="):
        own_device()


@pytest.fixture
def computes_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool], None]]:
    """Make a GPU that has bfloat16 natively, or emulates it as those before Ampere do."""

    def make(native: bool) -> None:
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native
        )
        monkeypatch.setattr(module, "_noticed", set())
        has_native_bfloat16.cache_clear()

    yield make
    has_native_bfloat16.cache_clear()


@pytest.mark.parametrize("native", [True, False])
def test_bfloat16_is_used_where_a_gpu_computes_in_it(
    computes_in_bfloat16: Callable[[bool], None], native: bool
) -> None:
    computes_in_bfloat16(native)
    assert has_native_bfloat16(CUDA) is native
    if not native:
        assert not module.autocast(CUDA)._enabled
    assert (float32_notice(CUDA) is None) is native
    assert float32_notice(CUDA) is None  # said once
    assert float32_notice(torch.device("cpu")) is None
    assert not module.autocast(torch.device("cpu"))._enabled


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx2": True, "avx512_f": True}, False),
        ({"avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"avx512_bf16": True}, True),
        ({"neon": True, "bf16": True}, True),
        ({"neon": True, "bf16": False}, False),
    ],
)
def test_a_cpu_says_itself_whether_it_computes_in_bfloat16(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], expected: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert has_native_bfloat16.__wrapped__(torch.device("cpu")) is expected
