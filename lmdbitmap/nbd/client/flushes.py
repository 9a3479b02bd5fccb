"""The flushes of one far image, those of callers and our own, and what it means that one failed.

**A flush that failed is final**, whoever wanted it: the server's kernel may have told of lost data for the last time
(flushing.py), and another flush would succeed without the data. All that follow fail, on whatever connection, until
the image is opened anew; whoever asked to be told of it is told at once.

They are sent one at a time, so that none succeeds beside the one that took the error. One of our own is waited for by
nobody but the flush that comes after it.

A server that only writes through (FUA) flushes with each change, and many of those at a time: one that fails is a flush
that failed, unless its error is about the request.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from lmdbitmap.nbd import protocol as nbd
from lmdbitmap.nbd.client.errors import refusal
from lmdbitmap.nbd.client.link import Call, Request

_NOT_OF_THE_DISK: Final = (nbd.NBD_EPERM, nbd.NBD_EINVAL, nbd.NBD_ENOTSUP, nbd.NBD_EOVERFLOW)
"""Errors about a request, of which nothing was done."""


class Talk(Protocol):
    """How requests are sent, and answers come: conversation.py."""

    def ask(self, requests: Sequence[Request]) -> None: ...
    def post(self, call: Call, requests: Sequence[Request]) -> None: ...
    def wait_for(self, call: Call, requests: Sequence[Request]) -> None: ...
    def is_unanswered(self, request: Request) -> bool: ...


class Flushes:
    """Safe for many threads."""

    def __init__(self, talk: Talk, name: str) -> None:
        self._talk = talk
        self._name = name
        self._turn = threading.Lock()
        self._own: Request | None = None
        """The newest that nobody asked for."""
        self._failure = 0
        """The error of the first flush that failed; 0 if none did."""
        self.tell_of_loss: Callable[[OSError], None] = _nobody
        """Called when the first one failed, by whichever thread hears of it."""

    def flush(self) -> Request:
        """One that was sent after all of this: answered, and perhaps refused. Raises if one failed before."""
        flush = Request(nbd.NBD_CMD_FLUSH)
        with self._turn:
            own = self._own_under_way()
            if own is not None and own.call is not None:
                self._talk.wait_for(own.call, [own])
            self.require_sound()
            self._talk.ask([flush])
        return flush

    def begin_one(self) -> None:
        """See to it that one is under way, if that is of any use."""
        if self._failure or not self._turn.acquire(blocking=False):
            return
        try:
            if self._own_under_way() is None:
                self._own = Request(nbd.NBD_CMD_FLUSH)
                self._talk.post(Call(1), [self._own])
        finally:
            self._turn.release()

    def judge(self, flush: Request) -> None:
        """It was answered. None succeeds any more once one has failed."""
        if flush.error:
            self.lose(flush.error)
        flush.error = self._failure

    def judge_written_through(self, change: Request) -> None:
        """It failed on a server that has no flush: the news may be of any change that was under way beside it."""
        if change.error not in _NOT_OF_THE_DISK:
            self.lose(change.error)

    def lose(self, error: int) -> None:
        """Something that was acknowledged may never be on stable storage."""
        if not self._failure:
            self._failure = error
            self.tell_of_loss(refusal(error, self._name))

    def require_sound(self) -> None:
        """Raise as the flush that failed did, if one did."""
        if self._failure:
            raise refusal(self._failure, self._name)

    def _own_under_way(self) -> Request | None:
        """Called with `_turn` held: no other one begins meanwhile."""
        return self._own if self._own is not None and self._talk.is_unanswered(self._own) else None


def _nobody(_: OSError) -> None:
    """Who is told of a loss where nobody asked to be: each flush that follows says it too."""
