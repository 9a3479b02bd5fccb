"""Which processes use a store at this moment, by locks that an accident does not drop.

LMDB's own locks on lock.mdb belong to a process as a whole. They end as soon as *any* descriptor of that file is closed
in the process: a backup agent that hashes or packs its state folder does just that. The next process would then take
itself for the first one, and clear the table that keeps readers' pages from being written over. So every process that
has the environment open also holds

    STORE/users   a shared flock, for as long as it has the environment open
                  an exclusive lock on byte 0 (of the open file), while it opens the environment
                  and in byte 0, how many first openers in a row died young, perhaps of a damaged page; 255 once
                  LMDB came upon one

A process refuses to open an environment that others have open if none of these has LMDB's lock, as where lock.mdb was
removed: with a lock file of its own it would write at the same time. A process that lost its locks takes them again as
soon as it checks them.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import time
from collections.abc import Iterator

from lmdbitmap.errors import Busy, os_errors_at
from lmdbitmap.storage.lmdb_tree import data_path_of
from lmdbitmap.system import files, kernel

USERS = "users"
_FLOCK = struct.Struct("hhqqi0q")  # l_type, l_whence, l_start, l_len, l_pid; 0q pads the end as C does
_FIRST_BYTE = 0
"""The byte of lock.mdb on which every process that has the environment open holds a shared lock."""
SICK = 255
"""What is counted once LMDB came upon damage: the next first opener looks for it."""
_TURN_TRIES = 500
_LOOKS = 75
_PAUSE_S = 0.02


class Presence:
    """This process's mark that it has an environment open."""

    def __init__(self, users_fd: int, folder: str) -> None:
        self._users_fd = users_fd
        self._lock_fd = -1
        self._lock_path = _lock_path_of(folder)
        self._data_path = data_path_of(folder)
        self.is_first = False
        """Whether nobody else had the environment open when we did."""

    def look_before(self, place: str) -> None:
        """Raise `Busy` unless the environment's users have LMDB's locks, or there are no users.

        Retries: a server that lost its locks soon takes them again, and a dying process does not drop all its locks
        at the same instant.
        """
        if os.path.exists(self._lock_path):
            self._lock_fd = _open_lock_file(self._lock_path)
        self.is_first = not self._others_live()
        is_gone = self._lock_fd < 0 and not os.path.exists(self._data_path)
        for _ in range(_LOOKS):
            if is_gone or not _others_hold(self._users_fd) or self._lmdb_is_locked():
                return
            time.sleep(_PAUSE_S)
        raise self._refused(place)

    def _refused(self, place: str) -> Busy:
        users = f"store {place} is used by {_holders_of(self._users_fd)}"
        if self._lock_fd < 0:
            return Busy(
                f"{users}, under which lmdb/lock.mdb was removed: we would write to the store at the same time",
                next_step="stop that program, and start it again",
            )
        return Busy(
            f"{users}, in which lmdb/lock.mdb was closed by something that is not LMDB, so that its locks are gone",
            next_step="try again in a minute, or restart that program, and see what opens the store's files",
        )

    def is_alone(self) -> bool:
        """Whether no other process has the environment open. Waits for one that only tried to open it."""
        for _ in range(_LOOKS):
            if not self._others_live():
                return True
            time.sleep(_PAUSE_S)
        return False

    def _others_live(self) -> bool:
        """Whether another process has the environment open, even if `users` was removed under it."""
        return _others_hold(self._users_fd) or self._lmdb_is_locked()

    def _lmdb_is_locked(self) -> bool:
        return self._lock_fd >= 0 and _is_locked(self._lock_fd, _FIRST_BYTE)

    def begin_life(self) -> int:
        """Count this first opener as dying young, until `is_well`; return how many in a row before it did, or `SICK`.

        Where the file cannot be written, as on a full disk, nothing is counted.
        """
        deaths = 0
        with contextlib.suppress(OSError):
            deaths = int.from_bytes(os.pread(self._users_fd, 1, 0), "little")
            os.pwrite(self._users_fd, bytes([min(deaths + 1, SICK - 1)]), 0)
        return deaths

    def is_well(self) -> None:
        """Reset the count: this opener has lived for a while or ended cleanly, so opening is not deadly."""
        with contextlib.suppress(OSError):
            if os.pread(self._users_fd, 1, 0) != bytes([SICK]):
                os.pwrite(self._users_fd, b"\0", 0)

    def is_sick(self) -> None:
        """Have the next first opener examine the environment, however large it is."""
        with contextlib.suppress(OSError):
            os.pwrite(self._users_fd, bytes([SICK]), 0)

    def settle(self) -> None:
        """Keep a descriptor for checking LMDB's locks, now that the environment is open."""
        if self._lock_fd < 0:
            with os_errors_at(self._lock_path):
                self._lock_fd = _open_lock_file(self._lock_path)

    def mend_locks(self) -> bool:
        """Take LMDB's locks again if something in this process dropped them; return whether it had.

        While another program is opening the environment it holds the first one: then the next call takes them.
        """
        if _is_locked(self._lock_fd, os.getpid()):
            return False
        with contextlib.suppress(BlockingIOError):
            fcntl.fcntl(self._lock_fd, fcntl.F_SETLK, _request(fcntl.F_RDLCK, _FIRST_BYTE))
            fcntl.fcntl(self._lock_fd, fcntl.F_SETLK, _request(fcntl.F_WRLCK, os.getpid()))
            return True
        return False

    def leave(self) -> None:
        """Stop being a user before the environment is closed: a user without LMDB's locks makes openers refuse."""
        self._users_fd = _closed(self._users_fd)

    def close(self) -> None:
        """Close the files after the environment. Unlock nothing: a forked child must not unlock its parent."""
        self.leave()
        self._lock_fd = _closed(self._lock_fd)


