"""Writes of whole blocks and of parts of them, to a server whose smallest request is a block."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Edges:
    """Lets whole blocks be written by many at once, and parts of blocks by one alone."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._writers = 0
        self._mending = threading.Lock()

    @contextmanager
    def left_alone(self) -> Iterator[None]:
        """Whole blocks are written in the block."""
        with self._mending, self._changed:
            self._writers += 1
        try:
            yield
        finally:
            with self._changed:
                self._writers -= 1
                self._changed.notify_all()

    @contextmanager
    def mended(self) -> Iterator[None]:
        """Nobody else writes in the block, so that what surrounds a write can be read and written back."""
        with self._mending, self._changed:
            self._changed.wait_for(lambda: self._writers == 0)
            yield
