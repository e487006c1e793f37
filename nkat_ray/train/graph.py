"""Replay a whole training step as one CUDA graph: a small network's step waits for the host, not for the GPU.

A step of the notes' baseline launches about 1,100 kernels. Launching them one by one takes several times as long as
computing them (benchmarks/RESULTS.md, "On an H100"); a graph launches all of them at once.
"""

import gc
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from nkat_ray.errors import first_line
from nkat_ray.train.device import is_out_of_memory

EAGER_STEPS = 3  # before a graph is captured: they create the optimizer's state and load the kernels
PROVED_STEPS = 2  # eager steps that the graph replays to be compared with them
LOSS_TOLERANCE = 1e-2  # relative difference of the loss
CHANGE_TOLERANCE = 0.05  # difference of a change, relative to its norm: sums differ in their order, no more
LITTLE_MEMORY = "too little memory"

Update = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # inputs, targets -> loss, number of correct predictions
State = Mapping[str, Sequence[Tensor]]  # by kind: weights, buffers, the optimizer's averages and learning rates


@dataclass(frozen=True)
class _Witness:
    """An eager step, with which a replay is compared."""

    inputs: Tensor
    targets: Tensor
    random: Tensor  # state of the generator before the step
    before: State
    after: State
    outcome: tuple[Tensor, Tensor]
    changes: Mapping[str, float]  # norm of what the step changed, by kind


