from collections.abc import Iterator

from nkat_ray.cluster.slots import RECOUNT_S, Slots


class World:
    """A clock that is set by hand and a cluster that has so many slots."""

    def __init__(self, number: int) -> None:
        self.now, self.number, self.counts, self.changes = 0.0, number, 0, []

    def count(self) -> int:
        self.counts += 1
        return self.number

    def slots(self) -> Slots:
        return Slots(self.number, count=self.count, on_change=self.changes.append, clock=lambda: self.now)


def test_a_change_is_seen_and_reported_once() -> None:
    world = World(2)
    slots = world.slots()
    for number in (5, 5, 1):
        world.number = number
        world.now += RECOUNT_S
        assert slots() == number
    assert world.changes == [5, 1]


def test_the_cluster_is_not_counted_at_every_call() -> None:
    world = World(2)
    slots = world.slots()
    world.number = 3

    def ticks() -> Iterator[int]:
        for _ in range(100):
            world.now += RECOUNT_S / 50
            yield slots()

    seen = list(ticks())
    assert world.counts == 2
    assert (seen[0], seen[-1]) == (2, 3)
