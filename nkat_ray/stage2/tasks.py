"""Submit Ray tasks that use a share of a node, and collect their results as they finish."""

from collections.abc import Callable, Collection, Iterator
from typing import Any, Final, Generic, TypeVar

import ray

from nkat_ray.cluster.resources import Share

WAIT_S: Final = 1.0  # longest wait at a time, so that the driver can do periodic work in between
TASK_RETRIES: Final = 1  # a task whose node dies is retried once

Subject = TypeVar("Subject")


class Tasks(Generic[Subject]):
    """Submitted tasks whose results have not been collected, each with a subject that identifies it."""

    def __init__(self) -> None:
        self._subjects: dict[ray.ObjectRef[Any], Subject] = {}

    def __len__(self) -> int:
        return len(self._subjects)

    @property
    def subjects(self) -> Collection[Subject]:
        """Subjects of the tasks."""
        return self._subjects.values()

    def send(self, subject: Subject, function: Callable[..., Any], *arguments: Any, share: Share) -> None:
        """Submit a task.

        Args:
            share: resources; the task waits until a node has them free.
        """
        # Resources must go to the decorator: with `options` Ray would reuse a GPU worker, which keeps its GPU memory.
        remote: Any = ray.remote(**share.options, max_retries=TASK_RETRIES)(function)
        self._subjects[remote.remote(*arguments, share)] = subject

    def finished(self, *, wait: bool) -> Iterator[tuple[Subject, "ray.ObjectRef[Any]"]]:
        """Yield the subject of each finished task with a reference to its result or error.

        Args:
            wait: whether to wait up to `WAIT_S` seconds for a task to finish.
        """
        ready, _ = ray.wait(list(self._subjects), timeout=WAIT_S if wait else 0) if self._subjects else ([], [])
        for reference in ready:
            yield self._subjects.pop(reference), reference
