"""How far a synced copy of a disk is (sync.py): one small JSON file for each disk and target.

    STORE/syncs/<disk uuid>-<16 hex>.json    the note; the digits are a digest of the target's lasting name
    STORE/syncs/<disk uuid>-<16 hex>.lock    held by the one sync that writes to that target

Invariants, at every moment, also after a power cut:

1. `at` names a checkpoint. Outside the blocks that changed since, the target holds what the disk holds. Without `at`
   nothing is known of the target.
2. Unless a sync is `under_way`, nobody writes the target, and it has the identity in the note. (Before we write it
   ourselves, as in a restore onto it, the note forgets `at`: copies.py.) A sync under way writes only inside these
   blocks, so 1 holds. That changes the target's identity: what is still compared is which file or device it is, that a
   file's mtime did not go back, and that the file bears the `mark` that this sync put on it. Each sync puts a new one:
   with a store that was put back to an earlier day, later syncs to the file are noticed. One that counts from `at` and
   fails, and lives, gives it the identity that it left.
3. `unneeded` names checkpoints that syncs to this target took, and from which none counts, nor will if the run that
   took them was killed. Only those are ever forgotten, and only if their names are of our making.

An unreadable note means that the target is compared. The checkpoints that it named stay.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from typing import Any, Final, NamedTuple
from uuid import UUID

from lmdbitmap.errors import FormatError, StorageError
from lmdbitmap.images.image import is_same_image
from lmdbitmap.interfaces import DeviceTrace, ImageIdentity
from lmdbitmap.notes.note_files import MAX_NOTE_BYTES, paths_of, remove_all, typed
from lmdbitmap.system import atomic_files, file_locks, files
from lmdbitmap.system.file_names import UNFINISHED_FORM, UUID_FORM
from lmdbitmap.work.patience import NO_PATIENCE, Patience

log = logging.getLogger(__name__)

SYNCS: Final = "syncs"
FORMAT_VERSION: Final = 1
_FILE_NAME = re.compile(rf"({UUID_FORM})-[0-9a-f]{{16}}\.(?:json(?:{UNFINISHED_FORM})?|lock)")


class Sizes(NamedTuple):
    """Sizes in bytes. The target's bytes behind the disk were zero."""

    disk: int
    target: int


class At(NamedTuple):
    """The point in time of a copy, and the target's identity then; None if that is unknown."""

    checkpoint: UUID
    name: str
    epoch: UUID
    identity: ImageIdentity | None
    sizes: Sizes | None = None
    """None if an older version wrote the note."""


@dataclasses.dataclass(frozen=True, slots=True)
class Note:
    target: str
    at: At | None = None
    under_way: bool = False
    unneeded: tuple[str, ...] = ()
    mark: str | None = None
    """The mark that the sync under way put on its file; None if it put none."""

    @property
    def is_of_a_copy(self) -> bool:
        """Whether a sync has written to the target."""
        return self.at is not None or self.under_way


class NoteFile:
    """The note of one disk and target. Change it only inside `locked`."""

    def __init__(self, path: str, note: Note) -> None:
        self._path = path
        self.note = note

    @classmethod
    def of(cls, store_path: str, disk: UUID, target: str) -> NoteFile:
        """Return the file of the target's note, found by any name that leads to it. `locked` reads the note."""
        for path, note in notes(store_path, disk):
            if is_same_image(note.target, target):
                return cls(path, Note(target))
        digest = hashlib.sha256(target.encode()).hexdigest()[:16]
        return cls(os.path.join(store_path, SYNCS, f"{disk}-{digest}.json"), Note(target))

    def locked(self, patience: Patience = NO_PATIENCE) -> file_locks.LockedFile:
        """Lock the note and read it again. Raises `Busy` while another sync has the lock."""
        lock_path = f"{self._path.removesuffix('.json')}.lock"
        lock = file_locks.lock_file(lock_path, like_folder=True, patience=patience)
        try:
            self.note = dataclasses.replace(
                _read_or_unknown(self._path) or self.note, target=self.note.target
            )
        except BaseException:
            lock.close()
            raise
        return lock

    def replace(self, note: Note) -> None:
        """Write the note; durable on return. A death leaves the old note or the new one."""
        atomic_files.replace(self._path, encode(note), like_folder=True)
        self.note = note


