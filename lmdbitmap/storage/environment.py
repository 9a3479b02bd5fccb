"""The LMDB environment that this process has open: its settings, its map, its transactions, its errors.

Invariants:
- A transaction that returned is on stable storage (`sync` and `metasync` are on, `writemap` is off).
- One process opens an environment once, however often it is acquired (LMDB's locks belong to the process), and only
  if its other users still hold LMDB's locks (presence.py).
- No transaction is open while the map is replaced; a thread that has one open may not replace the map.
- LMDB refuses everything once the write of a meta page failed, and gives its map up if it cannot get a larger one.
  The environment is then opened anew, as a restart would, as soon as no transaction is open. The caller that committed
  is told that the outcome is in doubt.
- Whoever uses an environment remembers what is in it. If it is opened anew, it must be the same file, and as new.
- An environment that a forked child inherits is dead there: neither used nor committed, aborted or closed. To abort or
  close it would free the parent's places in the table of readers, and with them the pages that the parent reads.
- The places of dead readers are freed when the environment is opened, once a minute, and when no place is left.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator

import lmdb

from lmdbitmap.errors import StorageError, os_errors_at
from lmdbitmap.storage import lmdb_opening, presence, schema
from lmdbitmap.storage.highwater import NEWEST, HighWater
from lmdbitmap.storage.lmdb_errors import (
    PERHAPS_DAMAGE,
    DamagedStore,
    dead_error,
    in_doubt,
    not_a_store,
    not_open,
    not_the_same,
    translated,
)
from lmdbitmap.storage.lmdb_opening import File, file_of, open_lmdb, require_sound_tree, reserve_lock_file
from lmdbitmap.storage.lmdb_tree import data_path_of, structural_problems
from lmdbitmap.storage.schema import StoreHeader
from lmdbitmap.storage.views import View, Views
from lmdbitmap.work import forks

log = logging.getLogger(__name__)

HOUSEKEEPING_S = 60.0
LOCK_LOOK_S = 0.4
"""Less than an opener's patience in presence.py, and than the pause between two background passes."""
LOOKED_THROUGH_BYTES = 32 << 20
"""A file up to this size is examined before LMDB may touch it: 0.2 s. A larger one is examined by `check`, and here if
LMDB came upon damage in it, or its earlier openers died young: LMDB trusts its pages, and a damaged page can crash the
process."""
DEATHS_IN_A_ROW = 2
YOUTH_S = 10.0
HEADER_KEY = b"store"
_MOST_MISSING_BYTES = 64 << 20
_BEGIN_TRIES = 16
DATABASES = ("meta", "disks", "checkpoints", "bitmaps", "regions", "tallies")


class _Databases(dict[str, lmdb._Database]):
    """LMDB's databases by name. Emptied in a forked child, so that a view from before the fork can read nothing."""

    place = ""

    def __missing__(self, name: str) -> lmdb._Database:
        raise dead_error(self.place)


