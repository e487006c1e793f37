"""The proof of a CUDA graph, with a graph that runs on a CPU: tests/gpu has the real one."""

import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from cards import CPU, SMALL, STILL, losses_of, trainer_on
from torch import Tensor, nn

from nkat_ray.train.graph import EAGER_STEPS, PROVED_STEPS, StepGraph
from nkat_ray.train.loop import Trainer, _state_of_update

BATCH = torch.arange(8.0).view(4, 2)
TARGETS = torch.ones(4, 1)


class FakeGraph:
    """Replays by running what was captured once more."""

    replay: Callable[[], None]
    capturing = False
    error_at_end: str | None = None  # raised at the end of a capture in which something else was raised


class Training:
    """One linear layer with a momentum, and everything that `StepGraph` needs to know about it."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Linear(2, 1)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        self.notices: list[str] = []
        self.eager_steps = 0
        self.outcome = (torch.zeros(()), torch.zeros(()))
        self.spoil: Callable[[], None] = lambda: None  # happens in replays alone
        self.hinder: Callable[[bool], None] = lambda capturing: None  # happens in steps of a whole batch
        self.graph = StepGraph(self.state, self.notices.append)

    def state(self) -> dict[str, list[Tensor]]:
        momenta = [state["momentum_buffer"] for state in self.optimizer.state.values()]
        return {"weights": list(self.model.parameters()), "momentum": momenta}

    def step(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return self.graph.step(inputs, targets, eager=self.eager, whole=self.whole)

    def eager(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        assert sys.exc_info() == (None, None, None)  # a traceback would hold a failed step's activations
        self.eager_steps += 1
        return self.update(inputs, targets)

    def update(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        self.optimizer.zero_grad()
        loss = ((self.model(inputs + torch.rand(()))) - targets).square().mean()  # random numbers, as dropout draws
        loss.backward()
        self.optimizer.step()
        return loss.detach(), torch.tensor(len(inputs))

    def whole(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Make an update; in a capture nothing is computed until the replay."""
        self.hinder(graph.capturing)
        if not graph.capturing:
            return self.update(inputs, targets)
        graph.replay = lambda: self.replay(inputs, targets)
        return self.outcome

    def replay(self, inputs: Tensor, targets: Tensor) -> None:
        loss, right = self.update(inputs, targets)
        self.outcome[0].copy_(loss)
        self.outcome[1].copy_(right)
        self.spoil()

    def weights(self) -> Tensor:
        return torch.cat([parameter.detach().flatten() for parameter in self.model.parameters()])


graph = FakeGraph()


@pytest.fixture(autouse=True)
def _cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def capturing(_: Any, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        graph.capturing = True
        try:
            yield
        except RuntimeError:
            if graph.error_at_end is None:
                raise
            raise RuntimeError(graph.error_at_end)  # noqa: B904  # as PyTorch raises it
        finally:
            graph.capturing = False

    mode = {"now": 0}
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: mode["now"])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda value: mode.update(now=value))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(graph, "error_at_end", None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_rng_state", torch.get_rng_state)
    monkeypatch.setattr(torch.cuda, "set_rng_state", torch.set_rng_state)


def trained(steps: int, *, graphed: bool = True, training: Training | None = None) -> tuple[Training, list[float]]:
    training = training or Training()
    torch.manual_seed(1)
    step = training.step if graphed else training.eager
    return training, [float(step(BATCH + number, TARGETS)[0]) for number in range(steps)]


def test_replayed_steps_are_eager_ones() -> None:
    expected, losses = trained(12, graphed=False)
    replayed, found = trained(12)
    assert found == losses
    assert torch.equal(replayed.weights(), expected.weights())
    assert replayed.eager_steps == EAGER_STEPS
    assert replayed.graph.replays
    assert replayed.notices == []


def test_what_a_step_returns_outlives_the_next_one() -> None:
    training = Training()
    outcomes = [training.step(BATCH + number, TARGETS) for number in range(10)]
    assert len({float(loss) for loss, _ in outcomes}) == 10
    assert all(int(right) == len(BATCH) for _, right in outcomes)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda t: t.outcome[0].add_(1.0), "whose loss was"),
        (lambda t: t.outcome[0].fill_(math.nan), "whose loss was nan"),
        (lambda t: t.model.weight.data.add_(0.5), "whose change of weights differed by"),
        (lambda t: t.model.weight.data.fill_(math.nan), "whose change of weights differed by nan"),
        (lambda t: t.state()["momentum"][0].mul_(1.5), "whose change of momentum differed by"),
    ],
)
@pytest.mark.parametrize("replay", range(PROVED_STEPS))
def test_a_replay_that_differs_leaves_the_eager_training(
    spoil: Callable[[Training], None], reason: str, replay: int
) -> None:
    expected, losses = trained(12, graphed=False)
    training, replays = Training(), iter(range(100))
    training.spoil = lambda: spoil(training) if next(replays) >= replay else None
    _, found = trained(12, training=training)
    assert found == losses
    assert torch.equal(training.weights(), expected.weights())
    assert training.graph.failed
    assert training.graph._inputs.numel() == training.graph._outcome[0].numel() == 0
    (notice,) = training.notices
    assert f"no CUDA graph, {reason}" in notice


