"""Asks the process that holds a snapshot which blocks were kept aside: the other side of kept_context.py.

Unlike allocation, nothing here is advice: a missing answer is an error, never "not kept".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final

from lmdbitmap.errors import NotFound
from lmdbitmap.nbd import protocol as nbd
from lmdbitmap.nbd.client.conversation import Conversation
from lmdbitmap.nbd.client.link import WINDOW, Link, Request

_MOST_BYTES: Final = 64 << 20
"""Bytes per question. After a partial answer the rest is asked again."""


class KeptQuestion:
    """Questions about one export, on a connection whose BLOCK_STATUS reports `lmdbitmap:kept`. For many threads.

    Errors say `name`. Raises `NotFound` if the export has no such context.
    """

    def __init__(self, connect: Callable[[], Link], name: str, *, silence_s: float | None = None) -> None:
        self._name = name
        self.guests_are_quiet = False
        """As the last answer said."""
        self._conversation = Conversation(connect, name, reconnect_s=0, keep_bytes=0, silence_s=silence_s)
        if self._conversation.export.context_id is None:
            self._conversation.close()
            raise NotFound(f"{name} has no {nbd.LMDBITMAP_META_KEPT}", next_step="read all of it there")

    def ask(self, ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Return which of these (offset, length), just read from the image, must be read again; both in ascending
        order.

        Raises `OSError` if that cannot be known.
        """
        found: list[tuple[int, int]] = []
        left = [part for offset, length in ranges for part in _parts(offset, length)]
        while left:
            requests = [Request(nbd.NBD_CMD_BLOCK_STATUS, *part) for part in left[:WINDOW]]
            self._conversation.do(requests)
            rest = [part for request in requests for part in self._take(request, found)]
            left = [*rest, *left[WINDOW:]]
        return sorted(found)

    def _take(self, request: Request, found: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
        """Add the kept ranges to `found`; yield the end of the question's range if the answer does not reach it."""
        if request.error or request.statuses is None:
            raise self._conversation.failure(request)
        position, end = request.offset, request.offset + request.length
        for length, status in request.extents():
            stop = min(position + length, end)
            self.guests_are_quiet = bool(status & nbd.LMDBITMAP_STATE_QUIET)
            if status & nbd.LMDBITMAP_STATE_KEPT and position < stop:
                found.append((position, stop - position))
            position = stop
        if position < end:
            yield position, end - position

    def interrupt(self) -> None:
        """Make waiting threads stop waiting. Callable from any thread; close it then."""
        self._conversation.interrupt()

    def close(self) -> None:
        self._conversation.close()


def _parts(offset: int, length: int) -> Iterator[tuple[int, int]]:
    for start in range(0, length, _MOST_BYTES):
        yield offset + start, min(_MOST_BYTES, length - start)
