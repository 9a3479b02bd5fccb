"""One LMDB environment as this process has it open: its settings, its map, its transactions, its refusals.

Invariants:
- A transaction that returned is on stable storage (`sync` and `metasync` are on, `writemap` is off).
- One process opens an environment once, however often it is asked for (LMDB's locks belong to the process), and
  only where those who use it are seen to use it (presence.py).
- Nobody has a transaction open while the map is replaced; a thread that has one may not ask for it.
- LMDB refuses everything once the write of a meta page failed, and gives its map up when it cannot have a larger one.
  The environment is then opened anew, as a restart would, as soon as no transaction is open; whoever committed is
  told that the outcome is in doubt.
- What a fork inherits is dead in the child: neither used nor committed, aborted or closed there. To abort or
  close it would give back the parent's places in the table of readers, and with them the pages it reads.
- The places of readers that died are given back when the environment is opened, once a minute, and when none is left.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import struct
import threading
import time
from collections.abc import Iterator

import lmdb

from lmdbitmap import files, forks, presence, schema
from lmdbitmap.errors import Busy, FormatError, LmdbitmapError, StorageError
from lmdbitmap.highwater import NEWEST, HighWater
from lmdbitmap.schema import StoreHeader

log = logging.getLogger(__name__)

MAP_BYTES = 64 << 30
"""Address space reserved at open; it costs no memory and no disk, and is more than most stores ever need."""
MIN_MAP_BYTES = 1 << 30
MAX_READERS = 1024
HOUSEKEEPING_S = 60.0
LOCK_LOOK_S = 0.4
"""Less than an opener's patience in presence.py, and than the pause between two background passes."""
LOOKED_THROUGH_BYTES = 32 << 20
"""A file up to this size is looked through before LMDB may touch it: 0.2 s. A larger one is by `check`, and here
where those who opened it before died young: LMDB trusts its pages, and a damaged one can take the process with it."""
DEATHS_IN_A_ROW = 2
YOUTH_S = 10.0
HEADER_KEY = b"store"
_MOST_MISSING_BYTES = 64 << 20
_BEGIN_TRIES = 16
_MAX_DATABASES = 16
FULL_STEPS = {
    errno.ENOSPC: "free some space there and try again",
    errno.EDQUOT: "raise the quota or free some space there, and try again",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f), or use another file system",
    errno.ENOMEM: "give the process more address space (ulimit -v): the store's file is mapped as a whole",
    errno.ENOBUFS: "change less at once: forget checkpoints one by one, or choose a larger granularity",
}
MAKE_ANEW = (
    "its file is damaged: look at the disk under it, then stop and start every program that uses the store; it is"
    " made anew then, and the next backups are full ones"
)
DATABASES = ("meta", "disks", "checkpoints", "bitmaps", "regions", "tallies")


class CommitInDoubt(StorageError):
    """The last step of a commit failed, the write of a meta page: it may have taken place all the same, now or
    after a power cut. Whoever goes on from what was before must not rely on it."""


class DamagedStore(FormatError):
    """The file is not what LMDB and we wrote. Where nobody else has it open it is made anew (salvage.py)."""

    def __init__(self, path: str, *, expected: str, found: object) -> None:
        super().__init__(f"store {path}", expected=expected, found=found, next_step=MAKE_ANEW)


class FullMapError(Exception):
    """The map is too small for a transaction: grow it, and run the transaction again."""


class _Databases(dict[str, lmdb._Database]):
    """By name. Emptied in a forked child, so that a view from before the fork finds nothing to read."""

    place = ""

    def __missing__(self, name: str) -> lmdb._Database:
        raise dead_error(self.place)


