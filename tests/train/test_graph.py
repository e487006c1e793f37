"""The proof of a CUDA graph, with a graph that runs on a CPU: tests/gpu has the real one."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nkat_ray.train.graph import EAGER_STEPS, PROVED_STEPS, StepGraph

BATCH = torch.arange(8.0).view(4, 2)
TARGETS = torch.ones(4, 1)


class FakeGraph:
    """Replays by running what was captured once more."""

    replay: Callable[[], None]


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
        self.graph = StepGraph(self.eager, self.whole, self.model.parameters(), self.others, self.notices.append)

    def others(self) -> list[Tensor]:
        return [state["momentum_buffer"] for state in self.optimizer.state.values()]

    def eager(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        self.eager_steps += 1
        return self.update(inputs, targets)

    def update(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        self.optimizer.zero_grad()
        loss = ((self.model(inputs + torch.rand(()))) - targets).square().mean()  # random numbers, as dropout draws
        loss.backward()
        self.optimizer.step()
        return loss.detach(), torch.tensor(len(inputs))

    def whole(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Capture: nothing is computed until the replay."""
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
    def capturing(_: Any) -> Iterator[None]:
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "get_rng_state", torch.get_rng_state)
    monkeypatch.setattr(torch.cuda, "set_rng_state", torch.set_rng_state)


def trained(steps: int, *, graphed: bool = True, training: Training | None = None) -> tuple[Training, list[float]]:
    training = training or Training()
    torch.manual_seed(1)
    step = training.graph.step if graphed else training.eager
    return training, [float(step(BATCH + number, TARGETS)[0]) for number in range(steps)]


def test_replayed_steps_are_eager_ones() -> None:
    expected, losses = trained(12, graphed=False)
    replayed, found = trained(12)
    assert found == losses
    assert torch.equal(replayed.weights(), expected.weights())
    assert replayed.eager_steps == EAGER_STEPS + PROVED_STEPS
    assert replayed.graph.replays
    assert replayed.notices == []


def test_what_a_step_returns_outlives_the_next_one() -> None:
    training = Training()
    outcomes = [training.graph.step(BATCH + number, TARGETS) for number in range(10)]
    assert len({float(loss) for loss, _ in outcomes}) == 10
    assert all(int(right) == len(BATCH) for _, right in outcomes)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda t: t.outcome[0].add_(1.0), "whose loss was"),
        (lambda t: t.outcome[0].fill_(math.nan), "whose loss was nan"),
        (lambda t: t.model.weight.data.add_(0.5), "whose update differed by"),
        (lambda t: t.model.weight.data.fill_(math.nan), "whose update differed by nan"),
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


def test_a_loss_that_is_not_finite_proves_nothing() -> None:
    training, _ = trained(EAGER_STEPS)
    loss, _ = training.graph.step(BATCH * math.inf, TARGETS)
    assert not loss.isfinite()
    assert not training.graph.failed
    assert not training.graph.replays
    assert training.notices == []
