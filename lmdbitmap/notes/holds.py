"""The holds on the checkpoints of a disk: a small JSON file for each repository that the disk is backed up to.

    STORE/holds/<disk uuid>-<holder uuid>.json   what is held; the holder's uuid is in the repository's manifest too
    STORE/holds/<disk uuid>-<holder uuid>.lock   held by the one run that backs the disk up to there
    STORE/holds/<disk uuid>-lapse.json           after how many days a hold lapses, if that was set

A running stream has such a note too, without a repository. Invariants, at every moment, also after a power cut:

1. `under_way` names a checkpoint from before it is made until right before an archive may name it. If the lock is
   free, its run is dead, and no archive will ever name it.
2. A checkpoint is in `checkpoints` before a manifest names it. An `ended` hold, which lapsed or was dropped by hand,
   holds nothing any more; if its repository comes back before the checkpoints are gone, it holds them again.
3. A checkpoint that no note names stays for ever. So does one whose name is not of our making, unless a note has its
   uuid. So a lost or unreadable note costs only checkpoints that stay.

A repository that is not at its path proves nothing: disks take turns at one mount point. Paths are shown, never
followed.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final, NamedTuple
from uuid import UUID

from lmdbitmap.errors import FormatError, InvalidArgument, LmdbitmapError, NotFound, os_errors_at
from lmdbitmap.notes.checkpoint_names import Maker
from lmdbitmap.notes.note_files import MAX_NOTE_BYTES, paths_of, remove_all, typed
from lmdbitmap.notes.references import CheckpointRef, Reason
from lmdbitmap.storage.schema import Checkpoint
from lmdbitmap.system import atomic_files, file_locks, files
from lmdbitmap.system.file_names import UNFINISHED_FORM, UUID_FORM
from lmdbitmap.work.patience import NO_PATIENCE, Patience

log = logging.getLogger(__name__)

HOLDS: Final = "holds"
FORMAT_VERSION: Final = 1
LAPSE_DAYS: Final = 180
"""The default of `lapse_days`."""
MOST_LAPSE_DAYS: Final = 36_500
LAPSED, DROPPED = "hold-lapsed", "hold-dropped"
_DAY_NS: Final = 86_400 * 10**9
_FILE_NAME = re.compile(rf"({UUID_FORM})-({UUID_FORM}|lapse)\.(json|lock|json{UNFINISHED_FORM})")


class UnderWay(NamedTuple):
    """The checkpoint of a run. It has a uuid if others could have its name, and no name before that is known."""

    name: str
    uuid: UUID | None = None

    def is_of(self, member: Checkpoint) -> bool:
        if self.uuid is not None:
            return member.uuid == self.uuid
        return member.name == self.name and is_given_name(self.name)


@dataclasses.dataclass(frozen=True, slots=True)
class Hold:
    """A repository, or a running stream, and the checkpoints of one disk that are kept for it."""

    holder: UUID
    repository: str | None
    """The repository's path when it was last used; None for a stream."""
    used_ns: int
    """Unix time of its last use."""
    checkpoints: tuple[CheckpointRef, ...] = ()
    under_way: UnderWay | None = None
    ended: Reason | None = None

    @property
    def uuids(self) -> frozenset[UUID]:
        """The uuids of the checkpoints that it holds, or held until it ended."""
        return frozenset(checkpoint.uuid for checkpoint in self.checkpoints)

    @property
    def expects_backups(self) -> bool:
        """Whether its repository is known to have backups that were not given up by hand."""
        return bool(self.checkpoints) if self.ended is None else self.ended.code == LAPSED

    def was_at(self, repository: str) -> bool:
        """Whether the repository was last used at that absolute path."""
        return self.repository == _shown(repository)

    def is_stale(self, days: int, time_ns: int) -> bool:
        """Return whether it holds something and was not used for `days`; 0 means for ever."""
        is_old = days > 0 and time_ns - self.used_ns > days * _DAY_NS
        return is_old and self.ended is None and bool(self.checkpoints)

    def lets_go_of(self, member: Checkpoint) -> bool:
        """Return whether this hold names a checkpoint but does not need it. The caller has its lock."""
        if self.under_way is not None and self.under_way.is_of(member):
            return True
        return self.ended is not None and member.uuid in self.uuids and Maker.BACKUP.named(member.name)


def _shown(path: str) -> str:
    """Return a path in the form that a note can store."""
    return path.encode(errors="replace").decode()


