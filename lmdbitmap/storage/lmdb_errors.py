"""LMDB's errors as errors of this package, each with its next step."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

import lmdb

from lmdbitmap.errors import Busy, FormatError, LmdbitmapError, StorageError
from lmdbitmap.storage import lmdb_tree, schema
from lmdbitmap.system import file_systems

FULL_STEPS = {
    errno.ENOSPC: "free some space there and try again",
    errno.EDQUOT: "raise the quota or free some space there, and try again",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f), or use another file system",
    errno.ENOMEM: "give the process more address space (ulimit -v): the store's file is mapped as a whole",
    errno.ENOBUFS: "change less at once: forget checkpoints one by one, or choose a larger granularity",
}
_DAMAGE = (lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.NotFoundError, lmdb.IncompatibleError)
"""The last two are of a database that has its name and cannot be opened."""
PERHAPS_DAMAGE = (lmdb.BadTxnError, lmdb.CursorFullError, lmdb.PageFullError, lmdb.BadValsizeError)
MAKE_ANEW = (
    "its file is damaged: look at the disk under it, then stop and start every program that uses the store; it is"
    " made anew then, and the next backups are full ones"
)
_EXAMINE = "stop and start every program that uses the store: its file is examined then, and made anew if it is damaged"
_LOOK = "see what the system's log says"


class CommitInDoubt(StorageError):
    """The last step of a commit, the write of a meta page, failed. It may have taken place all the same, now or after a
    power cut: do not rely on the state before it.
    """


class DamagedStore(FormatError):
    """The file is not what LMDB and we wrote. If no other process has it open it is made anew (salvage.py)."""

    def __init__(self, path: str, *, expected: str, found: object) -> None:
        super().__init__(f"store {path}", expected=expected, found=found, next_step=MAKE_ANEW)


class FullMapError(Exception):
    """The map is too small for a transaction: grow it, and run the transaction again."""


@contextlib.contextmanager
def translated(path: str) -> Iterator[None]:
    """Turn LMDB's errors into errors of this package, except a full map, which the caller enlarges."""
    try:
        yield
    except lmdb.MapFullError as error:
        raise FullMapError from error
    except lmdb.Error as error:
        raise our_error(path, error) from error
    except SystemError as error:  # some of py-lmdb's methods, such as `Cursor.delete`, wrap an error so
        if isinstance(error.__cause__, lmdb.Error):
            raise our_error(path, error.__cause__) from error.__cause__
        raise
    except PermissionError as error:
        raise StorageError(f"store {path}", error, next_step="run as the user who owns the store") from error


def our_error(path: str, error: lmdb.Error) -> LmdbitmapError:
    if isinstance(error, lmdb.LockError) or error.code == errno.EAGAIN:
        return Busy(
            f"store {path} cannot be locked: a process with this one's number, in another container, has it open",
            next_step="let one process own the store, and reach it over its socket",
        )
    if isinstance(error, lmdb.ReadersFullError):
        return Busy(
            f"store {path} has as many views open as there is room for",
            next_step="try again; `lmdbitmap check` names processes whose views stay open",
        )
    if isinstance(error, _DAMAGE):
        return DamagedStore(path, expected="a sound environment", found=str(error))
    if isinstance(error, lmdb.InvalidError | lmdb.VersionMismatchError):
        is_damaged = lmdb_tree.is_unsound(path)
        return (
            DamagedStore(path, expected="an LMDB file", found=error)
            if is_damaged
            else not_a_store(path, error)
        )
    if isinstance(error, lmdb.ReadonlyError) or error.code in (errno.EACCES, errno.EROFS, errno.EPERM):
        cause = _os_error(error.code if 0 < error.code < 1000 else errno.EACCES)
        return StorageError(
            f"store {path}", cause, next_step="run as the user who owns the store, on a writable folder"
        )
    return _refusal(path, error)


def in_doubt(path: str, error: lmdb.Error) -> CommitInDoubt:
    refused = _refusal(path, error)
    cause = OSError(refused.errno, refused.strerror)
    return CommitInDoubt(refused.place, cause, next_step=refused.next_step)


def not_open(path: str) -> StorageError:
    return StorageError(
        f"store {path}",
        OSError(errno.EIO, "it is not open"),
        next_step=f"{_LOOK}, and try again",
    )


def not_the_same(path: str, what: str) -> StorageError:
    return StorageError(
        f"store {path}",
        OSError(errno.ESTALE, f"it is not what it was when it was opened: {what}"),
        next_step="stop this program, and start it again",
    )


def _refusal(path: str, error: lmdb.Error) -> StorageError:
    """LMDB reports a full disk as a short write (EIO); the free space tells which it was."""
    code = error.code if 0 < error.code < 1000 else errno.EIO
    if isinstance(error, lmdb.TxnFullError):
        code = errno.ENOBUFS
    if code == errno.EIO and _is_full(path):
        code = errno.ENOSPC
    if code in FULL_STEPS and code != errno.ENOBUFS:
        return StorageError(f"store {path}", _os_error(code), next_step=FULL_STEPS[code])
    step = _EXAMINE if isinstance(error, PERHAPS_DAMAGE) else FULL_STEPS.get(code, _LOOK)
    return StorageError(f"store {path}", OSError(code, str(error)), next_step=step)


def _os_error(code: int) -> OSError:
    return OSError(code, os.strerror(code))


def _is_full(path: str) -> bool:
    try:
        return file_systems.free_bytes(path) < 1 << 20
    except OSError:
        return False


def not_a_store(path: str, found: object) -> FormatError:
    return FormatError(
        f"store {path}", expected=f"{schema.STORE_MAGIC!r}, schema {schema.SCHEMA_VERSION}", found=found,
        next_step="name another folder, or an empty one to make a new store",
    )  # fmt: skip


def dead_error(path: str) -> StorageError:
    return StorageError(
        f"store {path}",
        OSError(errno.EBADF, "it was opened before this process was forked"),
        next_step="open the store again in this process",
    )
