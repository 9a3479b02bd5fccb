"""The armed extents against a naive model: a list, longest quiet first, and a list of what was armed before."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from lmdbitmap import bits
from lmdbitmap.bits import BitView
from lmdbitmap.geometry import EXTENT_BLOCKS, REGION_BYTES, REGION_EXTENTS
from lmdbitmap.tracker.armed import ArmedExtents

MOST = 6
REGIONS, EXTENTS = 3, 3

Extent = tuple[int, int]


def has_dirt(region: int, extent: int) -> bool:
    return extent != 2


def dirt_of(regions: int, has_dirt: Callable[[int, int], bool]) -> BitView:
    """A disk's bits: the last block of each extent that has dirt."""
    dirt = bits.bitmap_view(bytearray(regions * REGION_BYTES))
    for region, extent in itertools.product(range(regions), range(REGION_EXTENTS)):
        if has_dirt(region, extent):
            dirt[((region * REGION_EXTENTS) + extent + 1) * EXTENT_BLOCKS - 1] = 1
    return dirt


DIRT = dirt_of(REGIONS, has_dirt)


class NaiveArmed:
    def __init__(self) -> None:
        self.armed: list[tuple[Extent, int]] = []
        self.before: list[Extent] = []
        self.passes = 0

    def dirt(self, extent: Extent) -> None:
        self.armed = [(other, seen) for other, seen in self.armed if other != extent]
        self.armed.append((extent, self.passes))
        self.before = [other for other in self.before if other != extent]

    def disarm(self, extent: Extent) -> None:
        self.armed = [(other, seen) for other, seen in self.armed if other != extent]
        if has_dirt(*extent):
            self.before.append(extent)

    def is_armed(self, extent: Extent) -> bool:
        return extent in [other for other, _ in self.armed]

    def longest_quiet(self, passes: int) -> Extent | None:
        if len(self.armed) > MOST / 2:
            passes = min(passes, 1)
        quiet = [extent for extent, seen in self.armed if self.passes - seen >= passes]
        return quiet[0] if quiet else None

    def likely(self) -> list[Extent]:
        room = max(MOST // 2 - len(self.armed), 0)
        before = self.before[-room:] if room else []
        return [*before, *(extent for extent, _ in self.armed)]


EXTENTS_OF_A_DISK = st.tuples(st.integers(0, REGIONS - 1), st.integers(0, EXTENTS - 1))
ACTS = st.tuples(st.sampled_from(["arm", "touch", "disarm", "pass", "disarm all"]), EXTENTS_OF_A_DISK)


@given(st.lists(ACTS, max_size=60))
def test_armed_extents_are_those_of_a_naive_model(acts: list[tuple[str, Extent]]) -> None:
    naive = NaiveArmed()
    armed = ArmedExtents(MOST, DIRT)
    for act, extent in acts:
        do(armed, naive, act, extent)
        compare(armed, naive)


def do(armed: ArmedExtents, naive: NaiveArmed, act: str, extent: Extent) -> None:
    region, number = extent
    if act == "pass":
        armed.end_pass()
        naive.passes += 1
    elif act == "disarm all":
        armed.disarm_all()
        for one, _ in naive.armed:
            naive.disarm(one)
    elif act == "arm" and len(naive.armed) < MOST:
        armed.arm(region, 1 << number)
        naive.dirt(extent)
    elif act == "touch" and naive.is_armed(extent):
        armed.touch(region, [number])
        naive.dirt(extent)
    elif act == "disarm":
        armed.disarm(region, 1 << number)
        if naive.is_armed(extent):
            naive.disarm(extent)


def compare(armed: ArmedExtents, naive: NaiveArmed) -> None:
    extents = {extent for extent, _ in naive.armed}
    assert len(armed) == len(extents)
    assert armed.regions == {region for region, _ in extents}
    for region in range(REGIONS):
        assert armed.mask(region) == sum(1 << number for other, number in extents if other == region)
    for passes in range(4):
        assert armed.longest_quiet(passes) == naive.longest_quiet(passes)
    assert list(armed.likely().items()) == masks(naive.likely())


def masks(extents: list[Extent]) -> list[tuple[int, int]]:
    """Of regions, each at the place of its last extent."""
    last = {region: place for place, (region, _) in enumerate(extents)}
    return [
        (region, sum(1 << number for other, number in extents if other == region))
        for region in sorted(last, key=last.__getitem__)
    ]


def test_what_was_armed_before_takes_no_more_memory_than_what_may_be_likely() -> None:
    armed = ArmedExtents(MOST, dirt_of(10, lambda region, extent: True))
    for number in range(10 * REGION_EXTENTS):
        region, extent = divmod(number, REGION_EXTENTS)
        armed.arm(region, 1 << extent)
        armed.disarm(region, 1 << extent)
    assert len(armed._before) == MOST // 2


def test_what_has_ended_is_forgotten() -> None:
    armed = ArmedExtents(MOST, DIRT)
    armed.arm(0, 0b11)
    armed.disarm(0, 0b1)
    armed.forget_all()
    compare(armed, NaiveArmed())