class StepGraph:
    """A training step that is captured as a CUDA graph after a few eager steps, and replayed from then on.

    The graph proves itself: the last eager steps are replayed from the same state and random numbers, and compared.
    All of them come before the capture, so that their activations and the graph's are never in memory together.
    Where the capture fails, or a replay differs, the training continues eagerly and a notice says so; no step is lost.

    Args:
        state: returns everything that an update changes or depends on. It must not hold the training, nor may `notice`:
            a graph in a cycle of references would keep its memory.
        notice: called with one line if the graph cannot be used.
    """

    def __init__(self, state: Callable[[], State], notice: Callable[[str], None]) -> None:
        self._state, self._notice = state, notice
        self._steps = 0
        self._witnesses: list[_Witness] = []
        self.failed = False
        self._forget()

    def _forget(self) -> None:
        """Give up the graph with its memory."""
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs, self._targets = torch.empty(0), torch.empty(0)
        self._outcome = (torch.empty(0), torch.empty(0))

    @property
    def replays(self) -> bool:
        """Whether the next step of a whole batch is replayed."""
        return self._graph is not None

    def step(self, inputs: Tensor, targets: Tensor, *, eager: Update, whole: Update) -> tuple[Tensor, Tensor]:
        """Make one update with a whole batch; return its mean loss and the number of correct predictions.

        Args:
            inputs: float (B, 3, 32, 32), the same B in each call.
            targets: float (B, K).
            eager: makes one update in any way, by parts if the memory needs it.
            whole: makes one update with a whole batch, without waiting for the device; this is what is captured.
        """
        if self.replays:
            return self._replay(inputs, targets)
        if self.failed or self._steps < EAGER_STEPS:
            self._steps += 1
            return eager(inputs, targets)
        before, random, outcome, fault = self._copies(), torch.cuda.get_rng_state(), None, ""
        try:
            with _waits_refused():  # an invalid capture could not be recovered from
                outcome = whole(inputs, targets)
        except RuntimeError as error:
            fault = _reason(error)
        if outcome is None:  # outside `except`: the traceback holds the activations
            if fault != LITTLE_MEMORY:  # else the eager step splits the batch
                self._give_up(fault)
            self._put_back(before, random)
            return eager(inputs, targets)
        after = self._copies()
        changes = {kind: _distance(after[kind], before[kind]) for kind in after}
        if not all(map(math.isfinite, (float(outcome[0]), *changes.values()))):
            return outcome  # nothing to compare with; the training ends
        self._witnesses.append(_Witness(inputs, targets, random, before, after, outcome, changes))
        return outcome if len(self._witnesses) < PROVED_STEPS else self._prove(whole)

    def _prove(self, whole: Update) -> tuple[Tensor, Tensor]:
        """Capture the step and replay the last eager ones; return the outcome of the last."""
        last, random = self._witnesses[-1], torch.cuda.get_rng_state()
        fault, outcome = None, last.outcome
        try:
            self._capture(last.inputs, last.targets, whole)
            for witness in self._witnesses:
                self._put_back(witness.before, witness.random)
                outcome = self._replay(witness.inputs, witness.targets)
                fault = fault or self._difference(witness, float(outcome[0]))
        except RuntimeError as error:  # CUDA's, of what cannot be captured
            fault = _reason(error)
        self._witnesses = []
        if fault is None:
            return outcome
        self._give_up(fault)
        self._put_back(last.after, random)
        return last.outcome

    def _give_up(self, reason: str) -> None:
        self._forget()
        self._witnesses = []
        self.failed = True
        release_memory()
        self._notice(f"each step's kernels are launched one by one, which is slower: no CUDA graph, {reason}")

    def _capture(self, inputs: Tensor, targets: Tensor, whole: Update) -> None:
        release_memory()  # the graph's is its own, and nothing may be freed during the capture
        self._inputs, self._targets = inputs.clone(), targets.clone()
        graph = torch.cuda.CUDAGraph()
        # Captures on a stream of its own; the outer context leaves it where PyTorch does not, after an error.
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, capture_error_mode="thread_local"),
            _waits_refused(),
        ):
            self._outcome = whole(self._inputs, self._targets)
        self._graph = graph

    def _replay(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        assert self._graph is not None
        self._inputs.copy_(inputs)
        self._targets.copy_(targets)
        self._graph.replay()
        loss, right = self._outcome
        return loss.clone(), right.clone()  # the next replay overwrites them

    def _copies(self) -> State:
        """Copy the state into the host's memory: the device's may be scarce."""
        return {kind: [x.detach().to("cpu", copy=True) for x in tensors] for kind, tensors in self._state().items()}

    @torch.no_grad()
    def _put_back(self, copies: State, random: Tensor) -> None:
        for kind, tensors in self._state().items():
            for tensor, copy in zip(tensors, copies[kind], strict=True):
                tensor.copy_(copy)
        torch.cuda.set_rng_state(random)

    def _difference(self, witness: _Witness, loss: float) -> str | None:
        """Return how a replay differs from an eager step from the same state; None within the tolerances."""
        wanted = float(witness.outcome[0])
        if not abs(wanted - loss) <= LOSS_TOLERANCE * abs(wanted):
            return f"whose loss was {loss:.6g} instead of {wanted:.6g}"
        now = self._copies()
        for kind, change in witness.changes.items():
            error = _distance(witness.after[kind], now[kind])
            if not error <= CHANGE_TOLERANCE * change:
                return f"whose change of {kind} differed by {error:.3g} from one of {change:.3g}"
        return None


def release_memory() -> None:
    """Return to the device what nothing uses, for others or a graph to take."""
    gc.collect()  # an earlier training may lie in a cycle of references
    torch.cuda.empty_cache()


@contextmanager
def _waits_refused() -> Iterator[None]:
    """Let each wait for the device raise a RuntimeError, before it could make a capture invalid."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that not every wait is found
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def _distance(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Return the norm of the difference of two lists of tensors; whole numbers, which only count, are left out."""
    pairs = zip(one, other, strict=True)
    return math.hypot(*(float((a - b).double().norm()) for a, b in pairs if a.is_floating_point()))


def _reason(error: RuntimeError) -> str:
    """Return in one line why a step could not be captured: the first error, which the end of a capture hides."""
    first = error.__context__ or error
    if isinstance(first, RuntimeError) and is_out_of_memory(first):
        return LITTLE_MEMORY
    return first_line(first)
