import inspect
from typing import Any

from nkat_ray.record.observer import Observer, Observers

EVENTS = [name for name in vars(Observer) if name.startswith("on_")]


def test_each_event_goes_to_all_observers_in_order() -> None:
    heard: list[tuple[int, str, tuple[Any, ...]]] = []

    class Listener(Observer):
        def __init__(self, number: int) -> None:
            self._number = number

        def __getattribute__(self, name: str) -> Any:
            if name.startswith("on_"):
                return lambda *arguments: heard.append((self._number, name, arguments))
            return super().__getattribute__(name)

    observers = Observers(iter([Listener(1), Listener(2)]))
    for name in EVENTS:
        arguments = tuple(range(len(inspect.signature(getattr(Observer, name)).parameters) - 1))
        getattr(observers, name)(*arguments)
        assert heard[-2:] == [(1, name, arguments), (2, name, arguments)]
    assert len(heard) == 2 * len(EVENTS)
    assert len(EVENTS) >= 9


def test_an_observer_may_leave_events_out() -> None:
    for name in EVENTS:
        getattr(Observer(), name)(*inspect.signature(getattr(Observer, name)).parameters.keys() - {"self"})
