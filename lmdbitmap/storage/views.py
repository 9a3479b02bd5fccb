"""Counts the open views of an environment, and lets one thread wait until there are none.

LMDB wants no transaction of the process open while its map is resized, or its handle opened anew.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator

_INTERRUPTED_LOOK_S = 0.1
"""How often to look for views that ended without a word."""


class View:
    """An open transaction, and its thread. It counts for as long as it lives, also if it is not counted out in the end,
    as Ctrl-C may come before that.
    """

    __slots__ = ("__weakref__", "thread")

    def __init__(self) -> None:
        self.thread = threading.get_ident()


class Views:
    """The views that are open now. Safe for many threads."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        """For `with`. That of the condition could be interrupted by a signal right before it lets go of the lock."""
        self._changed = threading.Condition(self._lock)
        self._open: weakref.WeakSet[View] = weakref.WeakSet()
        self._is_closed = False
        """Whether a thread waits until there are none, or has waited."""
        self._alone: int | None = None
        """The thread that has waited."""

    def enter(self, view: View) -> None:
        """Count a view, when no other thread wants there to be none."""
        with self._lock:
            self._changed.wait_for(lambda: not self._is_closed or self.are_mine())
            self._open.add(view)

    def leave(self, view: View) -> None:
        with self._lock:
            self._open.discard(view)
            self._changed.notify_all()

    def are_mine(self) -> bool:
        """Whether the calling thread has a view open, or none but its own are: so that it must not wait for others."""
        mine = threading.get_ident()
        with self._lock:
            return self._alone == mine or any(view.thread == mine for view in self._open)

    @contextlib.contextmanager
    def none_but_mine(self) -> Iterator[None]:
        """Wait until no view is open. In the block, only this thread can open any; others wait.

        For a thread without a view: its own would be waited for, too.
        """
        with self._lock:
            try:
                self._is_closed = True
                while not self._changed.wait_for(lambda: not any(self._open), _INTERRUPTED_LOOK_S):
                    pass
                self._alone = threading.get_ident()
                yield
            finally:
                self._alone = None
                self._is_closed = False
                self._changed.notify_all()
