"""Changes that a far server acknowledged but may not have on its disk yet, in the order of acknowledgement."""

from __future__ import annotations

from collections import deque
from typing import Final

from lmdbitmap.nbd import protocol as nbd
from lmdbitmap.nbd.client.link import Request

CHANGES: Final = (nbd.NBD_CMD_WRITE, nbd.NBD_CMD_WRITE_ZEROES, nbd.NBD_CMD_TRIM)
_OVERHEAD: Final = 512
"""Bytes that a kept request costs beside its data."""


class Unflushed:
    """Changes that have to be written again on a new connection. For one thread at a time."""

    def __init__(self) -> None:
        self._changes: deque[Request] = deque()
        """Each one's `mark` is its number."""
        self.mark = 0
        """The number of the next change: a flush sent now covers those before it."""
        self.byte_count = 0

    def note(self, done: Request) -> None:
        """Record a finished request: keep a change; after a flush drop the changes that preceded it."""
        if done.command == nbd.NBD_CMD_FLUSH:
            self._let_go_before(done.mark)
        elif done.command in CHANGES:
            self._add(done)

    def _add(self, change: Request) -> None:
        """Keep a change, without FAST_ZERO: the zeroes are promised by now, and may be written at any speed."""
        change.flags &= ~nbd.NBD_CMD_FLAG_FAST_ZERO
        change.mark = self.mark
        self._changes.append(change)
        self.mark += 1
        self.byte_count += _cost(change)

    def _let_go_before(self, mark: int) -> None:
        """Each change has a number of its own: an interruption between two lines cannot shift those of others."""
        while self._changes and self._changes[0].mark < mark:
            self.byte_count -= _cost(self._changes.popleft())

    def changes(self) -> list[Request]:
        return list(self._changes)


def _cost(change: Request) -> int:
    return len(change.data) + _OVERHEAD
