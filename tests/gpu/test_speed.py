"""How fast a GPU trains: figures for benchmarks/RESULTS.md and docs/cluster.md. No time is asserted."""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cards import STILL, Card, trainer_on
from pretend_cuda import CUDA
from torch import Tensor, nn
from torch.nn import functional as F

from nkat_ray.config import TrialConfig
from nkat_ray.cost import epoch_flops

WORKER = Path(__file__).with_name("worker.py")
NETWORKS: dict[str, dict[str, Any]] = {
    "4 tokens": {"patch_size": 4},
    "16 tokens (baseline)": {},
    "16 tokens, muon": {"optimizer": "muon"},
    "64 tokens": {"conv_stem": "off", "patch_size": 4},
    "256 tokens": {"conv_stem": "off", "patch_size": 2},
}


def config_of(card: Card, fields: dict[str, Any]) -> TrialConfig:
    return TrialConfig(**fields) if card.real else TrialConfig(embed_dim=16, depth=1, batch_size=4, **fields)


@pytest.mark.parametrize("network", NETWORKS)
def test_images_per_second(card: Card, network: str, measured: Callable[[str, object], None]) -> None:
    """Whole epochs as a trial trains them, augmentation included; the first one warms up."""
    config = config_of(card, {**NETWORKS[network], "epochs": 4, "warmup": 1})
    steps = 40 if card.real else 2
    trainer = trainer_on(CUDA, config, train=steps * config.batch_size, val=steps * config.batch_size)
    cores, results = [], []
    for result in trainer.epochs():
        results.append(result)
        cores.append(time.process_time())
    speeds = [result.images_per_s for result in results[1:]]
    measured(f"{network}: images per second, median of 3 epochs", statistics.median(speeds))
    measured(f"{network}: smallest and largest", (min(speeds), max(speeds)))
    measured(f"{network}: TFLOP/s by nkat_ray.cost", statistics.median(speeds) * epoch_flops(config, 1) / 1e12)
    measured(f"{network}: CPU seconds per epoch of {steps} steps", (cores[-1] - cores[0]) / 3)
    clock = time.perf_counter()
    trainer.accuracy(trainer.data.val)
    measured(f"{network}: images per second in evaluation", len(trainer.data.val) / (time.perf_counter() - clock))
    assert len(results) == 4


@pytest.mark.parametrize("network", ["16 tokens (baseline)", "16 tokens, muon", "64 tokens"])
def test_what_a_step_takes(card: Card, network: str, measured: Callable[[str, object], None]) -> None:
    """The whole step, replayed as a CUDA graph and one kernel at a time."""
    config = config_of(card, NETWORKS[network])
    rounds = 40 if card.real else 2
    for how in ("graph", "eager"):
        trainer = trainer_on(CUDA, config, train=(8 + rounds) * config.batch_size)
        if how == "eager":
            trainer._graph = None
        trainer.model.train()
        batches = list(trainer._batches())
        for step in range(8):
            trainer._step(batches[step], step)
        assert how == "eager" or (trainer._graph is not None and trainer._graph.replays == card.real)
        torch.cuda.synchronize()
        clock = time.perf_counter()
        for step in range(8, 8 + rounds):
            trainer._step(batches[step], step)
        torch.cuda.synchronize()
        measured(f"{network}: {how}, ms per step without augmentation", 1e3 * (time.perf_counter() - clock) / rounds)


@pytest.mark.parametrize("how", ["eager", "compiled", "graphed"])
def test_what_forward_and_backward_take(card: Card, how: str, measured: Callable[[str, object], None]) -> None:
    """As it is, behind torch.compile, as a CUDA graph: what the last two would gain. All give the same gradients."""
    config = config_of(card, STILL)
    trainer = trainer_on(CUDA, config)
    model = trainer.model.train()
    inputs, targets = torch.randn(config.batch_size, 3, 32, 32).to(CUDA), torch.arange(config.batch_size).to(CUDA) % 10

    def pass_through(network: nn.Module) -> None:
        network.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):  # a graph cannot hold the cache
            logits = network(inputs)
        F.cross_entropy(logits.float(), targets).backward()

    def gradients() -> Tensor:
        return torch.cat([weights.grad.flatten() for weights in model.parameters() if weights.grad is not None]).clone()

    pass_through(model)
    wanted = gradients()
    clock = time.perf_counter()
    works: dict[str, Callable[[], None]] = {"eager": lambda: pass_through(model)}
    if how == "compiled":
        compiled = card.compiled(model)
        works["compiled"] = lambda: pass_through(compiled)
    elif how == "graphed":
        works["graphed"] = card.graphed(works["eager"])
    work = works[how]
    work()
    torch.cuda.synchronize()
    measured(f"{how}: seconds until ready", time.perf_counter() - clock)
    similarity = torch.cosine_similarity(gradients(), wanted, dim=0)
    clock, rounds = time.perf_counter(), 30 if card.real else 1
    for _ in range(rounds):
        work()
    torch.cuda.synchronize()
    measured(f"{how}: ms", 1e3 * (time.perf_counter() - clock) / rounds)
    assert float(similarity) > 0.99


def test_what_choosing_tokens_takes(card: Card, measured: Callable[[str, object], None]) -> None:
    """The filter's topk against two other ways to find the six largest of a row."""
    scores = torch.randn(128 if card.real else 2, 8, 16, 16).to(CUDA)
    ways: dict[str, Callable[[], Tensor]] = {
        "topk": lambda: scores.topk(6).values.sum(-1),
        "sort": lambda: scores.sort(descending=True).values[..., :6].sum(-1),
        "rank by comparison": lambda: (scores * ((scores.unsqueeze(-2) > scores.unsqueeze(-1)).sum(-1) < 6)).sum(-1),
    }
    wanted = ways["topk"]()
    rounds = 50 if card.real else 1
    for name, way in ways.items():
        found = way()
        torch.cuda.synchronize()
        clock = time.perf_counter()
        for _ in range(rounds):
            way()
        torch.cuda.synchronize()
        measured(f"{name}, us", 1e6 * (time.perf_counter() - clock) / rounds)
        assert float((found - wanted).abs().max()) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("trials", [1, 2, 4, 8])
def test_trials_that_share_the_gpu(card: Card, trials: int, measured: Callable[[str, object], None]) -> None:
    """Images per second of several processes together, each with its share of the memory, as a search starts them."""
    if trials > 2 and not card.real:
        pytest.skip("a pretend GPU shares nothing")
    cpus = max(1, (os.cpu_count() or 1) // trials)
    command = [sys.executable, str(WORKER), str(1 / trials), str(cpus), "10" if card.real else "0.5", str(card.real)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    workers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(trials)
    ]
    try:
        assert [worker.stdout.readline().strip() for worker in workers if worker.stdout] == ["ready"] * trials
        for worker in workers:
            assert worker.stdin
            worker.stdin.write("go\n")
            worker.stdin.flush()
        speeds = [float(worker.stdout.readline()) for worker in workers if worker.stdout]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    measured(f"{trials} at a time: images per second together", sum(speeds))
    measured(f"{trials} at a time: images per second of the slowest", min(speeds))
    assert min(speeds) > 0