def test_a_capture_that_fails_leaves_the_eager_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore lines")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", refuse)
    expected, losses = trained(8, graphed=False)
    training, found = trained(8)
    assert found == losses
    assert torch.equal(training.weights(), expected.weights())
    (notice,) = training.notices
    assert "operation not permitted when stream is capturing" in notice
    assert "\n" not in notice


def hindered(error: RuntimeError, when: Callable[[bool, int], bool], steps: int = 12) -> Training:
    """Train while steps of a whole batch raise an error in some captures or passes; the result is the eager one's."""
    expected, losses = trained(steps, graphed=False)
    training, passes = Training(), iter(range(100))

    def hinder(capturing: bool) -> None:
        if when(capturing, next(passes)):
            training.model.weight.data.add_(1.0)  # an update that was broken off
            raise error

    training.hinder = hinder
    _, found = trained(steps, training=training)
    assert found == losses
    assert torch.equal(training.weights(), expected.weights())
    assert torch.cuda.get_sync_debug_mode() == 0
    return training


def test_a_wait_is_found_before_the_capture() -> None:
    modes = []
    training = hindered(
        RuntimeError("called a synchronizing CUDA operation"),
        lambda capturing, _: modes.append((capturing, torch.cuda.get_sync_debug_mode())) or True,  # type: ignore[func-returns-value]
    )
    assert modes == [(False, "error")]
    assert "no CUDA graph, called a synchronizing CUDA operation" in training.notices[0]


def test_the_end_of_a_capture_hides_no_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "error_at_end", "capture invalidated")
    training = hindered(RuntimeError("the reason\nmore lines"), lambda capturing, _: capturing)
    (notice,) = training.notices
    assert notice.endswith("no CUDA graph, the reason")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_each_step_is_replayed_at_its_own_learning_rate(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """During the warm-up the rate rises by a quarter from one eager step to the next."""
    config = replace(SMALL, optimizer=optimizer, **STILL)

    def training() -> Trainer:
        trainer = trainer_on(CPU, config, train=12 * config.batch_size)
        for group in trainer.optimizer.param_groups:  # as on a GPU
            group.update(lr=torch.tensor(config.lr), fused=False)
        return trainer

    expected = losses_of(training(), 12)
    trainer, notices = training(), list[str]()
    trainer._graph = StepGraph(partial(_state_of_update, trainer.model, trainer.optimizer), notices.append)
    update, outcome = trainer._update_whole, (torch.zeros(()), torch.zeros(()))

    def whole(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        def replay() -> None:
            for mine, found in zip(outcome, update(inputs, targets), strict=True):
                mine.copy_(found)

        if not graph.capturing:
            return update(inputs, targets)
        graph.replay = replay
        return outcome

    monkeypatch.setattr(trainer, "_update_whole", whole)
    assert losses_of(trainer, 12) == expected
    assert notices == []
    assert trainer._graph.replays


def test_no_eager_step_shares_the_memory_with_the_graph() -> None:
    """Their activations would be there twice: on an H200 a training took more than its estimate."""
    passes: list[bool] = []
    training = Training()
    training.hinder = passes.append
    trained(12, training=training)
    assert passes == [False] * PROVED_STEPS + [True]
    assert training.graph.replays


def test_too_little_memory_for_a_graph_leaves_the_eager_training() -> None:
    training = hindered(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), lambda capturing, _: capturing)
    assert training.graph.failed
    (notice,) = training.notices
    assert notice.endswith("no CUDA graph, too little memory")


def test_a_batch_that_no_longer_fits_is_not_the_graphs_fault() -> None:
    """The eager step splits it; the graph is tried again."""
    training = hindered(torch.OutOfMemoryError("CUDA out of memory."), lambda _, number: number < 2)
    assert training.graph.replays
    assert training.notices == []


def test_a_loss_that_is_not_finite_proves_nothing() -> None:
    training, _ = trained(EAGER_STEPS)
    loss, _ = training.step(BATCH * math.inf, TARGETS)
    assert not loss.isfinite()
    assert not training.graph.failed
    assert not training.graph.replays
    assert training.notices == []


def test_a_change_that_is_not_finite_proves_nothing() -> None:
    training, _ = trained(EAGER_STEPS)
    training.optimizer.param_groups[0]["lr"] = math.inf
    loss, _ = training.step(BATCH, TARGETS)
    assert loss.isfinite()
    assert not training.graph.failed
    assert not training.graph.replays
    assert training.notices == []
