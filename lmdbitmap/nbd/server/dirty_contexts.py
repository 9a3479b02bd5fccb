"""`qemu:dirty-bitmap:CHECKPOINT`: what changed since each checkpoint, under the names that NBD clients know.

A status is 1 for dirty and 0 for clean, and 0 is said of what cannot differ from the checkpoint only. Where
that is not known the answer is dirty (the bitmap is untrusted) or an error (the checkpoint is gone, or of an
older epoch). The answer holds at the moment of the question; a client that wants one moment for the whole
disk asks of a snapshot, which answers up to its own checkpoint.

A client picks its contexts by name, once; what it is told later is about that very checkpoint, and not about
another one of the same name.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Final, Protocol

from lmdbitmap.errors import LmdbitmapError, NotFound
from lmdbitmap.filter import Filter
from lmdbitmap.geometry import ceil_div
from lmdbitmap.interfaces import ServedDisk
from lmdbitmap.nbd import protocol as nbd
from lmdbitmap.nbd.server.contexts import StatusSource, base_contexts, question
from lmdbitmap.nbd.server.kept_context import kept_source
from lmdbitmap.storage.schema import Checkpoint
from lmdbitmap.tracker import chain
from lmdbitmap.tracker.changes import Changes
from lmdbitmap.tracker.snapshot import Snapshot

_log = logging.getLogger(__name__)

NAMESPACE: Final = "qemu:dirty-bitmap:"
DIRTY: Final = 1
CLEAN: Final = 0


def tracked_contexts(name: str, disk: ServedDisk) -> Mapping[str, StatusSource]:
    """What a tracked disk can say at this moment: where it is allocated, and what changed since when.

    Of a snapshot also what was kept aside for it.
    """
    contexts = dict(base_contexts(name, disk))
    if isinstance(disk, (Filter, Snapshot)):
        changes_since = _Asked(disk) if isinstance(disk, Filter) else disk.changes
        for checkpoint in _checkpoints(disk):
            contexts[NAMESPACE + checkpoint.name] = _dirty_source(disk, checkpoint, changes_since)
    if isinstance(disk, Snapshot):
        contexts[nbd.LMDBITMAP_META_KEPT] = kept_source(disk)
    return contexts


class _ChangesSince(Protocol):
    def __call__(self, *, since: str) -> Changes: ...


class _Asked:
    """An attached disk that writes down what it knows once for all contexts of one question: doing so disarms what
    a guest is writing to, so that its next write there has to wait for a commit."""

    def __init__(self, disk: Filter) -> None:
        self._disk = disk
        self._persisted_for: object | None = None

    def __call__(self, *, since: str) -> Changes:
        asked = question()
        if asked is not None and asked is self._persisted_for:
            return self._disk.changes(since=since, persist=False)
        answer = self._disk.changes(since=since)
        self._persisted_for = asked
        return answer


def _dirty_source(
    disk: Filter | Snapshot, checkpoint: Checkpoint, changes_since: _ChangesSince
) -> StatusSource:
    """What changed since `checkpoint`; raises what `Filter.changes` does, and `NotFound` once another has its name."""

    def source(offset: int, length: int) -> Iterator[tuple[int, int]]:
        answer = changes_since(since=checkpoint.name)
        if answer.since.uuid != checkpoint.uuid:
            raise NotFound(
                f"checkpoint {checkpoint.name!r} of disk {disk.disk.name!r} was forgotten, and another has its name",
                next_step="connect again",
            )
        return _statuses(answer, offset, length)

    return source


def _checkpoints(disk: Filter | Snapshot) -> list[Checkpoint]:
    """Those of the disk's epoch, older ones can no longer be asked; of a snapshot, those before its own.

    None if the store cannot be read.
    """
    try:
        with disk.store.read() as reader:
            members = chain.epoch_chain(reader, reader.disk(disk.disk.uuid) or disk.disk)
    except LmdbitmapError as error:
        _log.warning("disk %s is served without its dirty bitmaps: %s", disk.disk.name, error)
        return []
    if isinstance(disk, Filter):
        return members
    return [
        member
        for member in members
        if member.epoch == disk.checkpoint.epoch and member.sequence < disk.checkpoint.sequence
    ]


def _statuses(answer: Changes, offset: int, length: int) -> Iterator[tuple[int, int]]:
    """(bytes, status) of [offset, offset + length) without a gap; a block that the range cuts is cut."""
    shift, end = answer.geometry.granularity_bits, offset + length
    position = offset
    for start, stop in answer.runs(offset >> shift, ceil_div(end, 1 << shift)):
        dirty_from, dirty_to = max(start << shift, offset), min(stop << shift, end)
        if position < dirty_from:
            yield dirty_from - position, CLEAN
        yield dirty_to - dirty_from, DIRTY
        position = dirty_to
    if position < end:
        yield end - position, CLEAN
