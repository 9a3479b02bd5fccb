"""WRITEs that are done piece by piece as their data arrives: the first pieces while the client sends the rest.

- Pieces end on multiples of `_PIECE`, so that no page and hardly a block is written in two halves.
- If the disk has a descriptor, the data goes from the socket into the image by reference (splicing.py), which saves a
  copy. It must then not be in the inbox already when the WRITE is recognized. So behind such a WRITE the next header is
  received by itself, until a request of another kind comes. Replies that wait then are sent before the thread sleeps.
"""

from __future__ import annotations

import errno
from typing import Final

from lmdbitmap.nbd import protocol as nbd
from lmdbitmap.nbd.server.disk_operations import DiskOperations
from lmdbitmap.nbd.server.inbox import Inbox
from lmdbitmap.nbd.server.replies import Replies
from lmdbitmap.nbd.server.splicing import SplicePipe

LONG_FROM: Final = 128 << 10
"""Bytes from which a WRITE is long."""
_PIECE: Final = 64 << 10
_PAGE: Final = 4096


class LongWrites:
    """The long WRITEs of one connection. `pipe` is None if their data cannot travel by reference."""

    def __init__(
        self, inbox: Inbox, operations: DiskOperations, replies: Replies, pipe: SplicePipe | None
    ) -> None:
        self._inbox = inbox
        self._operations = operations
        self._replies = replies
        self._pipe = pipe

    @property
    def by_reference(self) -> bool:
        return self._pipe is not None

    def perform(self, request: nbd.Request, header_size: int, error: int) -> int:
        """Do the WRITE whose header is first in the inbox. Drain its data if there is an `error`. Return the error."""
        inbox = self._inbox
        inbox.take(header_size)
        offset, left = request.offset, request.payload
        if self._pipe is not None and not error and self._pipe.opens():
            inbox.appetite = header_size
            error, offset, left = self._splice(self._pipe, offset, left)
        while left:
            at_hand = inbox.at_hand
            ready = left if at_hand == left else at_hand - (offset + at_hand) % _PIECE
            if ready > 0:
                data = inbox.take(ready)
                error = error or self._operations.write(offset, data)
                offset, left = offset + ready, left - ready
            else:
                self._replies.send()
                if not inbox.receive_part(left):
                    raise ConnectionResetError(errno.ECONNRESET, "the client left in the middle of a WRITE")
        inbox.move_to_front()
        if request.flags & nbd.NBD_CMD_FLAG_FUA:
            error = error or self._operations.flush()
        return error

    def close(self) -> None:
        if self._pipe is not None:
            self._pipe.close()

    # -- by reference --------------------------------------------------------------------------------------

    def _splice(self, pipe: SplicePipe, offset: int, left: int) -> tuple[int, int, int]:
        """Write the bytes at hand, and the rest by reference.

        Pieces end where pages do: a death between two of them must not tear a sector. Returns the error or 0, and the
        offset and number of bytes that are left to drain after an error.
        """
        inbox = self._inbox
        at_hand = inbox.at_hand
        whole = max(at_hand - (offset + at_hand) % _PAGE, 0)
        error = self._operations.write(offset, inbox.take(whole)) if whole else 0
        rest = inbox.take(at_hand - whole)
        if not error:
            pipe.put(rest)
        offset, missing = offset + whole, left - at_hand
        while missing and not error:
            missing -= self._fill(pipe, missing)
            ready = pipe.held
            if missing:
                ready -= (offset + ready) % _PAGE
            if ready > 0:
                error = self._operations.write_held(pipe, ready, offset)
                offset += ready
        return error, offset, missing

    def _fill(self, pipe: SplicePipe, limit: int) -> int:
        """Receive some of the WRITE's data. A client that waits for replies before it sends more gets them first."""
        count = pipe.fill(limit, wait=not self._replies.waiting)
        if count < 0:
            self._replies.send()
            count = pipe.fill(limit)
        self._inbox.bytes_received += count
        return count
