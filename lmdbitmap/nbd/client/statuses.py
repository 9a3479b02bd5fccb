"""Block status of long ranges: many questions travel together while the answers are short.

On a disk that is uniform over long ranges the round trips take the time: 64 TiB are 65,536 questions.

All answers to questions sent together are held at once. Together they have no more extents than one answer may have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final

from lmdbitmap.nbd import protocol as nbd
from lmdbitmap.nbd.client.link import MOST_EXTENTS, Request

_MOST_QUESTIONS: Final = 64
_SHORT_ANSWER: Final = 16 * nbd.BLOCK_DESCRIPTOR.size
"""If answers are longer than this, round trips are not what takes the time."""


def statuses(
    ask: Callable[[Sequence[Request]], None], start: int, stop: int, most_bytes: int
) -> Iterator[tuple[int, int]]:
    """Yield (length, flags) of [start, stop), as far as the server answers; an error or a missing answer ends it.

    `ask` returns when all its questions are answered; each is about at most `most_bytes`.
    """
    together = 1
    while start < stop:
        ends = range(start, min(start + together * most_bytes, stop), most_bytes)
        most = MOST_EXTENTS // len(ends)
        requests = [
            Request(nbd.NBD_CMD_BLOCK_STATUS, at, min(stop - at, most_bytes), most_extents=most)
            for at in ends
        ]
        ask(requests)
        for request in requests:
            if request.error or request.statuses is None:
                return
            for length, flags in _within(request):
                yield length, flags
                start += length
            if start < request.offset + request.length:  # the rest is asked about anew
                together = 0
                break
        is_short = all(len(request.statuses or b"") <= _SHORT_ANSWER for request in requests)
        together = max(min(2 * together, _MOST_QUESTIONS), 1) if is_short else 1


def _within(request: Request) -> Iterator[tuple[int, int]]:
    """Yield the extents, clipped to the range: the last one may extend past it."""
    left = request.length
    for length, flags in request.extents():
        if left > 0:
            yield min(length, left), flags
        left -= length