def _lock_path_of(folder: str) -> str:
    return os.path.join(folder, "lock.mdb")


def _open_lock_file(path: str) -> int:
    return os.open(path, os.O_RDWR | os.O_CLOEXEC)


def _closed(fd: int) -> int:
    if fd >= 0:
        os.close(fd)
    return -1


@contextlib.contextmanager
def entering(folder: str) -> Iterator[Presence]:
    """In the block the environment `folder` may be opened; no other process opens it meanwhile.

    Raises `Busy` if opening it would disturb its users, or this very process because another library in it has the
    environment open.
    """
    store = os.path.dirname(folder)
    lock_path = _lock_path_of(folder)
    _require_unopened(lock_path, store)
    users_path = os.path.join(store, USERS)
    with os_errors_at(users_path):
        presence = Presence(files.open_like_folder(users_path), folder)
    try:
        with _turn(presence._users_fd, store):
            with os_errors_at(lock_path):
                presence.look_before(store)
            yield presence
    except BaseException:
        presence.close()
        raise


@contextlib.contextmanager
def _turn(users_fd: int, place: str) -> Iterator[None]:
    for _ in range(_TURN_TRIES):
        try:
            fcntl.fcntl(users_fd, fcntl.F_OFD_SETLK, _request(fcntl.F_WRLCK, 0))
            break
        except BlockingIOError:
            time.sleep(_PAUSE_S)
    else:
        raise Busy(
            f"store {place} is being opened by another process, which takes too long",
            next_step=f"see what that process waits for (fuser -v {os.path.join(place, USERS)} names it)",
        )
    try:
        yield
    finally:
        fcntl.fcntl(users_fd, fcntl.F_OFD_SETLK, _request(fcntl.F_UNLCK, 0))


def _require_unopened(lock_path: str, place: str) -> None:
    """Raise `Busy` if this process has lock.mdb open: to open and close it again would drop the locks on it."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(f"/proc/self/fd/{name}"), os.stat(lock_path)):
                raise Busy(
                    f"store {place} is open in this process, outside of lmdbitmap",
                    next_step="close that LMDB environment first (a process can have it open once only), and fork"
                    " only where no view of the store is open",
                )


def _others_hold(users_fd: int) -> bool:
    """Whether another process holds the shared lock. This process holds it in any case afterwards."""
    try:
        fcntl.flock(users_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        fcntl.flock(users_fd, fcntl.LOCK_SH)


def _is_locked(fd: int, byte: int) -> bool:
    """Whether anybody, this process included, has a POSIX lock on the byte: a lock of an open file is a stranger."""
    answer: int = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _request(fcntl.F_WRLCK, byte)))[0]
    return answer != fcntl.F_UNLCK


def _request(kind: int, byte: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0)


def _holders_of(users_fd: int) -> str:
    """Name the holders of the shared lock, as far as /proc tells."""
    pids = kernel.flock_pids(os.fstat(users_fd), "READ")
    return f"process {', '.join(pids)}" if pids else "another process"
