"""The owner's file of one disk: a lock, a sign of life, and a place to note "untrusted" when all else fails.

    offset  what                    written
    0       lock (flock)            held by the one process that owns the disk, until it closes or dies
    0       beat, 512 bytes         every half second while attached. The first of a session is synced, so that a
                                    power cut does not find the last session's; the others must survive `kill -9`
                                    only, and continuity.py allows for what the disk had not got yet
    4096    distrust, 512 bytes     when tracking failed; synced before the write that was not tracked
    8192    the disk, 8192 bytes    when it is added, and at an attach if it is another: what salvage.py makes
                                    it again from, where the store is damaged. Magic, length, description, CRC-32

The file is written in full when a disk is added, so that saying "untrusted" needs no space on a full disk. If it is
removed or replaced under its owner, the owner takes the one that has its name by then, at the next beat. One that was
moved is kept too: it may be in the store, which was moved and is written to as before.
Each record carries a CRC-32; a record that fails it is read in the safe direction: no beat, distrust, no description.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import struct
import threading
import time
from collections.abc import Callable
from typing import NamedTuple
from zlib import crc32

from lmdbitmap.errors import Busy, os_errors_at
from lmdbitmap.interfaces import StoreMark
from lmdbitmap.system import atomic_files, file_locks, files, kernel
from lmdbitmap.system.kernel import awake_ns as awake_ns
from lmdbitmap.system.kernel import boot_id as boot_id
from lmdbitmap.system.kernel import boot_time_ns as boot_time_ns

log = logging.getLogger(__name__)

_RECORD_BYTES = 512
_PAGE_BYTES = 4096
_BEAT_OFFSET = 0
_DISTRUST_OFFSET = _PAGE_BYTES
_DISK_OFFSET = 2 * _PAGE_BYTES
_DISK_BYTES = 2 * _PAGE_BYTES
_FILE_BYTES = _DISK_OFFSET + _DISK_BYTES
_DISK = struct.Struct("<8sI")
_DISK_MAGIC = b"LDBMdisk"
_BEAT = struct.Struct("<8s36sqqQQQQQ")
_BEAT_MAGIC = b"LDBMlife"
_DISTRUST = struct.Struct("<8sqH")
_TRUST_MAGIC = b"LDBMgood"
_DISTRUST_MAGIC = b"LDBMlost"
_LOCK_TRIES = 5
_LOCK_PAUSE_S = 0.02
UNMARKED = StoreMark(0, 0)
OWNED_TWICE = "its owner's file was removed or replaced, and another process owned the disk too"


class Beat(NamedTuple):
    """A sign of life: the image's mtime as the owner saw it at `time_ns`, in Unix nanoseconds, and the store's mark.

    A block device has no mtime; the kernel counts the sectors written to it.
    """

    boot_id: str
    time_ns: int
    mtime_ns: int
    sectors_written: int = 0
    store: StoreMark = UNMARKED
    awake_ns: int = 0
    """Nanoseconds since the boot, which no change of the clock touches; 0 if an older version left the sign."""


class Distrust(NamedTuple):
    """Since when, and why, the disk's bitmaps cannot be trusted."""

    since_ns: int
    reason: str


def create(path: str, why: Distrust | None = None, description: bytes = b"") -> None:
    """Create the file of a disk, whole or not at all; durable on return."""
    beat, trust = _sealed(b"").ljust(_PAGE_BYTES, b"\0"), _trust_record(why).ljust(_PAGE_BYTES, b"\0")
    atomic_files.replace(path, beat + trust + _disk_record(description), like_folder=True)


def last_beat(path: str) -> Beat | None:
    """Return the last sign of life; None if none can be read."""
    record = _read(path, _BEAT_OFFSET)
    if record is None:
        return None
    magic, boot, time_ns, mtime_ns, sectors, inode, transaction, awake_ns, born_ns = _BEAT.unpack_from(record)
    if magic != _BEAT_MAGIC:
        return None
    store = StoreMark(inode, transaction, born_ns)
    return Beat(boot.decode("ascii", "replace"), time_ns, mtime_ns, sectors, store, awake_ns)


def distrust(path: str) -> Distrust | None:
    """Return why the disk cannot be trusted; None only if this file says that it can."""
    record = _read(path, _DISTRUST_OFFSET)
    if record is None:
        return Distrust(0, "the owner's file of this disk is missing or damaged")
    magic, since_ns, length = _DISTRUST.unpack_from(record)
    if magic == _TRUST_MAGIC:
        return None
    reason = record[_DISTRUST.size : _DISTRUST.size + length].decode("utf-8", "replace")
    return Distrust(since_ns, reason or "tracking failed")


