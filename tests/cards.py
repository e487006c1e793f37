"""Two graphics cards with one interface, a pretend one and a real one, so that one test runs on both (tests/gpu).

A real card trains networks of the baseline's width, a pretend one small ones.
"""

import gc
import shutil
import subprocess
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pretend_cuda import Counting, OnCuda, pretend_cuda
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from nkat_ray.config import TrialConfig
from nkat_ray.cost import peak_bytes
from nkat_ray.data.dataset import Traits
from nkat_ray.data.selection import Selection
from nkat_ray.train.images import TrainingData
from nkat_ray.train.loop import Trainer
from nkat_ray.train.session import create_trainer, training_data

CPU = torch.device("cpu")
SMALL = TrialConfig(embed_dim=16, depth=2, batch_size=16, epochs=2, warmup=1, lr=2e-3, ema=0.9)
WIDE = TrialConfig(depth=2, batch_size=64, epochs=2, warmup=1, ema=0.9)
STILL = dict(
    dropout_attn=0.0, dropout_embed=0.0
)  # dropout's masks are the device's own: off where numbers are compared


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a card was asked to do: launches, waits of the host for it, and where; its busy time where it is real."""

    launches: int
    waits: Counter[str]
    kernels_us: Counter[str] = field(default_factory=Counter)


class PretendCard:
    """A stand-in (pretend_cuda.py). It has no speed, no memory of its own and no compiler."""

    real = False

    def __init__(self, counting: Counting) -> None:
        self._counting = counting

    def count(self, work: Callable[[], object]) -> Work:
        """Count what some work asks of the card."""
        self._counting.reset()
        work()
        return Work(launches=sum(self._counting.launches.values()), waits=Counter(self._counting.waits))

    @contextmanager
    def short_of_memory(self, trainer: Trainer, *, room: int) -> Iterator[None]:
        """Let passes of more than `room` images run out of memory."""

        def refuse(module: Any, inputs: tuple[torch.Tensor]) -> None:
            if len(inputs[0]) > room:
                raise torch.OutOfMemoryError("CUDA out of memory.")

        handle = trainer.model.register_forward_pre_hook(refuse)
        try:
            yield
        finally:
            handle.remove()

    def most_bytes(self, work: Callable[[], object]) -> int:
        """Do some work; return 1, since nothing is measured."""
        work()
        return 1

    def held_bytes(self) -> int:
        """Return the memory of all tensors on the card."""
        gc.collect()
        return sum(value.inner.nbytes for value in gc.get_objects() if type(value) is OnCuda)

    def compiled(self, model: torch.nn.Module) -> torch.nn.Module:
        """Return the network itself."""
        return model

    def graphed(self, work: Callable[[], None]) -> Callable[[], None]:
        """Return the work itself."""
        return work

    def describe(self) -> str:
        """Say which card it is."""
        return "pretend"


class CudaCard:
    """The first GPU that this process sees."""

    real = True

    def count(self, work: Callable[[], object]) -> Work:
        """Count what some work asks of the card, copies included. The work is done twice: for waits, for kernels."""
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                work()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        places = [f"{Path(w.filename).name}:{w.lineno}" for w in said if "called a synchronizing" in str(w.message)]
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
            work()
            torch.cuda.synchronize()
        kernels = [
            event
            for event in profiled.events() or ()
            if event.device_type == DeviceType.CUDA and not event.is_user_annotation
        ]
        times: Counter[str] = Counter()
        for event in kernels:
            times[event.name] += event.time_range.elapsed_us()
        return Work(launches=len(kernels), waits=Counter(places), kernels_us=times)

    @contextmanager
    def short_of_memory(self, trainer: Trainer, *, room: int) -> Iterator[None]:
        """Leave about the memory that passes of `room` images need by the estimate."""
        _collect()
        config = replace(trainer.config, batch_size=room)
        limit = torch.cuda.memory_reserved() + peak_bytes(config)
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / torch.cuda.mem_get_info()[1]))
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)

    def most_bytes(self, work: Callable[[], object]) -> int:
        """Do some work; return the most memory that PyTorch has reserved meanwhile beyond what it held before."""
        _collect()
        before = torch.cuda.memory_reserved()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_reserved() - before

    def held_bytes(self) -> int:
        """Return the memory of all tensors on the card."""
        _collect()
        return torch.cuda.memory_allocated()

    def compiled(self, model: torch.nn.Module) -> torch.nn.Module:
        """Return the network behind torch.compile."""
        made: torch.nn.Module = torch.compile(model)  # type: ignore[assignment]
        return made

    def graphed(self, work: Callable[[], None]) -> Callable[[], None]:
        """Capture some work, which must leave its tensors where they are, as a CUDA graph; return its replay."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return graph.replay

    def describe(self) -> str:
        """Say which card it is, with its driver if nvidia-smi is there to ask."""
        if shutil.which("nvidia-smi") is None:
            return torch.cuda.get_device_name(0)
        wanted = "name,driver_version,compute_mode,mig.mode.current,memory.total,memory.used"
        asked = ["nvidia-smi", f"--query-gpu={wanted}", "--format=csv,noheader"]
        return subprocess.run(asked, capture_output=True, text=True, check=True, timeout=30).stdout.strip()


Card = PretendCard | CudaCard


@contextmanager
def card(*, real: bool) -> Iterator[Card]:
    """Provide a card; a real one is left as it was found."""
    if real:
        yield CudaCard()
        _collect()
        return
    with pretend_cuda() as counting:
        yield PretendCard(counting)


def context_bytes() -> int:
    """Return the memory that this process's CUDA context takes, if no other process uses the card."""
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def config_for(card: Card, **fields: Any) -> TrialConfig:
    """Return a configuration of a size for the card, with some fields of one's own."""
    return replace(WIDE if card.real else SMALL, **fields)


def data_on(where: torch.device, *, train: int = 24, val: int = 8, channels: int = 3, size: int = 32) -> TrainingData:
    """Return noise on a device, each class a little brighter than the one before."""
    generator = np.random.default_rng(0)
    n = train + val
    labels = generator.integers(0, 10, n)
    images = generator.integers(0, 156, (n, channels, size, size), np.uint8)
    images += (10 * labels).astype(np.uint8)[:, None, None, None]
    traits = Traits(name="noise", num_classes=10, grey=channels == 1, flip=True)
    return training_data(Selection(images, labels, np.arange(train), np.arange(train, n)), traits, where)


def trainer_on(where: torch.device, config: TrialConfig, *, seed: int = 3, **sizes: int) -> Trainer:
    """Return a training on a device; its notices are printed."""
    return create_trainer(config, data_on(where, **sizes), seed=seed, notice=print)


def losses_of(trainer: Trainer, steps: int) -> list[float]:
    """Make the first steps of an epoch; return their losses."""
    trainer.model.train()
    return [float(trainer._step(batch, step)) for step, batch in zip(range(steps), trainer._batches(), strict=False)]


def _collect() -> None:
    gc.collect()
    torch.cuda.empty_cache()
