"""Asks the process that holds a snapshot what of it was kept aside: the other side of kept_context.py.

Unlike where a disk is allocated, nothing here is advice: what is not answered is an error, never "not kept".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final

from lmdbitmap.errors import NotFound
from lmdbitmap.nbd import protocol as nbd
from lmdbitmap.nbd.client.conversation import Conversation
from lmdbitmap.nbd.client.link import WINDOW, Link, Request

_MOST_BYTES: Final = 64 << 20
"""Asked at once. A client that is told of a part only asks for the rest."""


class KeptQuestion:
    """Of one export, on a connection whose BLOCK_STATUS tells of `lmdbitmap:kept`. For many threads.

    Errors say `name`. Raises `NotFound` where the export has no such context.
    """

    def __init__(self, connect: Callable[[], Link], name: str, *, silence_s: float | None = None) -> None:
        self._name = name
        self.guests_are_quiet = False
        """As the last answer had it."""
        self._conversation = Conversation(connect, name, reconnect_s=0, keep_bytes=0, silence_s=silence_s)
        if self._conversation.export.context_id is None:
            self._conversation.close()
            raise NotFound(f"{name} has no {nbd.LMDBITMAP_META_KEPT}", next_step="read all of it there")

    def ask(self, ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """What of these (offset, length), just read from the image, has to be read once more, ascending as they are.

        Raises `OSError` where nobody can say.
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
        """Add what was kept to `found`; the end of the range, if the answer does not go so far."""
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
        """From any thread: whoever waits for an answer waits no more. Close it then."""
        self._conversation.interrupt()

    def close(self) -> None:
        self._conversation.close()


def _parts(offset: int, length: int) -> Iterator[tuple[int, int]]:
    for start in range(0, length, _MOST_BYTES):
        yield offset + start, min(_MOST_BYTES, length - start)