def description(path: str) -> bytes | None:
    """Return the disk's description that was last kept; None if there is none, or it is damaged."""
    record = _read(path, _DISK_OFFSET, _DISK_BYTES)
    if record is None:
        return None
    magic, length = _DISK.unpack_from(record)
    return record[_DISK.size : _DISK.size + length] if magic == _DISK_MAGIC and length else None


def declare_distrust_at_rest(path: str, reason: str, time_ns: int) -> None:
    """Do `Owner.declare_distrust` for a disk that nobody owns; else raise `Busy`."""
    owner = Owner(path)
    try:
        owner.declare_distrust(reason, time_ns)
    finally:
        owner.close()


def is_owned(path: str) -> bool:
    """Return whether a living process owns the disk now. Two callers do not take each other for the owner."""
    if not os.path.exists(path):
        return False
    with os_errors_at(path), open(path, "rb") as asked:
        try:
            fcntl.flock(asked, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def owner_pid(path: str) -> str | None:
    """Return the process that owns the disk, if it is another one and the kernel tells."""
    try:
        return next(iter(kernel.flock_pids(os.stat(path), "WRITE")), None)
    except OSError:
        return None


class Owner:
    """The lock on one disk, and the right to write its file. Raises `Busy` while another owner holds it.

    `store_mark` returns the store's mark for the beats. Safe for many threads, except `close`.
    """

    def __init__(self, path: str, store_mark: Callable[[], StoreMark] = lambda: UNMARKED) -> None:
        _require_file(path)
        self._lock = _lock_patiently(path)
        self._path = path
        self._elsewhere: list[file_locks.LockedFile] = []
        """Files that were ours and have another name now: who finds the store there must not own the disk either."""
        self._store_mark = store_mark
        self._beaten_ns = 0
        """When it last beat, since the boot."""
        self.was_owned_twice = False
        """Whether another process owned the disk too, so that it was distrusted."""
        self._writing = threading.Lock()
        """Held while the file is written, or another one is taken."""

    def beat(
        self,
        time_ns: int,
        mtime_ns: int,
        sectors_written: int = 0,
        *,
        awake_ns: int = 0,
        durable: bool = False,
    ) -> None:
        """Leave a sign of life: one small write into the page cache, unless it must be durable on return.

        Raises `Busy` if the file was removed or replaced, and another process has taken the one of its name: then the
        disk is distrusted, as neither of the two records what the other writes.
        """
        inode, transaction, born_ns = self._store_mark()
        known = (boot_id().encode("ascii"), time_ns, mtime_ns, sectors_written, inode, transaction)
        record = _BEAT.pack(_BEAT_MAGIC, *known, awake_ns, born_ns)
        with self._writing, os_errors_at(self._path):
            self._keep_the_name(time_ns)
            self._write(_sealed(record), _BEAT_OFFSET, durable=durable)
            self._beaten_ns = awake_ns

    def last_beat(self) -> Beat | None:
        return last_beat(self._path)

    def distrust(self) -> Distrust | None:
        return distrust(self._path)

    def declare_distrust(self, reason: str, time_ns: int) -> None:
        """Note that the bitmaps cannot be trusted from `time_ns` on. Durable on return; needs no space."""
        self._write_trust(Distrust(time_ns, reason))

    def require_the_name(self) -> None:
        """Raise `Busy` while another process, which owned the disk too, has the file of our name."""
        if self.was_owned_twice and self._has_lost_the_name():
            raise Busy(f"{self._path}: {OWNED_TWICE}", next_step="stop one of the two")

    def restore_trust(self) -> None:
        """Withdraw distrust: a new epoch has begun, or a person vouches for the old one. Durable on return."""
        self._write_trust(None)
        self.was_owned_twice = False

    def keep_description(self, kept: bytes) -> None:
        """Keep the description from which a damaged store's disk is made again. Durable with the next durable beat."""
        if description(self._path) != kept:
            try:
                with self._writing:
                    self._write(_disk_record(kept), _DISK_OFFSET, durable=False)
            except OSError as error:  # an older, shorter file on a full disk: nothing is lost by it now
                log.warning("%s: the disk's description could not be kept: %s", self._path, error)

    def _write_trust(self, why: Distrust | None) -> None:
        with self._writing, os_errors_at(self._path):
            self._write(_trust_record(why), _DISTRUST_OFFSET, durable=True)

    def _write(self, record: bytes, offset: int, *, durable: bool) -> None:
        _put(self._lock.fd, record, offset, durable=durable)
        for file in self._elsewhere:
            with contextlib.suppress(OSError):
                _put(file.fd, record, offset, durable=durable)

    def _keep_the_name(self, time_ns: int) -> None:
        """If another file or none has our file's name, take that one, with all that ours says: else another process
        could own the disk as well. Caller holds `_writing`."""
        if not self._has_lost_the_name():
            return
        try:
            taken = self._file_of_the_name()
        except Busy:
            self._distrust_both(time_ns)
            raise
        try:
            if self._was_owned_by_another():
                self._distrust_both(time_ns)
            content = files.pread_whole(self._lock.fd, _FILE_BYTES, 0)
            files.pwrite_whole(taken.fd, content, 0)
            os.fdatasync(taken.fd)
        except BaseException:  # the next beat tries again, as long as it finds that the name is lost
            taken.close()
            raise
        before, self._lock = self._lock, taken
        if os.fstat(before.fd).st_nlink:
            self._elsewhere.append(before)
        else:
            before.close()
        log.error("%s was removed or replaced under its owner, which goes on in the new one", self._path)

    def _file_of_the_name(self) -> file_locks.LockedFile:
        with file_locks.lock_folder(os.path.dirname(self._path)):
            if not os.path.exists(self._path):
                content = files.pread_whole(self._lock.fd, _FILE_BYTES, 0)
                atomic_files.replace(self._path, content, like_folder=True)
            return self._moved_back() or _lock_patiently(self._path)

    def _was_owned_by_another(self) -> bool:
        """Whether somebody beat in the file of our name after we last did in ours."""
        beat = last_beat(self._path)
        return beat is not None and beat.boot_id == boot_id() and beat.awake_ns > self._beaten_ns > 0

    def _distrust_both(self, time_ns: int) -> None:
        """Say so in our file and in the other one's, though we have no lock on that: it must not be believed either."""
        self.was_owned_twice = True
        record = _trust_record(Distrust(time_ns, OWNED_TWICE))
        self._write(record, _DISTRUST_OFFSET, durable=True)
        with open(self._path, "r+b", buffering=0) as other:
            _put(other.fileno(), record, _DISTRUST_OFFSET, durable=True)

    def _moved_back(self) -> file_locks.LockedFile | None:
        for number, file in enumerate(self._elsewhere):
            if file.is_named():
                return self._elsewhere.pop(number)
        return None

    def _has_lost_the_name(self) -> bool:
        """Not if its folder is gone too: then it was moved with the store. Nor if this process may not look any more,
        as one that gave up root: it can still write to the file that it has open.
        """
        try:
            return os.path.isdir(os.path.dirname(self._path)) and not self._lock.is_named()
        except OSError:
            return False

    def close(self) -> None:
        for file in (self._lock, *self._elsewhere):
            file.close()


def _put(fd: int, record: bytes, offset: int, *, durable: bool) -> None:
    os.pwrite(fd, record, offset)
    if durable:
        os.fdatasync(fd)


def _require_file(path: str) -> None:
    """Make a file that is missing. One at a time does, so that nobody replaces a file that another has locked since."""
    if not os.path.exists(path):
        with file_locks.lock_folder(os.path.dirname(path)):
            if not os.path.exists(path):
                create(path, Distrust(0, "the owner's file of this disk was missing"))


def _lock_patiently(path: str) -> file_locks.LockedFile:
    """Lock the file; try a few times, since a caller of `is_owned` holds the lock for a moment."""
    for _ in range(_LOCK_TRIES - 1):
        try:
            return file_locks.lock_file(path, like_folder=True)
        except Busy:
            time.sleep(_LOCK_PAUSE_S)
    return file_locks.lock_file(path, like_folder=True)


def _trust_record(why: Distrust | None) -> bytes:
    if why is None:
        return _sealed(_DISTRUST.pack(_TRUST_MAGIC, 0, 0))
    reason = why.reason.encode(errors="backslashreplace")[: _RECORD_BYTES - _DISTRUST.size - 4]
    return _sealed(_DISTRUST.pack(_DISTRUST_MAGIC, why.since_ns, len(reason)) + reason)


def _disk_record(kept: bytes) -> bytes:
    """Pack a description; one that is too long, as only an endless URI could make it, is not kept."""
    kept = kept if len(kept) <= _DISK_BYTES - _DISK.size - 4 else b""
    return _sealed(_DISK.pack(_DISK_MAGIC, len(kept)) + kept, _DISK_BYTES)


def _sealed(record: bytes, size: int = _RECORD_BYTES) -> bytes:
    body = record.ljust(size - 4, b"\0")
    return body + crc32(body).to_bytes(4, "little")


def _read(path: str, offset: int, size: int = _RECORD_BYTES) -> bytes | None:
    if not os.path.exists(path):
        return None
    with os_errors_at(path), open(path, "rb", buffering=0) as source:
        source.seek(offset)
        record = source.read(size)
    whole = len(record) == size and crc32(record[:-4]) == int.from_bytes(record[-4:], "little")
    return record if whole else None