class Environment:
    """The one LMDB handle of this process for the environment in the folder `path`, with the room it grows in."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.pid = os.getpid()
        self.users = 0
        self.databases = _Databases()
        self.databases.place = path
        self._quiet = threading.Condition()
        self._running = 0
        self._resizing = False
        self._mine = threading.local()
        self._has_handle = True
        self._born_s = self._cleaned_s = self._looked_s = time.monotonic()
        self._is_young = True
        self.is_proven = False
        """Whether somebody looked through what is in it, or cannot know: others have it open."""
        with translated(path), presence.entering(path) as self._presence:
            self.is_proven = not self._presence.is_first
            if self._presence.is_first and self._is_suspect():
                _require_sound_tree(path)
            self._lmdb = open_lmdb(path)
            try:
                self._presence.settle()
                self._open_databases()
                self.header = self._read_header()
                self._lmdb.reader_check()
            except BaseException:
                self._lmdb.close()
                raise
        self.highwater = HighWater(os.path.join(os.path.dirname(path), NEWEST), self.header.uuid)
        forks.is_not_for_children(self)

    def _is_suspect(self) -> bool:
        """Whether the file is to be looked through first: it is small, or whoever opened it died of something."""
        deaths = self._presence.begin_life()
        return os.path.getsize(_data_path(self.path)) <= LOOKED_THROUGH_BYTES or deaths >= DEATHS_IN_A_ROW

    @contextlib.contextmanager
    def transaction(self, *, write: bool) -> Iterator[lmdb.Transaction]:
        """A transaction, committed on the way out; a refusal of LMDB leaves as an error of ours.

        Raises `FullMapError` where the map must grow.
        """
        with translated(self.path):
            txn = self._begin(write)
            try:
                if write:
                    self._keep_house()
                yield txn
                self._require_our_process()
                txn.commit()
            except lmdb.Error as error:
                txn.abort()
                if self._is_spent():  # looked up before we are counted out, as somebody may open it anew then
                    raise _in_doubt(self.path, error) from error
                raise
            except BaseException:
                if self.pid == os.getpid():
                    txn.abort()
                raise
            finally:
                self._count(-1)

    def grow(self) -> None:
        """Double the map."""
        with translated(self.path):
            size = self._lmdb.info()["map_size"]
            self._resize_map(max(2 * size, size + MIN_MAP_BYTES))
            log.info("store %s: map grown to %d bytes", self.path, self._lmdb.info()["map_size"])

    def keep_house(self) -> None:
        """Cheap, and to be called often: see to our locks, and once a minute to readers that died."""
        with self.transaction(write=False):
            self._keep_house()

    def _keep_house(self) -> None:
        now_s = time.monotonic()
        if self._is_young and now_s - self._born_s >= YOUTH_S:
            self._is_young = False
            self._presence.is_well()
        if now_s - self._looked_s >= LOCK_LOOK_S:
            self._looked_s = now_s
            self._mend_locks()
        if now_s - self._cleaned_s >= HOUSEKEEPING_S:
            self._cleaned_s = now_s
            freed = self._lmdb.reader_check()
            if freed:
                log.warning("store %s: gave back the places of %d readers that died", self.path, freed)

    def _mend_locks(self) -> None:
        if self._presence.mend_locks():
            log.error(
                "store %s: something in this process closed lmdb/lock.mdb, which dropped LMDB's locks; they are held"
                " again, but whoever reads, hashes or packs these files must stop doing so", self.path,
            )  # fmt: skip

    def readers(self) -> list[tuple[int, int]]:
        """(process, how many transactions its view lies behind) of every view that is open at this moment."""
        with translated(self.path):
            newest = self._lmdb.info()["last_txnid"]
            rows = [line.split() for line in self._lmdb.readers().splitlines()[1:]]
        return [(int(row[0]), newest - int(row[2])) for row in rows if len(row) == 3 and row[2].isdigit()]

    def structural_problems(self) -> list[str]:
        """What is wrong with the tree of pages, of a copy that nobody changes. It takes the file's size in memory."""
        with self.transaction(write=False), open(os.memfd_create("lmdbitmap check"), "wb") as copy:
            self._lmdb.copyfd(copy.fileno())
            try:
                return structural_problems(f"/proc/self/fd/{copy.fileno()}")
            except ValueError as error:
                return [str(error)]

    def close(self) -> None:
        self._presence.is_well()
        self._presence.leave()
        self._lmdb.close()
        self._presence.close()
        self.highwater.close()

    def forsake(self) -> None:
        """We are in a forked child. The parent's locks must not live on in us; the rest is only left alone."""
        self.databases.clear()
        del self._lmdb  # not closed, see the top of this module
        self._presence.close()
        self.highwater.close()

    def _require_our_process(self) -> None:
        if self.pid != os.getpid():
            raise dead_error(self.path)

    def _begin(self, write: bool) -> lmdb.Transaction:
        """Begin and count; another process may have grown the map, and do so again before we have followed it,
        or readers that died may hold every slot."""
        for _ in range(_BEGIN_TRIES - 1):
            try:
                return self._begin_counted(write)
            except lmdb.MapResizedError:
                self._resize_map(0)
            except lmdb.ReadersFullError:
                self._lmdb.reader_check()
            except (lmdb.PanicError, StorageError):
                self._open_anew()
        return self._begin_counted(write)

    def _begin_counted(self, write: bool) -> lmdb.Transaction:
        with self._quiet:
            self._quiet.wait_for(lambda: not self._resizing or self._has_one_open())
            self._count(1)
        try:
            if not self._has_handle:
                raise _not_open(self.path)
            return self._lmdb.begin(write=write)
        except BaseException:
            self._count(-1)
            raise

    def _count(self, difference: int) -> None:
        if self.pid != os.getpid():
            return  # another thread of the parent may have held the lock at the fork
        with self._quiet:
            self._mine.open = getattr(self._mine, "open", 0) + difference
            self._running += difference
            self._quiet.notify_all()

    def _has_one_open(self) -> bool:
        """Whether the calling thread has a transaction open, and may not be made to wait for its end."""
        return bool(getattr(self._mine, "open", 0))

    def _resize_map(self, size: int) -> None:
        """0 is what others made of it. A map that cannot be had costs the handle its old one: then open it anew."""
        with self._exclusively():
            try:
                self._lmdb.set_mapsize(size)
            except lmdb.MemoryError:
                self._reopen()
                raise

    def _open_anew(self) -> None:
        """Begin again with what is in the file, as a restart would."""
        if self._has_one_open():
            raise _not_open(self.path)  # the caller's own view is in the way
        with self._exclusively():
            if self._has_handle and not self._is_spent():
                return  # another thread was first
            self._reopen()
        log.warning("store %s: opened anew, as LMDB had given it up", self.path)

    def _is_spent(self) -> bool:
        """Whether LMDB refuses everything, because the write of a meta page failed."""
        try:
            self._lmdb.begin().abort()
        except lmdb.PanicError:
            return True
        except lmdb.Error:
            return False
        return False

    @contextlib.contextmanager
    def _exclusively(self) -> Iterator[None]:
        """LMDB asks that no transaction of this process is open; new ones of other threads wait."""
        if self._has_one_open():
            raise StorageError(
                f"store {self.path}: its map must grow, which a view that this thread has open keeps it from",
                OSError(errno.EDEADLK, "view open"),
                next_step="change the store after the view was left, not inside it",
            )
        with self._quiet:
            self._resizing = True
            try:
                self._quiet.wait_for(lambda: self._running == 0)
                self._mine.open = 1  # so that we may begin transactions all the same
                yield
            finally:
                self._mine.open = 0
                self._resizing = False
                self._quiet.notify_all()

    def _reopen(self) -> None:
        """Called inside `_exclusively`."""
        self._has_handle = False
        self._presence.leave()
        self._lmdb.close()
        self._presence.close()
        with presence.entering(self.path) as self._presence:
            self._lmdb = open_lmdb(self.path)
            self._presence.settle()
            self._has_handle = True
            self._open_databases()

    def _open_databases(self) -> None:
        with self.transaction(write=False):
            pass  # LMDB takes the lock of a process that reads, which `_keep_house` looks for
        self._fill_up()
        with self.transaction(write=True) as txn:  # ours, because another process may be growing the map
            self._require_databases(txn)
            for name in DATABASES:
                self.databases[name] = self._lmdb.open_db(name.encode(), txn=txn, create=False)

    def _require_databases(self, txn: lmdb.Transaction) -> None:
        with txn.cursor() as cursor:
            missing = set(DATABASES) - {
                bytes(key).decode(errors="replace") for key in cursor.iternext(values=False)
            }
        if missing == set(DATABASES):
            raise not_a_store(self.path, "another program's environment")
        if missing:
            raise DamagedStore(self.path, expected=f"databases {DATABASES}", found=f"none called {missing}")

    def _fill_up(self) -> None:
        """Give a file that was cut its length again: its missing pages would be SIGBUS, those of zeroes are damage.

        A sound file may lack pages that were never used, so its length alone proves nothing.
        """
        data_path = _data_path(self.path)
        size, used = os.path.getsize(data_path), self._used_bytes()
        if size >= used:
            return
        if used - size > max(size, _MOST_MISSING_BYTES):
            raise DamagedStore(self.path, expected=f"a data.mdb of {used} bytes", found=f"one of {size}")
        with self.transaction(write=True):  # nobody else changes the length meanwhile
            if os.path.getsize(data_path) < self._used_bytes() <= self._lmdb.info()["map_size"]:
                os.truncate(data_path, self._used_bytes())

    def _used_bytes(self) -> int:
        page_bytes: int = self._lmdb.stat()["psize"]
        return (self._lmdb.info()["last_pgno"] + 1) * page_bytes

    def _read_header(self) -> StoreHeader:
        with self.transaction(write=False) as txn:
            value = bytes(txn.get(HEADER_KEY, db=self.databases["meta"]) or b"")
        if not schema.is_whole(value):
            raise DamagedStore(
                self.path, expected="a header that matches its CRC-32", found=f"{len(value)} bytes"
            )
        header = schema.decode(StoreHeader, value, place=self.path)
        if header.magic != schema.STORE_MAGIC:
            raise not_a_store(self.path, header.magic)
        return header


