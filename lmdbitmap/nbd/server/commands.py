"""The requests that are rare enough to be done one at a time."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from lmdbitmap.interfaces import Lane
from lmdbitmap.nbd import protocol as nbd
from lmdbitmap.nbd.server.contexts import (
    MAX_DESCRIPTORS,
    Consequential,
    StatusSource,
    descriptors,
    one_question,
)
from lmdbitmap.nbd.server.forms import Form

PIECE_BYTES: Final = 1 << 30
"""Bytes zeroed or discarded in one go; writing out that many zeroes takes some seconds."""


class CutShortError(ConnectionAbortedError):
    """The server stops in the middle of a change.

    It is not answered: a client that asks again on its next connection has all of it done then, and its guest notices
    nothing. QEMU takes any answer for the outcome, NBD_ESHUTDOWN too, and the guest gets an error.
    """


def is_long(request: nbd.Request) -> bool:
    """Whether a request may take so long that replies that are ready should be sent first."""
    changes = request.type in (nbd.NBD_CMD_TRIM, nbd.NBD_CMD_WRITE_ZEROES)
    return changes and request.length > PIECE_BYTES


def perform(
    request: nbd.Request,
    lane: Lane,
    contexts: Mapping[int, StatusSource],
    form: Form,
    stopping: Callable[[], bool],
) -> bytes:
    """Do an allowed request other than a READ or WRITE of data, and return its reply. Raises as the disk does.

    A change of many pieces stops between two of them, with `CutShortError`, once `stopping` returns True.
    """
    if request.type == nbd.NBD_CMD_BLOCK_STATUS:
        return _block_status(request, contexts, form)
    if request.length:
        _change(request, lane, stopping)
    return form.outcome(request.type, form.label_of(request))


def _change(request: nbd.Request, lane: Lane, stopping: Callable[[], bool]) -> None:
    """Zero or discard in pieces: a checkpoint, or a stop, that waits for the lane to pause waits for at most one piece.

    For FAST_ZERO the first piece shows whether zeroing is fast; the others are then done at any speed.
    """
    flags = request.flags
    if request.type == nbd.NBD_CMD_TRIM:
        for offset, length in _pieces(request, stopping):
            lane.discard(offset, length)
    elif request.type == nbd.NBD_CMD_WRITE_ZEROES:
        for offset, length in _pieces(request, stopping):
            lane.write_zeroes(
                offset,
                length,
                may_unmap=not flags & nbd.NBD_CMD_FLAG_NO_HOLE,
                fast_only=bool(flags & nbd.NBD_CMD_FLAG_FAST_ZERO) and offset == request.offset,
            )
    if flags & nbd.NBD_CMD_FLAG_FUA and request.type != nbd.NBD_CMD_CACHE:
        lane.flush()


def _pieces(request: nbd.Request, stopping: Callable[[], bool]) -> Iterator[tuple[int, int]]:
    """Yield (offset, length); each piece but the last ends at a multiple of `PIECE_BYTES`."""
    offset, end = request.offset, request.offset + request.length
    while offset < end:
        length = min(PIECE_BYTES - offset % PIECE_BYTES, end - offset)
        yield offset, length
        offset += length
        if offset < end and stopping():
            raise CutShortError(
                errno.ESHUTDOWN, f"the server stops, and {end - offset} bytes of a change are not done"
            )


def _block_status(request: nbd.Request, contexts: Mapping[int, StatusSource], form: Form) -> bytes:
    """Answer with one chunk per selected context. Ask all before sending anything: an error must not follow data.

    Each answer is packed before the next is asked: descriptors take a dozen times as much memory as their packed form.
    All share the room of one reply, however many contexts a client selected.
    """
    _require_all_is_told(request, contexts)
    limit = 1 if request.flags & nbd.NBD_CMD_FLAG_REQ_ONE else MAX_DESCRIPTORS // len(contexts)
    label, last = form.label_of(request), len(contexts) - 1
    chunks = []
    with one_question():
        for index, (context_id, source) in enumerate(contexts.items()):
            chunks.append(form.status(label, context_id, _found(request, source, limit), done=index == last))
    return b"".join(chunks)


def _require_all_is_told(request: nbd.Request, contexts: Mapping[int, StatusSource]) -> None:
    """Refuse a question that could cut a consequential answer, or lose it because another context fails."""
    if any(isinstance(source, Consequential) for source in contexts.values()) and (
        len(contexts) > 1 or request.flags & nbd.NBD_CMD_FLAG_REQ_ONE
    ):
        raise OSError(errno.EINVAL, "one of its contexts has to be asked alone, and without REQ_ONE")


def _found(request: nbd.Request, source: StatusSource, limit: int) -> list[tuple[int, int]]:
    found = descriptors(source, request.offset, request.length, limit)
    if not found:
        raise OSError(errno.EIO, "a metadata context said nothing")
    return found
