"""Writes of whole blocks and of parts of blocks, to a server whose smallest request is a block."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Edges:
    """Lets many write whole blocks at once; a write of parts of blocks runs alone."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        """For `with`. That of the condition could be interrupted by a signal right before it lets go of the lock."""
        self._changed = threading.Condition(self._lock)
        self._writers = 0
        self._mending = threading.Lock()

    @contextmanager
    def left_alone(self) -> Iterator[None]:
        """Write whole blocks in this context."""
        with self._mending, self._lock:
            self._writers += 1
        try:
            yield
        finally:
            with self._lock:
                self._writers -= 1
                self._changed.notify_all()

    @contextmanager
    def mended(self) -> Iterator[None]:
        """Write alone in this context, so that the surroundings of a write can be read and written back."""
        with self._mending, self._lock:
            self._changed.wait_for(lambda: self._writers == 0)
            yield