# --- one per process ---


class _OpenOnes:
    """The environments that this process has open, by device and inode of their data.mdb: it may have several paths."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.by_file: dict[tuple[int, int], Environment] = {}

    def forsake(self) -> None:
        self.lock = threading.Lock()  # a thread that is not here may hold the old one
        self.by_file = {}


open_ones = _OpenOnes()


def acquire(path: str) -> Environment:
    """This process's handle for the environment in `path`, opened at the first call. `release` it."""
    with open_ones.lock:
        environment = open_ones.by_file.get(_file_key(path))
        if environment is None:
            forks.is_not_for_children(open_ones)
            environment = Environment(path)
            open_ones.by_file[_file_key(path)] = environment  # it may have been made anew while we waited
        environment.users += 1
        return environment


def _file_key(path: str) -> tuple[int, int]:
    try:
        status = os.stat(_data_path(path))
    except FileNotFoundError as error:  # somebody is making it anew at this moment
        raise DamagedStore(path, expected="an environment", found="none") from error
    return status.st_dev, status.st_ino


def release(environment: Environment) -> None:
    if environment.pid != os.getpid():
        return
    with open_ones.lock:
        environment.users -= 1
        if environment.users == 0:
            for key in [key for key, value in open_ones.by_file.items() if value is environment]:
                del open_ones.by_file[key]
            environment.close()


