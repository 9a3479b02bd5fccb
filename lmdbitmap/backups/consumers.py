"""Finds the holders of a disk's checkpoints, and merges away the checkpoints that nobody holds any more.

A repository holds its checkpoints by a note (holds.py), a copy by its own note (sync_note.py). A checkpoint that a
person made by name belongs to that person and is never merged away. These are merged:

    of a run that died        its checkpoint, which no archive names; of a sync, all that its note calls unneeded
    of a hold that lapsed     its repository was not used for so many days
    of a hold dropped by hand

each only if no other hold names it, and only by `forget`: what they recorded goes to the period before. Every backup,
copy, stream and, on the command line, every checkpoint does this for all holders. After a death in between, the next
one does the rest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple
from uuid import UUID

from lmdbitmap.access.access import Access, AccessTerms, access, open_to_read
from lmdbitmap.errors import Busy, InvalidArgument, LmdbitmapError, NotFound
from lmdbitmap.filter import Filter
from lmdbitmap.notes import holds, sync_note
from lmdbitmap.notes.checkpoint_names import Maker
from lmdbitmap.notes.holds import DROPPED, LAPSED, Hold, HoldFile
from lmdbitmap.notes.references import Reason
from lmdbitmap.notes.sync_note import NoteFile
from lmdbitmap.repository.backup_folder import BackupFolder
from lmdbitmap.storage.schema import Checkpoint, Disk
from lmdbitmap.store import Store
from lmdbitmap.tracker import chain
from lmdbitmap.tracker.session import OpenDevice

log = logging.getLogger(__name__)

_SHORTEST_UUID = 4
"""Shortest beginning of a uuid that a person may type, in hexadecimal digits."""


class Holder(NamedTuple):
    """A holder of a checkpoint. `kind` is repository, sync, run (one that is under way, or died), person, tracker, or
    unknown: a backup's checkpoint for which no note is left.
    """

    kind: str
    uuid: UUID | None = None
    place: str | None = None
    """Last known place of the repository or the copy; shown, never followed."""
    used_ns: int | None = None


# --- questions ---


def holds_of(store: Store, name: str) -> list[Hold]:
    """Return the holds of repositories on the disk called `name`, the most recently used first; ended holds too.

    Raises `NotFound` without such a disk.
    """
    with store.read() as reader:
        disk = chain.find_disk(reader, name)
        left = {member.uuid for member in reader.checkpoints(disk.uuid)}
    found = [file.hold for file in holds.hold_files(store.path, disk.uuid) if file.hold is not None]
    shown = [
        dataclasses.replace(hold, checkpoints=tuple(one for one in hold.checkpoints if one.uuid in left))
        for hold in found
    ]
    return sorted(shown, key=lambda hold: hold.used_ns, reverse=True)


def hold_lapse_days(store: Store, name: str) -> int:
    """Return after how many days without a backup a repository's hold on that disk lapses; 0 means never.

    Raises `NotFound` without such a disk.
    """
    return holds.lapse_days(store.path, chain.disk_called(store, name).uuid)


def set_hold_lapse_days(store: Store, name: str, days: int) -> None:
    """Set when holds lapse; durable on return. The next backup or checkpoint merges away what lapses by it.

    Raises `NotFound` without such a disk, and `InvalidArgument` for a number that is not within 0..36500.
    """
    disk = chain.disk_called(store, name)
    holds.set_lapse_days(store.path, disk.uuid, days)


def holders_of(store: Store, disk: Disk) -> Callable[[Checkpoint], list[Holder]]:
    """Return a function that lists the holders of each of the disk's checkpoints, as the notes say now."""
    known = [file.hold for file in holds.hold_files(store.path, disk.uuid) if file.hold is not None]
    copies = {
        note.at.checkpoint: note.target for _, note in sync_note.notes(store.path, disk.uuid) if note.at
    }

    def holders(member: Checkpoint) -> list[Holder]:
        found = [
            Holder("repository", hold.holder, hold.repository, hold.used_ns)
            for hold in known
            if member.uuid in hold.uuids and hold.ended is None
        ]
        found += [
            Holder("run", hold.holder, hold.repository, hold.used_ns)
            for hold in known
            if hold.under_way is not None and hold.under_way.is_of(member)
        ]
        if member.uuid in copies:
            found.append(Holder("sync", place=copies[member.uuid]))
        return found or [Holder(_kind_of(member))]

    return holders


