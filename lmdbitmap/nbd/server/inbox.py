"""What a client has sent and what is not served yet: the incoming half of the hot loop."""

from __future__ import annotations

import socket
from typing import Final

from lmdbitmap.nbd.server.receiving import Receiver
from lmdbitmap.work.buffers import new_buffer

BATCH_BYTES: Final = 512 << 10
"""Bytes received before they are served: few enough to stay in a core's cache until they are written."""


class Inbox:
    """`view[start:end]` are the bytes at hand. `received` is what came behind the handshake.

    The hot loop reads `start` and `end` itself, and moves `start` behind what it has served.
    """

    def __init__(self, sock: socket.socket, *, received: bytes = b"", encrypted: bool = False) -> None:
        self.buffer = new_buffer(BATCH_BYTES)
        self.view = memoryview(self.buffer)
        self.buffer[: len(received)] = received
        self.start, self.end = 0, len(received)
        self.bytes_received = len(received)
        receiver = Receiver(sock, encrypted=encrypted)
        self._receive, self._receive_at_once = receiver.receive, receiver.receive_at_once
        self.lookout = receiver.lookout

    @property
    def at_hand(self) -> int:
        """Bytes at hand."""
        return self.end - self.start

    def receive(self) -> bool:
        """Wait for more bytes. Return False when the client is gone."""
        return self._received(self._receive(self._room()))

    def receive_at_once(self) -> bool | None:
        """Like `receive`, but return None if none are there."""
        count = self._receive_at_once(self._room())
        return None if count is None else self._received(count)

    def _room(self) -> memoryview:
        return self.view[self.end :]

    def _received(self, count: int) -> bool:
        self.end += count
        self.bytes_received += count
        return count > 0

    def take(self, count: int) -> memoryview:
        """Return the first bytes at hand, which count as served. They are valid until more are received."""
        start = self.start
        self.start = start + count
        return self.view[start : start + count]

    def make_room_for(self, needed: int) -> None:
        """Make room for an unfinished request of `needed` bytes, which begins at `start`."""
        if self.start == self.end or self.start + needed > BATCH_BYTES:
            self.move_to_front()

    def move_to_front(self) -> None:
        if self.start:
            at_hand = self.at_hand
            self.view[:at_hand] = self.view[self.start : self.end]
            self.start, self.end = 0, at_hand