class Environment:
    """The one LMDB handle of this process for the environment in the folder `path`, with the room it grows in."""

    def __init__(self, path: str, prove: Callable[[Environment], None]) -> None:
        self.path = path
        self.pid = os.getpid()
        self.users = 0
        self.databases = _Databases()
        self.databases.place = path
        self.disk_keys: dict[str, bytes] = {}
        """See `Reader`."""
        self._views = Views()
        self._has_handle = True
        self._born_s = self._cleaned_s = self._looked_s = time.monotonic()
        self._is_young = True
        with os_errors_at(path), translated(path), presence.entering(path) as self._presence:
            if self._presence.is_first:
                if self._is_suspect():
                    require_sound_tree(path)
                reserve_lock_file(path)
            self._lmdb = open_lmdb(path)
            try:
                self.file = file_of(path)
                self._presence.settle()
                self._open_databases()
                self.header = self._read_header()
                self._lmdb.reader_check()
                self.highwater = HighWater(os.path.join(os.path.dirname(path), NEWEST), self.header.uuid)
                if self._presence.is_first:
                    self._be_proven(prove)
            except BaseException:
                self._lmdb.close()
                raise
        forks.is_not_for_children(self)

    def _be_proven(self, prove: Callable[[Environment], None]) -> None:
        try:
            prove(self)
        except BaseException:
            self._presence.is_well()
            self.highwater.close()
            raise

    def _is_suspect(self) -> bool:
        """Whether the file must be examined first: it is small, or its last openers died young or found damage."""
        deaths = self._presence.begin_life()
        return os.path.getsize(data_path_of(self.path)) <= LOOKED_THROUGH_BYTES or deaths >= DEATHS_IN_A_ROW

    @contextlib.contextmanager
    def transaction(self, *, write: bool) -> Iterator[lmdb.Transaction]:
        """Yield a transaction, and commit it at the end of the block. LMDB's errors become this package's errors.

        Raises `FullMapError` if the map must grow.
        """
        with self._refusals():
            view = View()
            txn = self._begin(view, write)
            try:
                if write:
                    self._keep_house()
                yield txn
                self._require_our_process()
                txn.commit()
            except lmdb.Error as error:
                txn.abort()
                if self._is_spent():  # looked up before we are counted out, as somebody may open it anew then
                    raise in_doubt(self.path, error) from error
                raise
            except BaseException:
                if self.pid == os.getpid():
                    txn.abort()
                raise
            finally:
                self._count_out(view)

    @contextlib.contextmanager
    def _refusals(self) -> Iterator[None]:
        """Turn LMDB's errors into ours. After what may be damage, the next first opener examines even a large file."""
        try:
            with translated(self.path):
                yield
        except (DamagedStore, StorageError) as error:
            if isinstance(error, DamagedStore) or isinstance(error.__cause__, PERHAPS_DAMAGE):
                self._presence.is_sick()
            raise

    def grow(self) -> None:
        """Double the map."""
        with translated(self.path):
            size = self._lmdb.info()["map_size"]
            self._resize_map(max(2 * size, size + lmdb_opening.MIN_MAP_BYTES))
            log.info("store %s: map grown to %d bytes", self.path, self._lmdb.info()["map_size"])

    def keep_house(self) -> None:
        """Check this process's locks, and once a minute free the places of dead readers. Cheap: call it often."""
        if time.monotonic() - self._looked_s >= LOCK_LOOK_S:  # nothing else is due more often
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
        """Return (process, transactions behind) of every view that is open at this moment."""
        with translated(self.path):
            newest = self._lmdb.info()["last_txnid"]
            rows = [line.split() for line in self._lmdb.readers().splitlines()[1:]]
        return [(int(row[0]), newest - int(row[2])) for row in rows if len(row) == 3 and row[2].isdigit()]

    def structural_problems(self) -> list[str]:
        """Return what is wrong with the tree of pages, in an unchanging copy. It takes the file's size in memory."""
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
        """Give up the environment in a forked child: close what carries the parent's locks, leave the rest alone."""
        self.databases.clear()
        del self._lmdb  # not closed, see the top of this module
        self._presence.close()
        self.highwater.close()

    def _require_our_process(self) -> None:
        if self.pid != os.getpid():
            raise dead_error(self.path)

    def _begin(self, view: View, write: bool) -> lmdb.Transaction:
        """Begin and count a transaction. Try again if another process grew the map, perhaps repeatedly, or if dead
        readers hold every slot."""
        for _ in range(_BEGIN_TRIES - 1):
            try:
                return self._begin_counted(view, write)
            except lmdb.MapResizedError:
                self._resize_map(0)
            except lmdb.ReadersFullError:
                self._lmdb.reader_check()
            except (lmdb.PanicError, StorageError):
                self._open_anew()
        return self._begin_counted(view, write)

    def _begin_counted(self, view: View, write: bool) -> lmdb.Transaction:
        self._views.enter(view)
        try:
            if not self._has_handle:
                raise not_open(self.path)
            return self._lmdb.begin(write=write)
        except BaseException:
            self._count_out(view)
            raise

    def _count_out(self, view: View) -> None:
        if self.pid == os.getpid():  # else another thread of the parent may have held the lock at the fork
            self._views.leave(view)

    def _resize_map(self, size: int) -> None:
        """Resize the map; 0 takes the size that others gave it. A failure costs the handle its old map: then reopen."""
        with self._exclusively():
            try:
                self._lmdb.set_mapsize(size)
            except lmdb.MemoryError:
                self._reopen()
                raise

    def _open_anew(self) -> None:
        """Open the environment anew, as a restart would."""
        if self._views.are_mine():
            raise not_open(self.path)  # the caller's own view is in the way
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
        """Wait until no transaction of this process is open, as LMDB requires; new ones of other threads wait."""
        if self._views.are_mine():
            raise StorageError(
                f"store {self.path}",
                OSError(errno.EDEADLK, "its map must grow, and cannot while this thread has a view open"),
                next_step="leave the view, and change the store then",
            )
        with self._views.none_but_mine():
            yield

    def _reopen(self) -> None:
        """Called inside `_exclusively`."""
        self._has_handle = False
        self._presence.leave()
        self._lmdb.close()
        self._presence.close()
        with os_errors_at(self.path), presence.entering(self.path) as self._presence:
            if file_of(self.path) != self.file:
                raise not_the_same(self.path, "another one took its place")
            self._lmdb = open_lmdb(self.path)
            self._presence.settle()
            self._has_handle = True
            try:
                self._open_databases()
                self._require_no_older()
            except BaseException:  # those that we have are of the handle before
                self._has_handle = False
                self._lmdb.close()
                raise

    def _require_no_older(self) -> None:
        """Refuse an environment of which LMDB now finds an older state than others, or we, found durable."""
        newest = self.highwater.read() if self.users else 0
        with self.transaction(write=False) as txn:
            if txn.id() < newest:
                raise not_the_same(self.path, f"it went back from transaction {newest} to {txn.id()}")

    def _open_databases(self) -> None:
        with self.transaction(write=False):
            pass  # LMDB takes the lock of a process that reads, which `_keep_house` looks for
        self._fill_up()
        with self.transaction(write=True) as txn:  # ours, because another process may be growing the map
            self._require_databases(txn)
            for name in DATABASES:
                self.databases[name] = self._open_database(name, txn)

    def _open_database(self, name: str, txn: lmdb.Transaction) -> lmdb._Database:
        """Open one database. Ours are of the plain kind: a flag would change how LMDB compares and keeps records."""
        database = self._lmdb.open_db(name.encode(), txn=txn, create=False)
        flags = [flag for flag, is_set in database.flags().items() if is_set]
        if flags:
            raise DamagedStore(self.path, expected=f"a database {name} without flags", found=", ".join(flags))
        return database

    def _require_databases(self, txn: lmdb.Transaction) -> None:
        with txn.cursor() as cursor:
            names = [bytes(key).decode(errors="replace") for key in cursor.iternext(values=False)]
        missing = set(DATABASES) - set(names)
        # one wrong number in a meta page leads to another page than the root, or to none
        is_whole = len(names) == self._lmdb.stat()["entries"]
        if missing == set(DATABASES) and is_whole:
            raise not_a_store(self.path, "another program's environment")
        if missing:
            raise DamagedStore(self.path, expected=f"databases {DATABASES}", found=f"none called {missing}")

    def _fill_up(self) -> None:
        """Extend a truncated file to its length: missing pages would be SIGBUS, pages of zeroes are reported as damage.

        A sound file may lack pages that were never used, so its length alone proves nothing.
        """
        data_path = data_path_of(self.path)
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
    """The open environments of this process, by their data.mdb: one may have several paths."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.by_file: dict[File, Environment] = {}

    def forsake(self) -> None:
        self.lock = threading.Lock()  # a thread that is not here may hold the old one
        self.by_file = {}


open_ones = _OpenOnes()


def acquire(path: str, prove: Callable[[Environment], None]) -> Environment:
    """Return this process's handle for the environment in `path`, opened at the first call. `release` it.

    If nobody else has it open, `prove` examines it before anybody else may open it, and go on in it.
    """
    with open_ones.lock:
        environment = open_ones.by_file.get(file_of(path))
        if environment is None:
            forks.is_not_for_children(open_ones)
            environment = Environment(path, prove)
            try:
                open_ones.by_file[environment.file] = environment  # which others may have made anew
            except BaseException:  # nobody else would ever close it
                environment.close()
                raise
        environment.users += 1
        return environment


def release(environment: Environment) -> None:
    if environment.pid != os.getpid():
        return
    with open_ones.lock:
        environment.users -= 1
        if environment.users == 0:
            for key in [key for key, value in open_ones.by_file.items() if value is environment]:
                del open_ones.by_file[key]
            environment.close()