def _kind_of(member: Checkpoint) -> str:
    """Return the holder kind of a checkpoint that no note names."""
    if any(maker.named(member.name) for maker in Maker):
        return "unknown"
    return "tracker" if member.name.startswith("epoch-") else "person"


def held_by_others(store: Store, disk: Disk, holder: UUID) -> frozenset[UUID]:
    """Return the checkpoints that holders other than `holder` count from."""
    known = (file.hold for file in holds.hold_files(store.path, disk.uuid) if file.holder != holder)
    return frozenset().union(*(hold.uuids for hold in known if hold is not None and hold.ended is None))


# --- changes ---


def merge_unheld(store: Store, route: Access, disk: Disk) -> None:
    """Merge away checkpoints that nobody holds. A failure is logged; the next backup anywhere tries again."""
    try:
        with contextlib.ExitStack() as locks:
            _merge(store, route, disk, _locked(store, disk, locks, time.time_ns()))
            _merge_of_copies(store, route, disk, _locked_copies(store, disk, locks))
    except LmdbitmapError as error:
        log.warning("disk %s: checkpoints that are no longer held stay until later: %s", disk.name, error)


def merge_unheld_of(store: Store, names: list[str]) -> None:
    """Do `merge_unheld` for callers without access to the disks. A disk with nothing to merge is not touched."""
    for name in names:
        try:
            _merge_unheld_of(store, name)
        except LmdbitmapError as error:
            log.warning("disk %s: checkpoints that are no longer held stay until later: %s", name, error)


def _merge_unheld_of(store: Store, name: str) -> None:
    disk = chain.disk_called(store, name)
    with contextlib.ExitStack() as locks:
        is_needed = bool(_locked(store, disk, locks, time.time_ns()) or _locked_copies(store, disk, locks))
    if is_needed:
        with access(store, [name], AccessTerms(open_to_read)) as route:
            merge_unheld(store, route, disk)


def _locked(store: Store, disk: Disk, locks: contextlib.ExitStack, time_ns: int) -> list[HoldFile]:
    """Return the hold files that release a checkpoint, locked: nobody else changes them until `locks` are closed."""
    days = holds.lapse_days(store.path, disk.uuid)

    def lets_go(hold: Hold | None) -> bool:
        return hold is not None and (
            hold.under_way is not None
            or hold.is_stale(days, time_ns)
            or (hold.ended is not None and bool(hold.checkpoints))
        )

    found = []
    for file in holds.hold_files(store.path, disk.uuid):
        if lets_go(file.hold):
            with contextlib.suppress(Busy):  # a run that lives
                locks.enter_context(file.locked())
                if lets_go(file.hold):
                    found.append(file)
    return found


def _locked_copies(store: Store, disk: Disk, locks: contextlib.ExitStack) -> list[NoteFile]:
    """Return the locked notes of copies that no sync is using now and whose last sync left unneeded checkpoints."""
    found = []
    for path, note in sync_note.notes(store.path, disk.uuid):
        if note.unneeded:
            file = NoteFile(path, note)
            with contextlib.suppress(Busy):
                locks.enter_context(file.locked())
                found.append(file)
    return found


def _merge_of_copies(store: Store, route: Access, disk: Disk, files: list[NoteFile]) -> None:
    names = {name for file in files for name in file.note.unneeded if Maker.SYNC.named(name)}
    if names:
        route.forget(disk, lambda member: member.name in names)
    left = {member.name for member in _members(store, disk)}
    for file in files:
        unneeded = tuple(name for name in file.note.unneeded if name in left)
        if unneeded != file.note.unneeded:
            file.replace(dataclasses.replace(file.note, unneeded=unneeded))