def notes(store_path: str, disk: UUID | None = None) -> Iterator[tuple[str, Note]]:
    """Return (path, note) of every readable note, or of one disk's."""
    for path in _paths(store_path, disk):
        note = _read_or_unknown(path) if path.endswith(".json") else None
        if note is not None:
            yield path, note


def disk_of(file_name: str) -> str | None:
    """Return the uuid of the disk to which a note, an unfinished note or a lock of that name belongs."""
    match = _FILE_NAME.fullmatch(file_name)
    return None if match is None else match[1]


def remove_notes(store_path: str, disk: UUID) -> None:
    """Remove the notes of a removed disk."""
    remove_all(_paths(store_path, disk))


def _paths(store_path: str, disk: UUID | None) -> list[str]:
    return paths_of(os.path.join(store_path, SYNCS), disk, disk_of)


# --- the bytes ---


def _read_or_unknown(path: str) -> Note | None:
    if not os.path.lexists(path):
        return None
    try:
        return decode(files.read_bounded(path, MAX_NOTE_BYTES), path)
    except NewerNote:
        raise
    except (FormatError, StorageError) as unreadable:
        if isinstance(unreadable, StorageError) and unreadable.errno not in (errno.EACCES, errno.EPERM):
            raise
        log.warning("%s; the target will be compared, and checkpoints that it named stay", unreadable.problem)
        return None


class NewerNote(FormatError):
    """A newer version wrote the note, which may have something that must not be ignored."""


def encode(note: Note) -> bytes:
    at = None
    if note.at is not None:
        at = {
            "checkpoint": str(note.at.checkpoint),
            "name": note.at.name,
            "epoch": str(note.at.epoch),
            "identity": None if note.at.identity is None else _told(note.at.identity),
            "sizes": None if note.at.sizes is None else note.at.sizes._asdict(),
        }
    fields = {
        "format_version": FORMAT_VERSION,
        "target": note.target,
        "at": at,
        "under_way": note.under_way,
        "mark": note.mark,
        "unneeded": list(note.unneeded),
    }
    return json.dumps(fields, indent=1, sort_keys=True).encode() + b"\n"


def _told(identity: ImageIdentity) -> dict[str, object]:
    trace = None if identity.trace is None else identity.trace._asdict()
    return {**identity._asdict(), "trace": trace}


def decode(data: bytes, place: str) -> Note:
    """Decode a note. Raise `FormatError` for anything else, and for another version's note."""
    try:
        fields = json.loads(data)
        version = typed(int, fields["format_version"])
        if version > FORMAT_VERSION:
            raise NewerNote(
                place, expected=f"version {FORMAT_VERSION}", found=version, next_step="update lmdbitmap"
            )
        names = [typed(str, name) for name in typed(list, fields["unneeded"])]
        at = None if fields["at"] is None else _at(fields["at"])
        told = fields.get("mark")  # older versions put no mark
        mark = None if told is None else typed(str, told)
        return Note(typed(str, fields["target"]), at, typed(bool, fields["under_way"]), tuple(names), mark)
    except (ValueError, KeyError, TypeError, RecursionError) as wrong:
        if isinstance(wrong, FormatError):
            raise
        raise FormatError(
            place, expected="the note of a sync", found=f"{type(wrong).__name__} ({str(wrong)[:100]})",
            next_step="sync again, which compares all of the target",
        ) from wrong  # fmt: skip


def _at(fields: Any) -> At:
    told = fields["identity"]
    identity = None if told is None else _identity(told)
    checkpoint, epoch = (UUID(typed(str, fields[name])) for name in ("checkpoint", "epoch"))
    return At(checkpoint, typed(str, fields["name"]), epoch, identity, _sizes(fields.get("sizes")))


def _sizes(fields: Any) -> Sizes | None:
    return None if fields is None else Sizes(typed(int, fields["disk"]), typed(int, fields["target"]))


def _identity(fields: Any) -> ImageIdentity:
    device, inode, size, mtime_ns = (
        typed(int, fields[name]) for name in ("device", "inode", "size", "mtime_ns")
    )
    told = fields["trace"]
    trace = None
    if told is not None:
        trace = DeviceTrace(
            typed(str, told["boot_id"]), typed(int, told["disk_sequence"]),
            typed(int, told["sectors_written"]), typed(str, told["label"]),
        )  # fmt: skip
    return ImageIdentity(device, inode, size, mtime_ns, trace)
