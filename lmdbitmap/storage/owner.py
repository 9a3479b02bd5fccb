"""The one process that owns a disk: it holds the lock on the disk's file, and only it writes there.

The lock (flock) ends with `Owner.close` or with the process. owner_file.py says what is in the file, and owner_name.py
what becomes of it if it is taken away under its owner.
"""

from __future__ import annotations

import fcntl
import logging
import os
import threading
from collections.abc import Callable
from uuid import UUID

from lmdbitmap.errors import Busy, os_errors_at
from lmdbitmap.interfaces import StoreMark
from lmdbitmap.storage import owner_file
from lmdbitmap.storage.owner_file import BEAT, DISK, TRUST, UNMARKED, Beat, Distrust, Part
from lmdbitmap.storage.owner_name import OWNED_TWICE, KeptName
from lmdbitmap.system import kernel
from lmdbitmap.system.kernel import awake_ns as awake_ns
from lmdbitmap.system.kernel import boot_id as boot_id
from lmdbitmap.system.kernel import boot_time_ns as boot_time_ns

log = logging.getLogger(__name__)


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

    `store_mark` returns the store's mark for the beats, and `is_in_place` whether the store is still where it was.
    Safe for many threads, except `close`.
    """

    def __init__(
        self,
        path: str,
        store_mark: Callable[[], StoreMark] = lambda: UNMARKED,
        is_in_place: Callable[[], bool] = lambda: True,
    ) -> None:
        self._name = KeptName(path, is_in_place)
        self._path = path
        self._store_mark = store_mark
        self._writing = threading.Lock()
        """Held while `_name` is used to write."""

    def beat(
        self,
        time_ns: int,
        mtime_ns: int,
        sectors_written: int = 0,
        *,
        awake_ns: int = 0,
        session: UUID | None = None,
        durable: bool = False,
    ) -> None:
        """Leave a sign of life: one small write into the page cache, unless it must be durable on return.

        Raises `Busy` if the file was removed or replaced, and another process has taken the one of its name: then the
        disk is distrusted, as neither of the two records what the other writes.
        """
        beat = Beat(boot_id(), time_ns, mtime_ns, sectors_written, self._store_mark(), awake_ns, session)
        with self._writing, os_errors_at(self._path):
            self._name.put_beat(beat, durable=durable)

    def last_beat(self) -> Beat | None:
        return owner_file.beat_of(self._read(BEAT))

    def distrust(self) -> Distrust | None:
        return owner_file.distrust_of(self._read(TRUST))

    def declare_distrust(self, reason: str, time_ns: int) -> None:
        """Note that the bitmaps cannot be trusted from `time_ns` on. Durable on return; needs no space."""
        self._write_trust(Distrust(time_ns, reason))

    @property
    def was_owned_twice(self) -> bool:
        """Whether another process owned the disk too, so that it was distrusted."""
        return self._name.was_owned_twice

    def require_the_name(self) -> None:
        """Raise `Busy` while another process, which owned the disk too, has the file of our name."""
        if self._name.was_owned_twice and self._name.is_lost():
            raise Busy(f"{self._path}: {OWNED_TWICE}", next_step="stop one of the two")

    def restore_trust(self) -> None:
        """Withdraw distrust: a new epoch has begun, or a person vouches for the old one. Durable on return."""
        self._write_trust(None)
        self._name.was_owned_twice = False

    def keep_description(self, kept: bytes) -> None:
        """Keep the description from which a damaged store's disk is made again. Durable with the next durable beat."""
        if owner_file.description_of(self._read(DISK)) != kept:
            try:
                with self._writing:
                    self._name.put_description(kept)
            except OSError as error:  # an older, shorter file on a full disk: nothing is lost by it now
                log.warning("%s: the disk's description could not be kept: %s", self._path, error)

    def _write_trust(self, why: Distrust | None) -> None:
        with self._writing, os_errors_at(self._path):
            self._name.put_trust(why)

    def _read(self, part: Part) -> bytes | None:
        with self._writing, os_errors_at(self._path):
            return self._name.read(part)

    def close(self) -> None:
        self._name.close()