# --- opening ---


def open_lmdb(path: str, *, create: bool = False) -> lmdb.Environment:
    """Open with the settings that durability rests on; ask for less address space where there is a limit."""
    _refuse_network_filesystem(path)
    data_path = _data_path(path)
    wanted = max(MAP_BYTES, 2 * os.path.getsize(data_path) if os.path.exists(data_path) else 0)
    while True:
        try:
            with translated(path):
                return lmdb.open(
                    path, map_size=wanted, subdir=True, create=create, mode=0o600, lock=True,
                    sync=True, metasync=True, writemap=False, map_async=False, meminit=True, readahead=False,
                    max_readers=MAX_READERS, max_dbs=_MAX_DATABASES, max_spare_txns=0, lib_version=0,
                )  # fmt: skip
        except StorageError as error:
            if error.errno != errno.ENOMEM or wanted // 2 < MIN_MAP_BYTES:
                raise
            wanted //= 2


def _refuse_network_filesystem(path: str) -> None:
    kind = files.filesystem_kind(path)
    if files.is_network_filesystem(kind):
        raise StorageError(
            f"store {path} on {kind}",
            OSError(errno.ENOTSUP, "network file system"),
            next_step="keep the store on a local disk: LMDB's locks and memory map do not work across a network",
        )


# --- the tree of pages ---


def _require_sound_tree(path: str) -> None:
    """Of a file that nobody has open. LMDB trusts its pages: a damaged one can take the process with it."""
    try:
        problems = structural_problems(_data_path(path))
    except ValueError as error:
        raise DamagedStore(path, expected="an LMDB file", found=error) from error
    if problems:
        found = f"{problems[0]} ({len(problems)} in all)"
        raise DamagedStore(path, expected="a sound tree of pages", found=found)


