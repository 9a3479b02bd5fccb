"""A WRITE that is done piece by piece as its data arrives: the first pieces while the client sends the rest.

Pieces end on multiples of `_PIECE`, so that no page and hardly a block is written in two halves. Such a WRITE waits for
nothing itself: the connection receives for it as it does for requests, and stays out of the rounds meanwhile.
"""

from __future__ import annotations

from typing import Final

from lmdbitmap.nbd import protocol as nbd
from lmdbitmap.nbd.server.disk_operations import DiskOperations
from lmdbitmap.nbd.server.inbox import Inbox

LONG_FROM: Final = 128 << 10
"""Bytes from which a WRITE is long."""
_PIECE: Final = 64 << 10


class LongWrite:
    """A WRITE under way, whose data follows in the inbox. With an `error` its data is drained and dropped."""

    def __init__(self, request: nbd.Request, inbox: Inbox, operations: DiskOperations, *, error: int) -> None:
        self.request = request
        self.error = error
        """The NBD error to answer with."""
        self._inbox = inbox
        self._operations = operations
        self._offset, self._left = request.offset, request.payload

    def goes_on(self) -> bool:
        """Write what has come. Return False once that is all; the answer is `error` then."""
        inbox = self._inbox
        at_hand = min(inbox.at_hand, self._left)
        if at_hand < self._left:
            at_hand = max(at_hand - (self._offset + at_hand) % _PIECE, 0)
        if at_hand:
            data = inbox.take(at_hand)
            self.error = self.error or self._operations.write(self._offset, data)
            self._offset, self._left = self._offset + at_hand, self._left - at_hand
        if self._left:
            return True
        if self.request.flags & nbd.NBD_CMD_FLAG_FUA:
            self.error = self.error or self._operations.flush()
        return False
