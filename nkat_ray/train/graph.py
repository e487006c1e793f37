"""Replay a whole training step as one CUDA graph: a small network's step waits for the host, not for the GPU.

A step of the notes' baseline launches about 1,100 kernels. Launching them one by one takes several times as long as
computing them (benchmarks/RESULTS.md, "On an H100"); a graph launches all of them at once.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

EAGER_STEPS = 3  # before a graph is captured: they create the optimizer's state and load the kernels
PROVED_STEPS = 2  # first replays, which are compared with eager steps
LOSS_TOLERANCE = 1e-2  # relative difference of the loss
UPDATE_TOLERANCE = 0.05  # difference of the weights' change, relative to its norm: sums differ in their order, no more

Update = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # inputs, targets -> loss, number of correct predictions


class StepGraph:
    """A training step that is captured as a CUDA graph after a few eager steps, and replayed from then on.

    The first replays prove themselves: each is compared with an eager step from the same weights and random state.
    Where the capture fails, or a replay differs, the training continues eagerly and a notice says so; no step is lost.

    Args:
        eager: makes one update in any way, by parts if the memory needs it.
        whole: makes one update with a whole batch, without waiting for the device; this is what is captured.
        parameters: the network's parameters, whose changes are compared.
        others: returns all other tensors that an update changes: buffers and the optimizer's state.
        notice: called with one line if the graph cannot be used.
    """

    def __init__(
        self,
        eager: Update,
        whole: Update,
        parameters: Iterable[Tensor],
        others: Callable[[], list[Tensor]],
        notice: Callable[[str], None],
    ) -> None:
        self._eager, self._whole, self._notice = eager, whole, notice
        self._parameters, self._others = list(parameters), others
        self._steps, self._proved = 0, 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs, self._targets = torch.empty(0), torch.empty(0)
        self._outcome = (torch.empty(0), torch.empty(0))
        self.failed = False

    @property
    def replays(self) -> bool:
        """Whether the next step of a whole batch is replayed without a comparison."""
        return self._graph is not None and self._proved >= PROVED_STEPS

    def step(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Make one update with a whole batch; return its mean loss and the number of correct predictions.

        Args:
            inputs: float (B, 3, 32, 32), the same B in each call.
            targets: float (B, K).
        """
        if self.failed or self._steps < EAGER_STEPS:
            self._steps += 1
            return self._eager(inputs, targets)
        if not self.replays:
            return self._prove(inputs, targets)
        return self._replay(inputs, targets)

    def _prove(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Make one update eagerly and once more by replay; keep the replay's if they agree, else the eager one's."""
        before, random = self._copies(), torch.cuda.get_rng_state()
        eager = self._eager(inputs, targets)
        if not eager[0].isfinite():
            return eager  # nothing to compare with; the training ends
        after, random_after = self._copies(), torch.cuda.get_rng_state()
        self._put_back(before)
        try:
            if self._graph is None:
                self._capture(inputs, targets)
            torch.cuda.set_rng_state(random)
            replayed = self._replay(inputs, targets)
            fault = self._difference(before, after, eager[0], replayed[0])
        except RuntimeError as error:  # CUDA's, of what cannot be captured
            fault = (str(error).strip() or type(error).__name__).splitlines()[0]
        if fault is None:
            self._proved += 1
            return replayed
        self.failed, self._graph = True, None
        self._put_back(after)
        torch.cuda.set_rng_state(random_after)
        self._notice(f"each step's kernels are launched one by one, which is slower: no CUDA graph, {fault}")
        return eager

    def _capture(self, inputs: Tensor, targets: Tensor) -> None:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # the graph's memory is its own
        self._inputs, self._targets = inputs.clone(), targets.clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._outcome = self._whole(self._inputs, self._targets)
        self._graph = graph

    def _replay(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        assert self._graph is not None
        self._inputs.copy_(inputs)
        self._targets.copy_(targets)
        self._graph.replay()
        loss, right = self._outcome
        return loss.clone(), right.clone()  # the next replay overwrites them

    def _changing(self) -> list[Tensor]:
        return [*self._parameters, *self._others()]

    @torch.no_grad()
    def _copies(self) -> list[Tensor]:
        return [tensor.detach().clone() for tensor in self._changing()]

    @torch.no_grad()
    def _put_back(self, copies: list[Tensor]) -> None:
        for tensor, copy in zip(self._changing(), copies, strict=True):
            tensor.copy_(copy)

    @torch.no_grad()
    def _difference(self, before: list[Tensor], after: list[Tensor], eager: Tensor, replayed: Tensor) -> str | None:
        """Return how a replay differs from an eager step from the same state; None within the tolerances."""
        now = self._parameters
        wanted, error = (
            float(torch.stack([(a - b).float().norm() for a, b in zip(pair[0], pair[1], strict=False)]).norm())
            for pair in ((after, before[: len(now)]), (after[: len(now)], now))
        )
        loss, other = float(eager), float(replayed)
        if not abs(loss - other) <= LOSS_TOLERANCE * abs(loss):
            return f"whose loss was {other:.6g} instead of {loss:.6g}"
        if not error <= UPDATE_TOLERANCE * wanted:
            return f"whose update differed by {error:.3g} from one of {wanted:.3g}"
        return None
