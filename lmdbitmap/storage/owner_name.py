"""How an owner keeps the name of its file, by which others find that the disk has an owner.

If its file is removed or replaced under it, the owner takes the one that has the name by then, at the next beat. One
that was moved is kept too: it may be in the store, which was moved and is written to as before.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time

from lmdbitmap.errors import Busy
from lmdbitmap.storage import owner_file
from lmdbitmap.storage.owner_file import BEAT, FILE_BYTES, TRUST, Beat, Distrust, Part
from lmdbitmap.system import atomic_files, file_locks, files
from lmdbitmap.system.file_locks import LockedFile

log = logging.getLogger(__name__)

_LOCK_TRIES = 5
_LOCK_PAUSE_S = 0.02
OWNED_TWICE = "its owner's file was removed or replaced, and another process owned the disk too"


class KeptName:
    """The files that an owner has locked for the name `path`. Raises `Busy` while another owner has that one locked.

    For one thread at a time. Raises `OSError`.
    """

    def __init__(self, path: str) -> None:
        _require_file(path)
        self._lock = _lock_patiently(path)
        self._path = path
        self._elsewhere: list[LockedFile] = []
        """Files that were ours and have another name now: who finds the store there must not own the disk either."""
        self._last: Beat | None = None
        self.was_owned_twice = False
        """Whether another process owned the disk too, so that it was distrusted."""

    def read(self, part: Part) -> bytes | None:
        return owner_file.read(self._lock.fd, part)

    def put(self, record: bytes, part: Part, *, durable: bool) -> None:
        owner_file.put(self._lock.fd, record, part, durable=durable)
        for file in self._elsewhere:
            with contextlib.suppress(OSError):
                owner_file.put(file.fd, record, part, durable=durable)

    def put_beat(self, beat: Beat, *, durable: bool) -> None:
        """Raises `Busy` if another process has taken the file of our name: then the disk is distrusted."""
        self._keep(beat.time_ns)
        self.put(owner_file.sealed_beat(beat), BEAT, durable=durable)
        self._last = beat

    def is_lost(self) -> bool:
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

    def _keep(self, time_ns: int) -> None:
        """If another file or none has our file's name, take that one, with all that ours says: else another process
        could own the disk as well."""
        if not self.is_lost():
            return
        try:
            taken = self._file_of_the_name()
        except Busy:
            self._distrust_both(time_ns)
            raise
        try:
            if self._was_owned_by_another():
                self._distrust_both(time_ns)
            content = files.pread_whole(self._lock.fd, FILE_BYTES, 0)
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

    def _file_of_the_name(self) -> LockedFile:
        with file_locks.lock_folder(os.path.dirname(self._path)):
            if not os.path.exists(self._path):
                content = files.pread_whole(self._lock.fd, FILE_BYTES, 0)
                atomic_files.replace(self._path, content, like_folder=True)
            return self._moved_back() or _lock_patiently(self._path)

    def _moved_back(self) -> LockedFile | None:
        for number, file in enumerate(self._elsewhere):
            if file.is_named():
                return self._elsewhere.pop(number)
        return None

    def _was_owned_by_another(self) -> bool:
        """Whether somebody beat in the file of our name after we last did in ours."""
        theirs, ours = owner_file.last_beat(self._path), self._last
        if theirs is None or ours is None or theirs.boot_id != ours.boot_id:
            return False
        return theirs.awake_ns > ours.awake_ns > 0

    def _distrust_both(self, time_ns: int) -> None:
        """Say so in our file and in the other one's, though we have no lock on that: it must not be believed either."""
        self.was_owned_twice = True
        record = owner_file.sealed_trust(Distrust(time_ns, OWNED_TWICE))
        self.put(record, TRUST, durable=True)
        with open(self._path, "r+b", buffering=0) as other:
            owner_file.put(other.fileno(), record, TRUST, durable=True)


def _require_file(path: str) -> None:
    """Make a file that is missing. One at a time does, so that nobody replaces a file that another has locked since."""
    if not os.path.exists(path):
        with file_locks.lock_folder(os.path.dirname(path)):
            if not os.path.exists(path):
                owner_file.create(path, Distrust(0, "the owner's file of this disk was missing"))


def _lock_patiently(path: str) -> LockedFile:
    """Lock the file; try a few times, since a caller of `owner.is_owned` holds the lock for a moment."""
    for _ in range(_LOCK_TRIES - 1):
        try:
            return file_locks.lock_file(path, like_folder=True)
        except Busy:
            time.sleep(_LOCK_PAUSE_S)
    return file_locks.lock_file(path, like_folder=True)