def _is_unsound(path: str) -> bool:
    """Whether the file is damaged, rather than of a kind that we do not know."""
    try:
        return bool(structural_problems(_data_path(path)))
    except ValueError:
        return True
    except OSError:
        return False


def structural_problems(data_path: str) -> list[str]:
    """What is wrong with the tree of pages in a file that does not change; it is read without LMDB.

    A page that is only lost for use harms nobody, and the count of overflow pages, which we have in the list of free
    pages only, is known to be called wrong where it is right. Raises `ValueError` for what is no LMDB file at all.
    """
    from lmdb import verify  # longer to import than all the rest, and not needed for a store that is shared

    try:
        found: list[str] = verify.verify(data_path, subdir=False)  # type: ignore[no-untyped-call]
    except verify.VerifyError as error:
        raise ValueError(str(error)) from error
    except (struct.error, IndexError) as error:
        return [str(error)]
    return [problem for problem in found if "overflow" not in problem and "leak" not in problem]


def _data_path(path: str) -> str:
    return os.path.join(path, "data.mdb")


# --- refusals ---


@contextlib.contextmanager
def translated(path: str) -> Iterator[None]:
    """LMDB's refusals as errors of ours, except a full map, which the caller mends."""
    try:
        yield
    except lmdb.MapFullError as error:
        raise FullMapError from error
    except lmdb.Error as error:
        raise our_error(path, error) from error
    except SystemError as error:  # what some of py-lmdb's methods make of a refusal, such as `Cursor.delete`
        if isinstance(error.__cause__, lmdb.Error):
            raise our_error(path, error.__cause__) from error
        raise
    except PermissionError as error:
        raise StorageError(f"store {path}", error, next_step="run as the user who owns the store") from error


def our_error(path: str, error: lmdb.Error) -> LmdbitmapError:
    if isinstance(error, lmdb.LockError) or error.code == errno.EAGAIN:
        return Busy(
            f"store {path} cannot be locked: a process with this one's number, in another container, has it open",
            next_step="let one process own the store, and reach it over its socket",
        )
    if isinstance(error, lmdb.CorruptedError | lmdb.PageNotFoundError):
        return DamagedStore(path, expected="a sound environment", found=str(error))
    if isinstance(error, lmdb.InvalidError | lmdb.VersionMismatchError):
        is_damaged = _is_unsound(path)
        return (
            DamagedStore(path, expected="an LMDB file", found=error)
            if is_damaged
            else not_a_store(path, error)
        )
    if isinstance(error, lmdb.ReadonlyError) or error.code in (errno.EACCES, errno.EROFS, errno.EPERM):
        cause = OSError(error.code if 0 < error.code < 1000 else errno.EACCES, str(error))
        return StorageError(
            f"store {path}", cause, next_step="run as the user who owns the store, on a writable folder"
        )
    return _refusal(path, error)


def _in_doubt(path: str, error: lmdb.Error) -> CommitInDoubt:
    refused = _refusal(path, error)
    cause = OSError(refused.errno, str(error))
    return CommitInDoubt(refused.place, cause, next_step=refused.next_step)


def _not_open(path: str) -> StorageError:
    return StorageError(
        f"store {path}",
        OSError(errno.EIO, "not open"),
        next_step="see what the system's log says, and try again",
    )


def _refusal(path: str, error: lmdb.Error) -> StorageError:
    """LMDB reports a full disk as a short write (EIO); the free space tells which it was."""
    code = error.code if 0 < error.code < 1000 else errno.EIO
    if isinstance(error, lmdb.TxnFullError):
        code = errno.ENOBUFS
    if code == errno.EIO and _is_full(path):
        code = errno.ENOSPC
    step = FULL_STEPS.get(code) or f"see what the system's log says ({error})"
    return StorageError(f"store {path}", OSError(code, str(error)), next_step=step)


def _is_full(path: str) -> bool:
    try:
        return files.free_bytes(path) < 1 << 20
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
        OSError(errno.EBADF, "of another process"),
        next_step="open the store in the process that uses it: a forked child cannot go on with its parent's",
    )