def _merge(store: Store, route: Access, disk: Disk, files: list[HoldFile]) -> None:
    days, time_ns = holds.lapse_days(store.path, disk.uuid), time.time_ns()
    members = _members(store, disk)
    for file in files:
        assert file.hold is not None
        file.settle(members)
        if file.hold is not None and file.hold.is_stale(days, time_ns):
            file.replace(dataclasses.replace(file.hold, ended=_lapsed(days)))
    files = [file for file in files if file.hold is not None]
    _let_go(store, route, disk, files)


def _let_go(store: Store, route: Access, disk: Disk, files: list[HoldFile]) -> None:
    """Merge the checkpoints that these holds name and do not need. The caller has their locks."""
    names = {file.holder: file.hold for file in files if file.hold is not None}
    others = [file for file in holds.hold_files(store.path, disk.uuid) if file.holder not in names]
    needed = {uuid for file in others if file.hold and file.hold.ended is None for uuid in file.hold.uuids}
    needed |= {uuid for hold in names.values() if hold.ended is None for uuid in hold.uuids}

    def is_unneeded(member: Checkpoint) -> bool:
        return member.uuid not in needed and any(hold.lets_go_of(member) for hold in names.values())

    if any(is_unneeded(member) for member in _members(store, disk)):
        route.forget(disk, is_unneeded)
    for file in files:
        file.settle(_members(store, disk))


def _members(store: Store, disk: Disk) -> list[Checkpoint]:
    with store.read() as reader:
        return reader.checkpoints(disk.uuid)


def _lapsed(days: int) -> Reason:
    return Reason(LAPSED, f"its hold lapsed: no backup went into this repository for more than {days} days")


def drop_hold(
    store: Store,
    name: str,
    which: str,
    *,
    attached: Mapping[str, Filter] | None = None,
    open_device: OpenDevice = open_to_read,
) -> Hold:
    """Drop a repository's hold on the disk called `name`: the disk's next backup there will be a rescan.

    If the hold had ended before and has nothing left, its note is removed. `which` is the repository's path, or the
    holder's uuid, or the beginning of that uuid. Raises `NotFound` if it names none, `InvalidArgument` if it names
    several, and `Busy` while a backup goes there.
    """
    disk = chain.disk_called(store, name)
    file = _named(store, disk, which)
    with access(store, [name], AccessTerms(open_device, attached)) as route, file.locked():
        if file.hold is None:
            raise _no_hold(disk, which)
        if file.hold.ended is not None and not file.hold.checkpoints:
            hold = file.hold
            file.remove()
            return hold
        ended = Reason(DROPPED, "its hold on the checkpoint was dropped by hand")
        dropped = dataclasses.replace(file.hold, ended=ended)
        file.replace(dropped)
        _let_go(store, route, disk, [file])
    return dropped


def _named(store: Store, disk: Disk, which: str) -> HoldFile:
    known = holds.hold_files(store.path, disk.uuid)
    holder = _holder_at(which, disk)
    if holder is not None:
        found = [file for file in known if file.holder == holder]
    else:
        found = [file for file in known if _is_called(file, which)]
    if len(found) > 1:
        listed = ", ".join(str(file.holder) for file in found)
        raise InvalidArgument(
            f"{which} was the place of several repositories of disk {disk.name!r}: {listed}",
            next_step="name one of these uuids",
        )
    if not found:
        raise _no_hold(disk, which)
    return found[0]


def _holder_at(which: str, disk: Disk) -> UUID | None:
    """Return the uuid by which the repository at that path holds the disk; None if there is no such repository."""
    try:
        manifest = BackupFolder(which, disk.name).manifest()
    except LmdbitmapError:
        return None
    return None if manifest is None or manifest.disk.uuid != disk.uuid else manifest.holder


def _is_called(file: HoldFile, which: str) -> bool:
    """Return whether `which` is the hold's last known path, or the first digits of its uuid."""
    assert file.hold is not None
    is_uuid = len(which) >= _SHORTEST_UUID and str(file.holder).startswith(which.lower())
    return is_uuid or file.hold.repository in (which, BackupFolder(which, "any").repository_path)


def _no_hold(disk: Disk, which: str) -> NotFound:
    return NotFound(
        f"{which} holds nothing of disk {disk.name!r}",
        next_step=f"name a uuid that `lmdbitmap holds {disk.name}` lists",
    )
