"""Choose the device of a training, within a share of the machine, and check that PyTorch can use it."""

import os
import platform
import subprocess
from functools import cache

import torch

from nkat_ray.cost import GPU_CONTEXT_BYTES
from nkat_ray.errors import UserError, cuda_build_advice

NATIVE_BFLOAT16 = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")  # of x86 and ARM, in torch.cpu.get_capabilities()

# PyTorch raises these as a plain RuntimeError where the driver, cuBLAS or cuDNN lacks memory. Creating a cuBLAS handle
# on a full GPU fails as "not initialized".
OUT_OF_MEMORY = (
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate",
    "CUDNN_STATUS_ALLOC_FAILED",
)


ALLOCATOR = "expandable_segments:True"  # less memory is lost between blocks of different sizes
NO_KERNEL = "no kernel image is available"  # CUDA's error for an architecture that PyTorch is not built for
BUSY_ERROR = "busy or unavailable"  # CUDA's error for a card that another process uses exclusively
BUSY = "its memory is full, or it is reserved: another process uses it"


class DeviceError(UserError):
    """A GPU that was assigned and that PyTorch cannot use."""


def device_for(gpus: float, cpus: int) -> torch.device:
    """Limit this process to its share of the machine, and return the device to compute on.

    Ray uses a share of a GPU only to decide which trials start; this function limits the GPU memory of the process.

    Args:
        gpus: share of a GPU that was assigned; 0 for the CPU.
        cpus: cores that were assigned; at least one thread is used.

    Raises:
        DeviceError: a GPU was assigned and PyTorch cannot use it.
    """
    torch.set_num_threads(max(1, cpus))
    if gpus == 0:
        return torch.device("cpu")
    os.environ.setdefault("PYTORCH_ALLOC_CONF", ALLOCATOR)
    fault = gpu_fault()
    if fault is not None:
        raise DeviceError(f"Ray assigned a GPU, but {fault}; to train on the CPU give --gpus_per_trial 0")
    if gpus < 1:
        context = GPU_CONTEXT_BYTES / torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(max(gpus - context, gpus / 2))  # the contexts need room as well
    return torch.device("cuda")


def own_device() -> torch.device:
    """Return the machine's GPU if it has one, else the CPU; for a training without Ray.

    Raises:
        DeviceError: there is a GPU and PyTorch cannot use it.
    """
    if torch.cuda.device_count() == 0 and not _has_hidden_card():
        return torch.device("cpu")
    fault = gpu_fault()
    if fault is not None:
        raise DeviceError(f"this machine has a GPU, but {fault}; to train on the CPU set CUDA_VISIBLE_DEVICES= (empty)")
    return torch.device("cuda")


def _is_cpu_build() -> bool:
    return torch.version.cuda is None and torch.version.hip is None


def _has_hidden_card() -> bool:
    """Return whether there is an NVIDIA card that a CPU build of PyTorch cannot see; False if the user hides it."""
    if not _is_cpu_build() or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return False
    try:
        return subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=30).stdout.startswith(b"GPU")
    except (OSError, subprocess.SubprocessError):
        return False


def gpu_fault(index: int = 0) -> str | None:
    """Multiply matrices on a GPU; return why PyTorch cannot, `BUSY` if only other work prevents it, None if it can."""
    if platform.system() == "Darwin":
        return "Apple GPUs are not used"
    if _is_cpu_build():
        return f"PyTorch {torch.__version__} is built without CUDA; {cuda_build_advice()}"
    try:
        ones = torch.ones(8, 8, device=f"cuda:{index}")
        right = (ones @ ones).sum().item() == 8**3
    except RuntimeError as error:
        if is_out_of_memory(error) or BUSY_ERROR in str(error):
            return BUSY
        return f"PyTorch {torch.__version__} cannot use it: {_first_sentence(error)}{_architectures(error, index)}"
    return None if right else "a product of two small matrices came out wrong"


def _first_sentence(error: RuntimeError) -> str:
    return str(error).splitlines()[0].split(". ")[0].strip().rstrip(".")


def _architectures(error: RuntimeError, index: int) -> str:
    """Name a GPU's architecture and those that PyTorch is built for, if that is the problem; else return nothing."""
    if NO_KERNEL not in str(error):
        return ""
    major, minor = torch.cuda.get_device_capability(index)
    return f" (the GPU is sm_{major}{minor}, PyTorch is built for {', '.join(torch.cuda.get_arch_list())})"


def autocast(device: torch.device) -> torch.autocast:
    """Return the context of a forward pass: bfloat16 on a GPU with native support, else float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda" and has_native_bfloat16(device))


def float32_notice(device: torch.device) -> str | None:
    """Return a notice if a GPU must compute in float32; else None, and after the first call of a process."""
    if device.type != "cuda" or has_native_bfloat16(device) or device in _noticed:
        return None
    _noticed.add(device)
    return "this GPU does not compute in bfloat16 itself: it trains in float32, more slowly than newer ones"


_noticed: set[torch.device] = set()  # workers are used again: one line per process is enough


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether an error of PyTorch, the driver, cuBLAS or cuDNN means that a GPU had too little memory."""
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in OUT_OF_MEMORY)


@cache
def has_native_bfloat16(device: torch.device) -> bool:
    """Return whether a device supports bfloat16 natively; most CPUs, and GPUs before Ampere, emulate it slowly."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in NATIVE_BFLOAT16)
