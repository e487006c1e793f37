"""Where to compute, within a share of the machine."""

import torch


def device_for(gpus: float, cpus: int) -> torch.device:
    """Set this process up for its share of the machine and say where to compute.

    Ray's GPU fraction is admission control only: the memory limit is set here. Ray may also count GPUs that are not
    there.
    """
    torch.set_num_threads(max(1, cpus))
    if gpus > 0 and torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(min(1.0, gpus))
        return torch.device("cuda")
    return torch.device("cpu")
