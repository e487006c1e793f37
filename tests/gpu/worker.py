"""One trial that shares a GPU: worker.py SHARE CPUS SECONDS REAL prints `ready`, waits for a line, and trains."""

import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stdout

import torch
from cards import card, trainer_on
from pretend_cuda import CUDA

from nkat_ray.config import TrialConfig
from nkat_ray.train.device import device_for
from nkat_ray.train.loop import Batch, Trainer


def endless(trainer: Trainer) -> Iterator[Batch]:
    while True:
        yield from trainer._batches()


def main(share: float, cpus: int, seconds: float, *, real: bool) -> None:
    answers = sys.stdout
    with redirect_stdout(sys.stderr), card(real=real):  # a training's notices are no answers
        device_for(share, cpus)
        config = TrialConfig() if real else TrialConfig(embed_dim=16, depth=1, batch_size=8)
        trainer = trainer_on(CUDA, config, train=34 * config.batch_size)
        trainer.model.train()
        batches = endless(trainer)
        for step in range(8):
            trainer._step(next(batches), step)
        torch.cuda.synchronize()
        print("ready", file=answers, flush=True)
        sys.stdin.readline()
        steps, end_s = 0, time.time() + seconds
        while time.time() < end_s:
            trainer._step(next(batches), 8 + steps)
            steps += 1
        torch.cuda.synchronize()
        print(steps * config.batch_size / seconds, file=answers, flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), real=sys.argv[4] == "True")
