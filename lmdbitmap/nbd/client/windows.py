"""Splits many requests, to be sent on a new connection, into windows that may be in flight together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from lmdbitmap.nbd import protocol as nbd
from lmdbitmap.nbd.client.link import WINDOW, Request

_ANSWERED_WITH_DATA: Final = (nbd.NBD_CMD_READ, nbd.NBD_CMD_BLOCK_STATUS)


def apart(changes: Iterable[Request]) -> Iterator[list[Request]]:
    """Yield windows of changes that do not overlap: a server does what is in flight in any order."""
    window: list[Request] = []
    for change in changes:
        start, stop = change.offset, change.offset + change.length
        if len(window) == WINDOW or any(
            one.offset < stop and start < one.offset + one.length for one in window
        ):
            yield window
            window = []
        window.append(change)
    if window:
        yield window


def of_a_kind(requests: Iterable[Request]) -> Iterator[list[Request]]:
    """Yield windows of requests that all send data, or all receive data: see `WINDOW`."""
    by_kind: dict[bool, list[Request]] = {False: [], True: []}
    for request in requests:
        by_kind[request.command in _ANSWERED_WITH_DATA].append(request)
    for kind in by_kind.values():
        for start in range(0, len(kind), WINDOW):
            yield kind[start : start + WINDOW]
