"""Checkpoints and snapshots of one disk, or of several at the same moment: how they are made, held, and forgotten.

All disks are frozen together, always in the same order, so that two threads that freeze the same disks cannot deadlock.
Before that each is frozen by itself: an image that hangs keeps no other disk's guest waiting. One behind a far server
may begin to hang only after that, without end, so these are frozen first. Their next periods begin in one transaction:
all have the checkpoint, or none has. Writes that wait meanwhile complete in the new periods (law 2).

The images are flushed after that, while writers go on. Only then is a checkpoint returned. If an image cannot be
flushed, the checkpoint is lost again: else a power cut could take back a write that the new period calls clean.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import NamedTuple

from lmdbitmap.errors import InvalidArgument, LmdbitmapError, StorageError
from lmdbitmap.geometry import Geometry
from lmdbitmap.storage.schema import Checkpoint, Disk
from lmdbitmap.store import Store, Writer
from lmdbitmap.tracker import chain
from lmdbitmap.tracker.scratch import Scratch, ScratchFile
from lmdbitmap.tracker.snapshot import Snapshot
from lmdbitmap.tracker.tracking import Following, Tracking, changed_together, detached_error, held_error

_CARRIED_REGIONS = 256
"""Most regions with extents armed from the start of a period: writers wait while records are made, some 4 µs each."""


def checkpoint(disks: Sequence[Tracking], name: str) -> list[Checkpoint]:
    """See `filter.take_checkpoint`."""
    checkpoints = _take_points(disks, name)
    _flush_images(disks, checkpoints)
    return checkpoints


def snapshot(disks: Sequence[Tracking], name: str, scratch: Scratch) -> list[Snapshot]:
    """See `filter.take_snapshot`."""
    _store_of(disks)

    def take(tracking: Tracking, checkpoint: Checkpoint) -> None:
        snapshots[tracking].checkpoint = checkpoint

    with contextlib.ExitStack() as on_failure:
        files = {tracking: on_failure.enter_context(closing(ScratchFile(scratch))) for tracking in disks}
        snapshots = {tracking: _unheld(tracking, files[tracking]) for tracking in disks}

        def prepare(tracking: Tracking) -> Sequence[Snapshot]:
            if snapshots[tracking].disk != tracking.disk:  # it was resized meanwhile, say
                snapshots[tracking] = _unheld(tracking, files[tracking])
            return [*tracking.snapshots, snapshots[tracking]]

        on_failure.callback(_release_all, snapshots)  # also if an interruption comes when they are held
        checkpoints = _take_points(disks, name, prepare, take)
        _flush_images(disks, checkpoints, on_failure.close)
        on_failure.pop_all()
    return [snapshots[tracking] for tracking in disks]


def _unheld(tracking: Tracking, file: ScratchFile) -> Snapshot:
    """Make a snapshot before the freeze: its memory takes most of a millisecond, for which writers would wait."""
    unheld = Snapshot(tracking.store, tracking.disk, tracking.device, file)
    unheld.before_release = functools.partial(tracking.let_go_of, unheld)
    return unheld


def _release_all(snapshots: Mapping[Tracking, Snapshot]) -> None:
    with contextlib.ExitStack() as each:  # each is released even if another fails
        for snapshot in snapshots.values():
            each.callback(snapshot.release)


def _take_points(
    disks: Sequence[Tracking],
    name: str,
    prepare: Callable[[Tracking], Sequence[Snapshot]] = lambda tracking: tracking.snapshots,
    take: Callable[[Tracking, Checkpoint], None] = lambda tracking, checkpoint: None,
) -> list[Checkpoint]:
    """Freeze all disks, and begin their next periods in one transaction.

    `prepare` returns the snapshots that are held from then on, and may fail. `take` must not.
    """
    store = _store_of(disks)
    _await_each(disks)
    likely = {tracking: _write_beforehand(tracking) for tracking in disks}
    held: dict[Tracking, Sequence[Snapshot]] = {}
    with contextlib.ExitStack() as frozen:
        for tracking in sorted(disks, key=lambda each: (each.device.fd is not None, each.disk.uuid)):
            frozen.enter_context(tracking.frozen())
        for tracking in disks:
            tracking.flusher.require_sound()
            tracking.begin_again()  # a write that was drained just now may have lost track
            held[tracking] = prepare(tracking)
        time_ns = time.time_ns()
        with changed_together(disks):
            points = store.update(
                lambda writer: [
                    _next_period(writer, tracking, name, time_ns, likely[tracking], held[tracking])
                    for tracking in disks
                ]
            )
            for tracking, (checkpoint, following) in zip(disks, points, strict=True):
                take(tracking, checkpoint)
                tracking.go_on_with(following)
    return [checkpoint for checkpoint, _ in points]


def _await_each(disks: Sequence[Tracking]) -> None:
    """Wait for the writes in flight on each of several disks while no other is frozen: the wait may have no end."""
    for tracking in disks if len(disks) > 1 else ():
        with tracking.frozen():
            pass


class _Likely(NamedTuple):
    """Extents of a disk of this geometry where dirt was likely next: masks by region."""

    geometry: Geometry
    extents: Mapping[int, int]


def _write_beforehand(tracking: Tracking) -> _Likely:
    """Persist extents without new dirt, and return the extents that the next period should have armed.

    Else up to a thousand records would be written while writers wait. Extents that get dirt just now stay armed: to
    arm them again would take a commit, for which the freeze would wait. A store that refuses this refuses the
    checkpoint too, and says why then.
    """
    likely, period = _Likely(tracking.disk.geometry, _carried(tracking)), tracking.period
    with contextlib.suppress(LmdbitmapError):
        period.disarm_quiet(period.armed_count)
    return likely


def _store_of(disks: Sequence[Tracking]) -> Store:
    """Return the store of all of them: one transaction makes their checkpoint."""
    if not disks or len({tracking.disk.uuid for tracking in disks}) < len(disks):
        raise InvalidArgument("a checkpoint is of one disk or of several", next_step="name each disk once")
    store = disks[0].store
    others = [tracking.store for tracking in disks if not tracking.store.is_same(store)]
    if others:
        raise InvalidArgument(
            f"the disks are of several stores, {store.path} and {others[0].path}",
            next_step="take a checkpoint of the disks of each store by itself",
        )
    return store


def _next_period(
    writer: Writer,
    tracking: Tracking,
    name: str,
    time_ns: int,
    likely: _Likely,
    snapshots: Sequence[Snapshot],
) -> tuple[Checkpoint, Following]:
    """Begin the next period, with lately written extents armed, so that their writers do not all commit at once."""
    tracking.put_exact(writer)
    disk, checkpoint = chain.add_checkpoint(writer, tracking.as_stored(writer), name, time_ns)
    following = tracking.following(writer, disk, snapshots, checkpoint)
    armed = likely.extents if likely.geometry == disk.geometry else {}
    following.period.begin(writer, armed, tracking.in_doubt(disk.geometry))
    return checkpoint, following


def _carried(tracking: Tracking) -> Mapping[int, int]:
    """Return the extents with likely dirt that the next period has armed from the start."""
    return dict(list(tracking.period.likely_extents().items())[-_CARRIED_REGIONS:])


def _flush_images(
    disks: Sequence[Tracking], checkpoints: Sequence[Checkpoint], let_go: Callable[[], None] = lambda: None
) -> None:
    try:
        for tracking in disks:
            tracking.flusher.flush()
            tracking.mark_doubts()  # those of the flush are of writes before it, which may land in this period
    except StorageError as error:
        let_go()
        for tracking, checkpoint in zip(disks, checkpoints, strict=True):
            _take_back(tracking, checkpoint)
        told = copy.copy(error)  # a refusal may be shared, as by all who use a disk that is detached
        told.next_step = f"no checkpoint was made; {error.next_step}"
        raise told from error


def _take_back(tracking: Tracking, checkpoint: Checkpoint) -> None:
    """Delete a checkpoint that was not returned to anybody. If the store refuses, track is lost."""
    try:
        with tracking.frozen():
            tracking.change_chain(lambda writer, disk: _without(writer, disk, checkpoint), _carried(tracking))
    except LmdbitmapError as error:
        if not tracking.is_over:
            tracking.voucher.lose_track(
                f"checkpoint {checkpoint.name} could not be taken back: {error.problem}"
            )


def _without(writer: Writer, disk: Disk, checkpoint: Checkpoint) -> Disk:
    """Forget it, unless somebody else has: another one of its name, by now, may have been returned."""
    if any(found.uuid == checkpoint.uuid for found in writer.checkpoints(disk.uuid)):
        chain.forget(writer, disk, checkpoint.name)
    return disk


def forget(tracking: Tracking, name: str) -> None:
    """See `Filter.forget`."""
    if tracking.is_over:
        raise detached_error(tracking.disk)
    if not tracking.store.update(lambda writer: _forget_unless_newest(writer, tracking, name)):
        with tracking.frozen():
            _require_unheld(tracking, name)
            tracking.change_chain(lambda writer, disk: _forget(writer, disk, name), _carried(tracking))


def _forget_unless_newest(writer: Writer, tracking: Tracking, name: str) -> bool:
    """Forget it and return True; the newest one can be forgotten, and found unheld, only while the disk is frozen.

    A snapshot's checkpoint is the newest until the snapshot is held, as no other can be made before.
    """
    disk = tracking.as_stored(writer)
    if chain.current_checkpoint(writer, disk).name == name:
        return False
    _require_unheld(tracking, name)
    chain.forget(writer, disk, name)
    return True


def _require_unheld(tracking: Tracking, name: str) -> None:
    for held in tracking.snapshots:
        if held.checkpoint.name == name:
            raise held_error(held)


def _forget(writer: Writer, disk: Disk, name: str) -> Disk:
    chain.forget(writer, disk, name)
    return disk
