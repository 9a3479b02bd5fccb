"""Ranges of a far image that may change yet, although nobody waits for it any more.

A connection that breaks may have carried writes to a server that does not see them before much later: it was stopped,
or its own disk hung. Whether it ever does them we are never told, not even by another connection of the same server.
So their ranges are remembered for as long as the image is open. They are few; of too many, near ones become one.

So are those of changes that a server had acknowledged, lost, and refused to do again: each new connection is asked to.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from lmdbitmap.bits import Run, joined_runs

MOST: Final = 4096
_FIRST_GAP: Final = 64 << 10


class Doubts:
    """A set of bytes. One that was added is never missing; between ranges some are that were not."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._gap = 0
        self._runs: Sequence[Run] = ()

    @property
    def runs(self) -> Sequence[Run]:
        """As (start, stop) in bytes, sorted, with gaps between them. Is not changed afterwards, but replaced."""
        return self._runs

    def add(self, runs: Iterable[Run]) -> None:
        """For one thread at a time."""
        found = list(joined_runs(sorted([*self._runs, *runs]), self._gap))
        while len(found) > self._most:
            self._gap = max(2 * self._gap, _FIRST_GAP)
            found = list(joined_runs(found, self._gap))
        self._runs = found
