"""Ranges of a far image that may change yet, although no request for them is pending any more.

A connection that breaks may have carried writes to a server that sees them only much later, because it was stopped or
its own disk hung. We never learn whether it does them, not even over another connection to the same server. So the
ranges are remembered for as long as the image is open. They are few; if there are too many, near ones are joined.

Ranges of changes that a server had acknowledged, lost, and refused to do again are remembered too: each new connection
is asked to do them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from lmdbitmap.bits import Run, joined_runs

MOST: Final = 4096
_FIRST_GAP: Final = 64 << 10


class Doubts:
    """A set of bytes. It never lacks a byte that was added; it may have bytes between ranges that were not added."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._gap = 0
        self._runs: Sequence[Run] = ()

    @property
    def runs(self) -> Sequence[Run]:
        """(start, stop) in bytes, sorted, with gaps between them. The sequence is replaced, never changed."""
        return self._runs

    def add(self, runs: Iterable[Run]) -> None:
        """For one thread at a time."""
        found = list(joined_runs(sorted([*self._runs, *runs]), self._gap))
        while len(found) > self._most:
            self._gap = max(2 * self._gap, _FIRST_GAP)
            found = list(joined_runs(found, self._gap))
        self._runs = found
