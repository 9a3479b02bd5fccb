"""`qemu:dirty-bitmap:CHECKPOINT`: the changes since each checkpoint, under the names that NBD clients know.

Status 1 means dirty, 0 clean. Only blocks that cannot differ from the checkpoint are answered 0. Unknown means dirty
(the bitmap is untrusted) or an error (the checkpoint is gone, or of an older epoch). The answer holds at the moment of
the question. A client that wants one moment for the whole disk asks a snapshot, which answers up to its own checkpoint.

A client picks its contexts by name, once. All later answers are about that very checkpoint, never about another one of
the same name.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Final, Protocol

from lmdbitmap.errors import Busy, LmdbitmapError, NotFound
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
    """The contexts of a tracked disk at this moment: its allocation, and its changes since each checkpoint.

    A snapshot also has the context for blocks kept aside.
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
    """Changes of an attached disk that persists its state once for all contexts of one question.

    Persisting disarms the regions a guest is writing to, so that its next write there has to wait for a commit.
    """

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
    """Status of changes since `checkpoint`. Raises as `Filter.changes`, `NotFound` once another has its name, and
    `Busy` for a range that no longer ends on the disk.
    """

    def source(offset: int, length: int) -> Iterator[tuple[int, int]]:
        answer = changes_since(since=checkpoint.name)
        if answer.since.uuid != checkpoint.uuid:
            raise NotFound(
                f"checkpoint {checkpoint.name!r} of disk {disk.disk.name!r} was forgotten, and another has its name",
                next_step="connect again",
            )
        if offset + length > answer.geometry.size:  # past its end no bit is set
            raise Busy(f"disk {disk.disk.name!r} was made smaller just now", next_step="ask again")
        return _statuses(answer, offset, length)

    return source


def _checkpoints(disk: Filter | Snapshot) -> list[Checkpoint]:
    """Checkpoints of the disk's epoch, as older ones cannot be asked; of a snapshot, only those before its own.

    Returns an empty list if the store cannot be read.
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
    """Yield (bytes, status) for [offset, offset + length) without a gap; blocks are clipped to the range."""
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
