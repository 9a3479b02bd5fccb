"""The requests that are rare enough to be done one at a time, and the rare ways in which the others end."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import Final

from lmdbitmap.interfaces import Lane
from lmdbitmap.nbd import protocol as nbd
from lmdbitmap.nbd.contexts import MAX_DESCRIPTORS, StatusSource, descriptors


def perform(
    request: nbd.Request, lane: Lane, contexts: Mapping[int, StatusSource], structured: bool
) -> bytes:
    """Do an allowed request that is no READ or WRITE of data, and return its reply; raises as the disk does."""
    if request.type == nbd.NBD_CMD_BLOCK_STATUS:
        return _block_status(request, contexts)
    if request.length:
        _change(request, lane)
    return success(request, structured)


def success(request: nbd.Request, structured: bool) -> bytes:
    """Done, and there is nothing to tell."""
    if structured and request.type == nbd.NBD_CMD_READ:
        return nbd.structured_reply(request.cookie, nbd.NBD_REPLY_TYPE_NONE)
    return nbd.simple_reply(request.cookie)


def failure(request: nbd.Request, error: int, structured: bool) -> bytes:
    """Where structured replies are agreed on, these two types must use them for errors too."""
    if structured and request.type in _ANSWERED_IN_CHUNKS:
        return nbd.structured_reply(request.cookie, nbd.NBD_REPLY_TYPE_ERROR, nbd.error_payload(error))
    return nbd.simple_reply(request.cookie, error)


_ANSWERED_IN_CHUNKS: Final = frozenset({nbd.NBD_CMD_READ, nbd.NBD_CMD_BLOCK_STATUS})


def _change(request: nbd.Request, lane: Lane) -> None:
    flags = request.flags
    if request.type == nbd.NBD_CMD_TRIM:
        lane.discard(request.offset, request.length)
    elif request.type == nbd.NBD_CMD_WRITE_ZEROES:
        lane.write_zeroes(
            request.offset,
            request.length,
            may_unmap=not flags & nbd.NBD_CMD_FLAG_NO_HOLE,
            fast_only=bool(flags & nbd.NBD_CMD_FLAG_FAST_ZERO),
        )
    if flags & nbd.NBD_CMD_FLAG_FUA and request.type != nbd.NBD_CMD_CACHE:
        lane.flush()


def _block_status(request: nbd.Request, contexts: Mapping[int, StatusSource]) -> bytes:
    """One chunk per selected context. All are asked before anything is sent: an error must not follow data."""
    limit = 1 if request.flags & nbd.NBD_CMD_FLAG_REQ_ONE else MAX_DESCRIPTORS
    payloads = []
    for context_id, source in contexts.items():
        found = descriptors(source, request.offset, request.length, limit)
        if not found:
            raise OSError(errno.EIO, "a metadata context said nothing")
        payloads.append(nbd.block_status_payload(context_id, found))
    last = len(payloads) - 1
    return b"".join(
        nbd.structured_reply(request.cookie, nbd.NBD_REPLY_TYPE_BLOCK_STATUS, payload, done=index == last)
        for index, payload in enumerate(payloads)
    )
