"""Decides how a copy is brought up to date: the way that was asked for, or the next best and why.

    incremental    a bitmap says what changed since the checkpoint that the copy is at
    compare        no bitmap can say it: both are read, and what differs is written
    full           there is nothing to compare with: all data is written into a new file, which is sparse

The checkpoint that a target is at is believed if its note (sync_note.py) names it, the disk is of the same epoch and
has that checkpoint, and the target is what the note says it was: the same file, of the same size and mtime; or the same
block device in the same boot, to which the kernel counted no more writes. An NBD export shows none of that; what it
acknowledged is believed. After an interrupted sync the file or the device has to be the same, and a file no older than
it was, with that sync's mark: the writes since were ours then, and in blocks that are copied again.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

from lmdbitmap.interfaces import ImageIdentity
from lmdbitmap.notes.references import Reason
from lmdbitmap.notes.sync_note import At, Note
from lmdbitmap.storage.schema import Checkpoint, Disk
from lmdbitmap.store import Store
from lmdbitmap.syncs.target import SyncTarget
from lmdbitmap.tracker import chain

_SECTOR_BYTES = 512
_AN_OLDER_ONE = "the target's time of change went back, as if an older copy had been put in its place"
_NO_MARK = "the sync before was interrupted, and could not mark the target: later syncs would not be noticed"
_ANOTHER_MARK = "the sync before was interrupted, and another sync has begun to write the target since"


class SyncKind(enum.Enum):
    INCREMENTAL = "incremental"
    COMPARE = "compare"
    FULL = "full"


class SyncPlan(NamedTuple):
    """How a copy is brought up to date. `since` is the checkpoint that an incremental sync counts from.

    Any other kind has a reason, unless it was asked for.
    """

    kind: SyncKind
    since: Checkpoint | None = None
    reason: Reason | None = None


def plan_for(store: Store, disk: Disk, note: Note, target: SyncTarget, *, compare: bool) -> SyncPlan:
    since = None if note.at is None else _checkpoint_of(store, disk, note.at)
    unknown = _why_unknown(disk, note, since, target)
    if unknown is None and not compare:
        return SyncPlan(SyncKind.INCREMENTAL, since)
    kind = SyncKind.FULL if target.is_blank else SyncKind.COMPARE
    return SyncPlan(kind, reason=None if kind is SyncKind.COMPARE and compare else unknown)


def _checkpoint_of(store: Store, disk: Disk, at: At) -> Checkpoint | None:
    with store.read() as reader:
        members = chain.epoch_chain(reader, disk)
    return next((member for member in members if member.uuid == at.checkpoint), None)


def _why_unknown(disk: Disk, note: Note, since: Checkpoint | None, target: SyncTarget) -> Reason | None:
    if not note.is_of_a_copy:
        return Reason(
            "first-sync",
            "the disk was never synced to this target, or that was restored onto or tracked since",
        )
    if target.device is None:
        return Reason("target-gone", "the copy no longer exists")
    if note.at is None:
        return Reason(
            "interrupted", "the sync before was interrupted, and it is not known what it left to do"
        )
    if note.at.epoch != disk.epoch:
        return Reason("new-epoch", disk.epoch_reason)
    if since is None:
        return Reason("checkpoint-forgotten", f"checkpoint {note.at.name} was forgotten")
    gap = (
        None if target.is_far else gap_between(note.at.identity, target.identity(), under_way=note.under_way)
    )
    if gap is not None:
        return Reason("target-older" if gap is _AN_OLDER_ONE else "target-changed", gap)
    if note.under_way and target.is_file and (note.mark is None or not target.bears(note.mark)):
        return Reason("interrupted", _NO_MARK if note.mark is None else _ANOTHER_MARK)
    return None


def gap_between(before: ImageIdentity | None, now: ImageIdentity | None, *, under_way: bool) -> str | None:
    """Return why others may have written to a file or a device since it was noted; None if they did not."""
    if before is None or now is None:
        return "nothing was noted of the target by which it could be known again"
    if (before.device, before.inode) != (now.device, now.inode):
        return "the target is another file or device than the one that was synced"
    if now.is_block_device:
        return _gap_of_device(before, now, under_way)
    if under_way:
        return _AN_OLDER_ONE if now.mtime_ns < before.mtime_ns else None
    if (before.size, before.mtime_ns) == (now.size, now.mtime_ns):
        return None
    return "the target was written by somebody else since it was synced"


def _gap_of_device(before: ImageIdentity, now: ImageIdentity, under_way: bool) -> str | None:
    if before.trace is None or now.trace is None:
        return "the kernel does not tell whether the target was written since it was synced"
    if before.trace.boot_id != now.trace.boot_id:
        return "this machine was started since, and nothing tells whether the target was written before that"
    if (before.trace.disk_sequence, before.trace.label) != (now.trace.disk_sequence, now.trace.label):
        return "the target is another device than the one that was synced"
    written = now.trace.sectors_written - before.trace.sectors_written
    if under_way or (written == 0 and before.size == now.size):
        return None
    if before.size != now.size:
        return f"the target had {before.size} bytes when it was synced, and has {now.size}"
    return f"{written * _SECTOR_BYTES} bytes of the target were written by somebody else since it was synced"
