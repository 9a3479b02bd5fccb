"""Receiving from a client that is in full swing, without falling asleep between its requests.

A thread that sleeps in `recv` runs again tens of microseconds after the bytes are there: several times what a
small request takes, and in a virtual machine with an idle processor more than all the rest of it. So as long
as the client's bytes keep coming the thread looks again for a moment before it sleeps, and offers the
processor to whoever wants it at every look. A client that lets more than a moment pass counts as idle: then
the thread sleeps at once, and an idle connection costs nothing.
"""

from __future__ import annotations

import os
import socket
import time
from typing import Final

_LOOK_S: Final = 50e-6
_LIVELY_S: Final = 500e-6
"""A sleep shorter than this was not worth it: the client is in full swing again."""


class Inlet:
    """The incoming half of a blocking socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._recv_into = sock.recv_into
        self._lively = False

    def receive(self, buffer: memoryview) -> int:
        """Wait for bytes and put them into `buffer`; their number, 0 when the client is gone."""
        if self._lively:
            count = self._look(buffer)
            if count >= 0:
                return count
        asleep = time.perf_counter()
        count = self._recv_into(buffer)
        self._lively = time.perf_counter() - asleep < _LIVELY_S
        return count

    def _look(self, buffer: memoryview) -> int:
        """As `receive`, but -1 when nothing came in a moment."""
        recv_into, give_way, now = self._recv_into, os.sched_yield, time.perf_counter
        stop = now() + _LOOK_S
        while now() < stop:
            try:
                return recv_into(buffer, 0, socket.MSG_DONTWAIT)
            except BlockingIOError:
                give_way()
        return -1