def is_given_name(name: str) -> bool:
    """Return whether a backup or a stream made up that name, so that only one checkpoint has it."""
    return Maker.BACKUP.named(name) or Maker.STREAM.named(name)


class HoldFile:
    """The note of one holder. Change it only inside `locked`."""

    def __init__(self, store_path: str, disk: UUID, holder: UUID) -> None:
        self.disk = disk
        self.holder = holder
        self._folder = os.path.join(store_path, HOLDS)
        self._path = os.path.join(self._folder, f"{disk}-{holder}.json")
        self.hold: Hold | None = None
        """The hold as last read or written."""

    @contextmanager
    def locked(self, patience: Patience = NO_PATIENCE) -> Iterator[HoldFile]:
        """Lock the note and read it again. Raises `Busy` if another run has the lock for longer than `patience`.

        The lock's file goes if there is no note at the end: each run that is refused before its first one has another.
        """
        with os_errors_at(self._folder):
            files.make_folder_like(self._folder)
        lock_path = f"{self._path.removesuffix('.json')}.lock"
        with file_locks.lock_file(lock_path, like_folder=True, patience=patience) as lock:
            try:
                self.read()
                yield self
            finally:
                if not os.path.lexists(self._path):
                    lock.remove()

    def read(self) -> Hold | None:
        self.hold = _read(self._path)
        return self.hold

    def replace(self, hold: Hold) -> None:
        """Write the note; durable on return. A death leaves the old note or the new one."""
        atomic_files.replace(self._path, encode(hold), like_folder=True)
        self.hold = hold

    def remove(self) -> None:
        """Remove note and lock; durable on return. A process that opened the lock before sees that its name is gone."""
        with os_errors_at(self._folder):
            for path in (self._path, f"{self._path.removesuffix('.json')}.lock"):
                with suppress(FileNotFoundError):
                    os.unlink(path)
        files.fsync_folder(self._folder)
        self.hold = None

    # -- a run ---------------------------------------------------------------------------------------------

    def begin(
        self, repository: str | None, held: Iterable[CheckpointRef], run: UnderWay, time_ns: int
    ) -> None:
        """Note that a run is about to take a checkpoint; `held` are the checkpoints to count from."""
        still = tuple(held)
        ended = self.hold.ended if self.hold is not None and not still else None
        shown = None if repository is None else _shown(repository)
        self.replace(Hold(self.holder, shown, time_ns, still, run, ended))

    def keep(self, checkpoint: CheckpointRef, time_ns: int) -> None:
        """Hold the run's checkpoint from now on: an archive is about to name it."""
        assert self.hold is not None
        held = (*self.hold.checkpoints, checkpoint)
        self.replace(
            dataclasses.replace(self.hold, used_ns=time_ns, checkpoints=held, under_way=None, ended=None)
        )

    def settle(self, members: Iterable[Checkpoint]) -> None:
        """Drop checkpoints that are gone; `members` are the disk's present ones. If none is left, remove the note."""
        if (hold := self.hold) is None:
            return
        there = list(members)
        left = {member.uuid for member in there}
        held = tuple(checkpoint for checkpoint in hold.checkpoints if checkpoint.uuid in left)
        run = hold.under_way
        if run is not None and not any(run.is_of(member) for member in there):
            run = None
        if not held and run is None and hold.ended is None:
            self.remove()
        elif (held, run) != (hold.checkpoints, hold.under_way):
            self.replace(dataclasses.replace(hold, checkpoints=held, under_way=run))


def hold_files(store_path: str, disk: UUID) -> list[HoldFile]:
    """Return all readable hold files of a disk, in no particular order."""
    found = []
    for path in _paths(store_path, disk):
        match = _FILE_NAME.fullmatch(os.path.basename(path))
        if match is not None and match[2] != "lapse" and match[3] == "json":
            file = HoldFile(store_path, disk, UUID(match[2]))
            if file.read() is not None:
                found.append(file)
    return found


def disk_of(file_name: str) -> str | None:
    """Return the uuid of the disk to which a note, an unfinished note or a lock of that name belongs."""
    match = _FILE_NAME.fullmatch(file_name)
    return None if match is None else match[1]


def remove_holds(store_path: str, disk: UUID) -> None:
    """Remove the holds of a removed disk."""
    remove_all(_paths(store_path, disk))


def _paths(store_path: str, disk: UUID) -> list[str]:
    return paths_of(os.path.join(store_path, HOLDS), disk, disk_of)


