"""Retrain a network's design with several seeds, as parallel Ray tasks (docs/spec.md section 6.4)."""

from collections.abc import Callable, Iterator, Mapping

import ray

from nkat_ray.cluster.resources import Share
from nkat_ray.data import Dataset
from nkat_ray.data.selection import Selection
from nkat_ray.errors import one_line
from nkat_ray.stage2.tasks import Tasks
from nkat_ray.stage2.worker import retrain_weights


def retrained(
    payload: bytes,
    dataset: Dataset,
    selection: Selection,
    seeds: Mapping[int, int],
    share: Share,
    notice: Callable[[str], None],
    *,
    compile: bool = False,
) -> Iterator[tuple[int, bytes]]:
    """Train a network's design from scratch with several seeds, in parallel.

    Args:
        payload: the network, as bytes of safetensors.
        seeds: number of the training -> seed.
        share: of a node, for each training.
        notice: called with one line about anything the user should know.
        compile: see `Trainer`.

    Yields:
        Number of the training and the new network, in the order in which they finish.

    Raises:
        RuntimeError: a training failed; those that finished before were yielded.
    """
    tasks, source, images = Tasks[int](), ray.put(payload), ray.put(selection)
    for number, seed in seeds.items():
        tasks.send(number, retrain_weights, source, images, dataset.traits, seed, compile, share=share)
    while tasks:
        for number, reference in tasks.finished(wait=True):
            try:
                trained, notices = ray.get(reference)
            except ray.exceptions.RayError as error:
                raise RuntimeError(f"the training with seed {seeds[number]} failed: {one_line(error)}") from error
            for text in notices:
                notice(f"seed {seeds[number]}: {text}")
            yield number, trained
