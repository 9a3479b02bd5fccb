"""Where the old data of each cluster of a snapshot is: in the image, known to be zeroes, or in a slot of a file.

A writer of states holds its own lock. A reader needs none: a cluster's state is set whole, and once.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import Final

from lmdbitmap import bits
from lmdbitmap.geometry import ceil_div

UNTOUCHED, ZERO, FIRST_SLOT = 0, 1, 2
MOST_SLOTS: Final = (1 << 32) - 1 - FIRST_SLOT
LOOK_CLUSTERS: Final = 1 << 14
"""Most clusters whose states are examined one by one in one call."""
_STATE_BYTES: Final = 4
_ALL_UNTOUCHED: Final = bytes(LOOK_CLUSTERS * _STATE_BYTES)


class ClusterStates:
    """`UNTOUCHED`, `ZERO` or `FIRST_SLOT` + N for each of `count` clusters. Untouched clusters take no memory."""

    def __init__(self, count: int) -> None:
        self._bytes = bits.anonymous_memory(count * _STATE_BYTES)
        self._states = memoryview(self._bytes).cast("I")
        self._touched = bytearray(ceil_div(count, LOOK_CLUSTERS))
        """A byte for each `LOOK_CLUSTERS`: 0 while all of them are untouched and need not be examined one by one."""

    def set(self, start: int, states: Sequence[int]) -> None:
        """Set the states of clusters from `start` on."""
        looks = _looks(start, start + len(states))
        self._touched[looks.start : looks.stop] = b"\1" * len(
            looks
        )  # first: a reader that finds a 0 looks no further
        self._states[start : start + len(states)] = memoryview(array("I", states))

    def runs(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yield (state of the first, start, stop) of runs of clusters that are alike, or have consecutive slots."""
        if self.are_untouched(start, stop):
            yield UNTOUCHED, start, stop
            return
        states = self._states[start:stop].tolist()
        first = 0
        for index in range(1, len(states) + 1):
            if index < len(states) and states[index] == _following(states[first], index - first):
                continue
            yield states[first], start + first, start + index
            first = index

    def are_untouched(self, start: int, stop: int) -> bool:
        """Whether all are untouched, at the speed of memory; False if there are too many to examine one by one."""
        looks = _looks(start, stop)
        if self._touched.find(1, looks.start, looks.stop) < 0:
            return True
        if stop - start > LOOK_CLUSTERS:
            return False
        return _ALL_UNTOUCHED.startswith(self._bytes[start * _STATE_BYTES : stop * _STATE_BYTES])


def _looks(start: int, stop: int) -> range:
    return range(start // LOOK_CLUSTERS, ceil_div(stop, LOOK_CLUSTERS))


def _following(state: int, distance: int) -> int:
    return state + distance if state >= FIRST_SLOT else state
