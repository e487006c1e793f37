"""A network's design trained anew with several seeds, as parallel Ray tasks (docs/spec.md section 6.4)."""

from collections.abc import Iterator, Mapping

import ray

from nkat_ray.data import Dataset
from nkat_ray.data.selection import Selection
from nkat_ray.evaluate import Task, as_finished, on_share
from nkat_ray.search.callbacks import one_line
from nkat_ray.search.resources import Share


def retrain_weights(payload: bytes, selection: Selection, task: Task, seed: int, share: Share) -> bytes:
    """On a worker: the same design, trained anew by its own recipe; the weights of the last epoch.

    Raises:
        ValueError: the loss was not finite.
    """
    from nkat_ray.train.checkpoint import Weights
    from nkat_ray.train.device import device_for
    from nkat_ray.train.loop import ImageSet
    from nkat_ray.train.transfer import transfer

    device, source = device_for(share.gpus, share.cpus), Weights.from_bytes(payload)
    moved = transfer(
        source, mode="scratch", epochs=source.config.epochs, lr=source.config.lr, dataset=task.dataset,
        train=ImageSet(selection.images, selection.labels, selection.train_index, device),
        val=ImageSet(selection.images, selection.labels, selection.val_index, device),
        num_classes=task.num_classes, grey=task.grey, flip=task.flip, seed=seed, device=device, notice=lambda _: None,
    )  # fmt: skip
    return moved.weights.to_bytes()


def retrained(
    payload: bytes, dataset: Dataset, selection: Selection, seeds: Mapping[int, int], share: Share
) -> Iterator[tuple[int, bytes]]:
    """Train a network's design anew with several seeds, in parallel.

    Args:
        payload: the network.
        dataset: what it is trained on.
        selection: its images.
        seeds: number -> seed.
        share: what each training asks for.

    Yields:
        Numbers with the new weights, as they finish.

    Raises:
        RuntimeError: a training failed; those before it were yielded.
    """
    task = Task(dataset=dataset.name, num_classes=dataset.classes, grey=dataset.grey, flip=dataset.flip)
    call, images, source = on_share(retrain_weights, share), ray.put(selection), ray.put(payload)
    pending = {call.remote(source, images, task, seed, share): number for number, seed in seeds.items()}
    for ref, number in as_finished(pending):
        try:
            yield number, ray.get(ref)
        except ray.exceptions.RayError as error:
            raise RuntimeError(f"the training with seed {seeds[number]} failed: {one_line(error)}") from error