# --- after how many days ---


def lapse_days(store_path: str, disk: UUID) -> int:
    """Return after how many days without a backup a hold lapses; 0 means never, as does a damaged note."""
    path = _lapse_path(store_path, disk)
    if not os.path.lexists(path):
        return LAPSE_DAYS
    try:
        fields = json.loads(files.read_bounded(path, MAX_NOTE_BYTES))
        return _days(typed(int, fields["lapse_days"]))
    except (LmdbitmapError, ValueError, KeyError, TypeError, RecursionError) as damaged:
        log.warning("%s cannot be read (%s): holds do not lapse until it is set anew", path, damaged)
        return 0


def set_lapse_days(store_path: str, disk: UUID, days: int) -> None:
    """Set it; durable on return."""
    fields = {"format_version": FORMAT_VERSION, "lapse_days": _days(days)}
    with os_errors_at(store_path):
        files.make_folder_like(os.path.join(store_path, HOLDS))
    atomic_files.replace(_lapse_path(store_path, disk), json.dumps(fields).encode() + b"\n", like_folder=True)


def _days(days: int) -> int:
    if type(days) is not int or not 0 <= days <= MOST_LAPSE_DAYS:
        raise InvalidArgument(
            f"{days!r} is no whole number of days within 0..{MOST_LAPSE_DAYS}",
            next_step="name such a number, or 0 for never",
        )
    return days


def _lapse_path(store_path: str, disk: UUID) -> str:
    return os.path.join(store_path, HOLDS, f"{disk}-lapse.json")


# --- the bytes ---


def _read(path: str) -> Hold | None:
    try:
        return decode(files.read_bounded(path, MAX_NOTE_BYTES), path) if os.path.lexists(path) else None
    except NotFound:  # just now: its run ended
        return None
    except LmdbitmapError as unreadable:
        log.warning("%s; the checkpoints that it named stay", unreadable.problem)
        return None


def encode(hold: Hold) -> bytes:
    run, ended = hold.under_way, hold.ended
    fields = {
        "format_version": FORMAT_VERSION,
        "holder": str(hold.holder),
        "repository": hold.repository,
        "used_ns": hold.used_ns,
        "checkpoints": [{"uuid": str(one.uuid), "name": one.name} for one in hold.checkpoints],
        "under_way": run and {"name": run.name, "uuid": None if run.uuid is None else str(run.uuid)},
        "ended": ended and {"code": ended.code, "words": ended.words},
    }
    return json.dumps(fields, indent=1, sort_keys=True).encode() + b"\n"


def decode(data: bytes, place: str) -> Hold:
    """Decode a note; drop unknown keys. Raise `FormatError` for anything else, and for a newer version's note."""
    try:
        fields = json.loads(data)
        if typed(int, fields["format_version"]) != FORMAT_VERSION:
            raise ValueError(f"version {fields['format_version']}")
        return Hold(
            UUID(typed(str, fields["holder"])),
            None if fields["repository"] is None else typed(str, fields["repository"]),
            _time(fields["used_ns"]),
            tuple(_checkpoint(one) for one in typed(list, fields["checkpoints"])),
            None if fields["under_way"] is None else _run(fields["under_way"]),
            None if fields["ended"] is None else _ended(fields["ended"]),
        )
    except (ValueError, KeyError, TypeError, RecursionError) as wrong:
        raise FormatError(
            place, expected=f"the note of a hold, version {FORMAT_VERSION}",
            found=f"{type(wrong).__name__} ({str(wrong)[:100]})",
            next_step="remove it, and forget the checkpoints of a repository that is gone by their names",
        ) from wrong  # fmt: skip


def _time(value: Any) -> int:
    if not 0 <= typed(int, value) < 1 << 63:
        raise ValueError("a time before 1970, or far from now")
    return int(value)


def _checkpoint(fields: Any) -> CheckpointRef:
    return CheckpointRef(UUID(typed(str, fields["uuid"])), typed(str, fields["name"]))


def _run(fields: Any) -> UnderWay:
    told = fields["uuid"]
    return UnderWay(typed(str, fields["name"]), None if told is None else UUID(typed(str, told)))


def _ended(fields: Any) -> Reason:
    code = typed(str, fields["code"])
    if code not in (LAPSED, DROPPED):
        raise ValueError(f"ended by {code[:40]!r}")
    return Reason(code, typed(str, fields["words"]))
