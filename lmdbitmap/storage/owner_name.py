"""How an owner keeps the name of its file, by which others find that the disk has an owner.

At each beat it looks whether the name still leads to the file. If not, it locks the one that has the name by then, or
makes one. What it may say there depends on what became of its own file:

- removed or replaced, in a store that is where it was: the other file was put into this store instead. It gets all that
  ours says, trust included, and is ours from then on.
- moved, as with its store: ours is kept, and still is what the store goes by, wherever that is. The other one is a
  stranger. It may belong to a store that lacks changes, such as a copy that was put, or is being put, in the place of
  ours: so we never call it trusted, and its own distrust stays. One that we make for the name is distrusted.
- removed, and our store is not where it was: the same.

A stranger gets our distrust too, as it may be in our store after all. It gets our signs of life only there: in another
store they would vouch for the image, instead of those that tell how long nothing has been recorded there.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress

from lmdbitmap.errors import Busy
from lmdbitmap.storage import owner_file
from lmdbitmap.storage.owner_file import BEAT, DISK, FILE_BYTES, TRUST, Beat, Distrust, Part
from lmdbitmap.system import file_locks, files, kernel
from lmdbitmap.system.file_locks import LockedFile

log = logging.getLogger(__name__)

_LOCK_TRIES = 5
_LOCK_PAUSE_S = 0.02
OWNED_TWICE = "its owner's file was removed or replaced, and another process owned the disk too"


class KeptName:
    """The files that an owner has locked for the name `path`. Raises `Busy` while another owner has that one locked.

    `is_in_place` tells whether the store of our file is where it was. For one thread at a time. Raises `OSError`.
    """

    def __init__(self, path: str, is_in_place: Callable[[], bool]) -> None:
        _require_file(path)
        self._ours = _lock_patiently(path)
        self._stranger: LockedFile | None = None
        """The file that has our file's name, if ours has another one, or none."""
        self._path = path
        self._is_in_place = is_in_place
        self._last_ns = kernel.awake_ns()
        """When it last beat, or was locked, since the boot: whoever beats later owns the disk too."""
        self._why: Distrust | None = None
        """Our distrust, if there is any since the file was locked."""
        self.was_owned_twice = False
        """Whether another process owned the disk too, so that it was distrusted."""

    def read(self, part: Part) -> bytes | None:
        return owner_file.read(self._ours.fd, part)

    def put_description(self, kept: bytes) -> None:
        owner_file.put(self._ours.fd, owner_file.sealed_disk(kept), DISK, durable=False)

    def put_trust(self, why: Distrust | None) -> None:
        record = owner_file.sealed_trust(why)
        owner_file.put(self._ours.fd, record, TRUST, durable=True)
        self._why = why
        if self._stranger is not None and why is not None:
            owner_file.put(self._stranger.fd, record, TRUST, durable=True)

    def put_beat(self, beat: Beat, *, durable: bool) -> None:
        """Raises `Busy` if another process has taken the file of our name: then the disk is distrusted."""
        self._keep(beat.time_ns)
        if self._why is not None and owner_file.distrust_of(self.read(TRUST)) is None:
            self.put_trust(self._why)  # an older copy was written over the file, as `cp` does
        record = owner_file.sealed_beat(beat)
        owner_file.put(self._ours.fd, record, BEAT, durable=durable)
        if self._stranger is not None and self._is_in_place():
            with suppress(OSError):
                owner_file.put(self._stranger.fd, record, BEAT, durable=durable)
        self._last_ns = beat.awake_ns

    def is_lost(self) -> bool:
        """Not if its folder is gone too: then it was moved with the store. Nor if this process may not look any more,
        as one that gave up root: it can still write to the file that it has open.
        """
        try:
            return os.path.isdir(os.path.dirname(self._path)) and not (
                self._ours.is_named() or (self._stranger is not None and self._stranger.is_named())
            )
        except OSError:
            return False

    def close(self) -> None:
        try:
            self._leave_stranger()
        finally:
            self._ours.close()

    def _leave_stranger(self) -> None:
        stranger, self._stranger = self._stranger, None
        if stranger is not None:
            stranger.close()

    def _keep(self, time_ns: int) -> None:
        """Lock the file of our name, if that is another one by now: else another process could own the disk as well."""
        with suppress(OSError):
            if self._stranger is not None and not self._stranger.is_named():
                self._leave_stranger()
        if not self.is_lost():
            return
        try:
            taken = self._file_of_the_name()
        except Busy:
            self._distrust_both(time_ns, None)
            raise
        try:
            self._take(taken, time_ns)
        except BaseException:  # the next beat tries again, if it finds that the name is lost
            if taken not in (self._ours, self._stranger):
                taken.close()
            raise

    def _file_of_the_name(self) -> LockedFile:
        _require_file(self._path)
        return _lock_patiently(self._path)

    def _take(self, taken: LockedFile, time_ns: int) -> None:
        if self._was_owned_by_another(taken):
            self._distrust_both(time_ns, taken)
        if self._was_put_for_ours():
            content = files.pread_whole(self._ours.fd, FILE_BYTES, 0)
            files.pwrite_whole(taken.fd, content, 0)
            os.fdatasync(taken.fd)
            before, self._ours = self._ours, taken
            before.close()
            log.error("%s was removed or replaced under its owner, which goes on in the new one", self._path)
            return
        why = owner_file.distrust_of(self.read(TRUST))
        if why is not None:
            owner_file.put(taken.fd, owner_file.sealed_trust(why), TRUST, durable=True)
        self._stranger = taken
        log.error(
            "%s was moved away under its owner, and the file that is there now is not believed", self._path
        )

    def _was_put_for_ours(self) -> bool:
        """Whether the other file is in our store, in the place of ours. Called once that file is locked."""
        return os.fstat(self._ours.fd).st_nlink == 0 and self._is_in_place()

    def _was_owned_by_another(self, taken: LockedFile) -> bool:
        """Whether somebody beat in the file of our name after we last did in ours, or locked it."""
        theirs = owner_file.beat_of(owner_file.read(taken.fd, BEAT))
        return (
            theirs is not None and theirs.boot_id == kernel.boot_id() and theirs.awake_ns > self._last_ns > 0
        )

    def _distrust_both(self, time_ns: int, taken: LockedFile | None) -> None:
        """Say so in our file and in the other one's, though we may have no lock on that: neither must be believed."""
        why = Distrust(time_ns, OWNED_TWICE)
        try:
            self.put_trust(why)
            self.was_owned_twice = True  # not before: the guest then writes untracked (vouching.py)
        finally:
            fd = files.open_like_folder(self._path) if taken is None else taken.fd
            try:
                owner_file.put(fd, owner_file.sealed_trust(why), TRUST, durable=True)
            finally:
                if taken is None:
                    os.close(fd)


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
