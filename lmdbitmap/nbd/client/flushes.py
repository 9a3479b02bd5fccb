"""The flushes of one far image, those of callers and our own, and what a failed one means.

**A flush that failed is final**, whoever asked for it: the server's kernel may have reported lost data for the last
time (flushing.py), and another flush would succeed without the data. All later flushes fail, on any connection, until
the image is opened anew. The loss callback is called at once.

Flushes are sent one at a time, so that none succeeds beside the one that took the error. Only the next flush waits for
one of our own.

A server that only writes through (FUA) flushes with each change, and many at a time. A change that fails there is a
flush that failed, unless its error is about the request.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from lmdbitmap.nbd import protocol as nbd
from lmdbitmap.nbd.client.errors import refusal
from lmdbitmap.nbd.client.link import Call, Request

_NOT_OF_THE_DISK: Final = (nbd.NBD_EPERM, nbd.NBD_EINVAL, nbd.NBD_ENOTSUP, nbd.NBD_EOVERFLOW)
"""Errors about a request, of which nothing was done."""


class Talk(Protocol):
    """How requests are sent and answers received: conversation.py."""

    def ask(self, requests: Sequence[Request]) -> None: ...
    def post(self, call: Call, requests: Sequence[Request]) -> None: ...
    def wait_for(self, call: Call, requests: Sequence[Request]) -> None: ...
    def is_unanswered(self, request: Request) -> bool: ...


class Flushes:
    """The flushes of one far image. Safe for many threads."""

    def __init__(self, talk: Talk, name: str) -> None:
        self._talk = talk
        self._name = name
        self._turn = threading.RLock()
        self._own: Request | None = None
        """The newest flush of our own."""
        self._failure = 0
        """The error of the first flush that failed; 0 if none did."""
        self.tell_of_loss: Callable[[OSError], None] = _nobody
        """Called when the first flush failed, in the thread that learns of it."""

    def flush(self) -> Request:
        """Send a flush after everything before; return it answered, perhaps refused. Raise if a flush failed before."""
        flush = Request(nbd.NBD_CMD_FLUSH)
        with self._turn:
            own = self._own_under_way()
            if own is not None and own.call is not None:
                self._talk.wait_for(own.call, [own])
            self.require_sound()
            self._talk.ask([flush])
        return flush

    def begin_one(self) -> None:
        """Have a flush of our own under way, if that is of any use."""
        try:
            if not self._failure and self._turn.acquire(blocking=False):
                if self._own_under_way() is None:
                    self._own = Request(nbd.NBD_CMD_FLUSH)
                    self._talk.post(Call(1), [self._own])
                self._turn.release()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # interrupted while it was not this thread's
                self._turn.release()
            raise

    def judge(self, flush: Request) -> None:
        """Judge an answered flush. None succeeds any more once one has failed."""
        if flush.error:
            self.lose(flush.error)
        flush.error = self._failure

    def judge_written_through(self, change: Request) -> None:
        """Judge a failed change on a server without flush: its error may be about any change under way beside it."""
        if change.error not in _NOT_OF_THE_DISK:
            self.lose(change.error)

    def lose(self, error: int) -> None:
        """Record that acknowledged data may never reach stable storage."""
        if not self._failure:
            self._failure = error
            self.tell_of_loss(refusal(error, self._name))

    def require_sound(self) -> None:
        """Raise the error of the flush that failed, if one did."""
        if self._failure:
            raise refusal(self._failure, self._name)

    def _own_under_way(self) -> Request | None:
        """Return our own flush if it is unanswered. Called with `_turn` held, so that no other begins meanwhile."""
        return self._own if self._own is not None and self._talk.is_unanswered(self._own) else None


def _nobody(_: OSError) -> None:
    """Ignore a loss, by default: every later flush raises anyway."""
