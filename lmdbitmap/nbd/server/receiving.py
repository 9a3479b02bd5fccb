"""Receiving from a busy client without falling asleep between its requests.

A thread that sleeps in `recv` runs again tens of microseconds after the bytes arrive. That is several times what a
small request takes, and in a virtual machine with an idle processor more than the rest of the request. So the thread
polls for a moment before it sleeps. Polling does not pay if the client is idle or needs this very processor; it soon
stops then: after every poll in vain twice as many waits go straight to sleep before the next poll, up to `_MOST_NAPS`.
Nor does it pay while other threads serve busy connections: each poll takes the interpreter's lock from them.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Final, Generic, TypeVar

_LOOK_S: Final = 50e-6
_MOST_NAPS: Final = 64
_FOR_EVER: Final = 1 << 62

Found = TypeVar("Found")


class Lookout(Generic[Found]):
    """Waits for something: `look` returns None while it is not there, and `sleep` returns when it is."""

    def __init__(
        self, look: Callable[..., Found | None], sleep: Callable[..., Found], *, blind: bool = False
    ) -> None:
        self._look = look
        self._sleep = sleep
        self._naps_left = _FOR_EVER if blind else 0
        self._next_naps = 1
        self.polls = True
        """False while another connection has a thread of its own, too."""

    def wait(self, *args: object) -> Found:
        if self._naps_left or not self.polls:
            self._naps_left = max(self._naps_left - 1, 0)
            return self._sleep(*args)
        found = self._look(*args)
        if found is None:
            found = self._look_for_a_moment(*args)
        if found is not None:
            self._next_naps = 1
            return found
        self._naps_left = self._next_naps
        self._next_naps = min(2 * self._next_naps, _MOST_NAPS)
        return self._sleep(*args)

    def _look_for_a_moment(self, *args: object) -> Found | None:
        look, now = self._look, time.perf_counter
        stop = now() + _LOOK_S
        while now() < stop:
            found = look(*args)
            if found is not None:
                return found
        return None


class Receiver:
    """The incoming half of a blocking socket. An encrypted socket cannot be polled, so its thread sleeps."""

    def __init__(self, sock: socket.socket, *, encrypted: bool = False) -> None:
        self._recv_into = sock.recv_into
        self.lookout = Lookout(self.receive_at_once, self._recv_into, blind=encrypted)
        self.receive = self.lookout.wait
        """Wait for bytes and put them into a buffer; return their number, 0 when the client is gone."""

    def receive_at_once(self, buffer: memoryview) -> int | None:
        """Receive the bytes that are there, like `receive`, or return None. Not for an encrypted socket."""
        try:
            return self._recv_into(buffer, 0, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
