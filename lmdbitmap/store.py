"""The store: one LMDB environment in a folder of its own, and the only place that knows LMDB.

    STORE/lmdb/        the environment (never open, copy or hash these files: see the README beside it)
    STORE/owners/      one small file per disk, for its owner process (owner.py)
    STORE/control/     sockets of processes that serve disks

Invariants:
- A transaction that returned is on stable storage (`sync` and `metasync` are on, `writemap` is off).
- A change is a function of a `Writer`. It may run again from the start, when the map had to grow, so it
  reads what it needs inside, and nothing it does elsewhere may matter if its transaction is given up.
- One process opens an environment once, however often it is asked for (LMDB's locks belong to the process).
- LMDB refuses everything once the write of a meta page failed. The environment is then opened anew, as a restart
  would, as soon as no transaction is open; whoever committed is told that the outcome is in doubt.
- A handle from before a fork is dead in the child.
- Values fit in a leaf page; record sizes never vary. Keys are in schema.py.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar
from uuid import UUID, uuid4

import lmdb

from lmdbitmap import files, schema
from lmdbitmap.errors import Busy, FormatError, LmdbitmapError, NotFound, StorageError
from lmdbitmap.schema import Bitmap, Checkpoint, Disk, Region, StoreHeader

log = logging.getLogger(__name__)

MAP_BYTES = 64 << 30
"""Address space reserved at open; it costs no memory and no disk, and is more than most stores ever need."""
_MIN_MAP_BYTES = 1 << 30
_MAX_READERS = 1024
_BEGIN_TRIES = 16
_MAX_DATABASES = 16
_DATABASES = ("meta", "disks", "checkpoints", "bitmaps", "regions")
_HEADER_KEY = b"store"
_BITMAP_ID_KEY = b"next bitmap id"
_FULL_STEPS = {
    errno.ENOSPC: "free some space there and try again",
    errno.EDQUOT: "raise the quota or free some space there, and try again",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f), or use another file system",
}
_README = """This folder is an lmdbitmap store. While a process uses it, do not open, copy or hash the files in lmdb/:
closing them would drop that process's locks. A bitmap leaves the store with `lmdbitmap export`.
"""

T = TypeVar("T")


class CommitInDoubt(StorageError):
    """The last step of a commit failed, the write of a meta page: it may have taken place all the same, now or
    after a power cut. Whoever goes on from what was before must not rely on it."""


class Reader:
    """One consistent view of the store. Valid inside its `with` block, in one thread; keep it short."""

    def __init__(self, txn: lmdb.Transaction, databases: dict[str, lmdb._Database], place: str) -> None:
        self._txn = txn
        self._databases = databases
        self._place = place

    def disks(self) -> list[Disk]:
        """All disks, by name."""
        found = [schema.decode(Disk, value, place=self._place) for _, value in self._items("disks", b"")]
        return sorted(found, key=lambda disk: disk.name)

    def disk(self, disk_uuid: UUID) -> Disk | None:
        value = self._get("disks", disk_uuid.bytes)
        return None if value is None else schema.decode(Disk, value, place=self._place)

    def checkpoints(self, disk_uuid: UUID) -> list[Checkpoint]:
        """The disk's whole chain, oldest first, older epochs included."""
        items = self._items("checkpoints", disk_uuid.bytes)
        return [schema.decode(Checkpoint, value, place=self._place) for _, value in items]

    def bitmap(self, bitmap_id: int) -> Bitmap:
        value = self._get("bitmaps", schema.bitmap_key(bitmap_id))
        if value is None:
            raise FormatError(
                f"store {self._place}",
                expected=f"a description of bitmap {bitmap_id}",
                found="none",
                next_step="make a new store and a full backup",
            )
        return schema.decode(Bitmap, value, place=self._place)

    def bitmaps(self) -> list[Bitmap]:
        """All stand-alone bitmaps, by name."""
        found = [schema.decode(Bitmap, value, place=self._place) for _, value in self._items("bitmaps", b"")]
        return sorted((b for b in found if b.name is not None), key=lambda b: b.name or "")

    def region(self, bitmap_id: int, region: int) -> Region | None:
        """One region record; None where all is clean."""
        key = schema.region_key(bitmap_id, region)
        value = self._get("regions", key)
        return None if value is None else self._checked(key, value)

    def regions(self, bitmap_id: int, start: int = 0, stop: int = 2**63) -> Iterator[tuple[int, Region]]:
        """The records of regions [start, stop), ascending; what is absent is all clean."""
        limit = schema.region_key(bitmap_id, stop)
        with self._cursor("regions") as cursor:
            if not cursor.set_range(schema.region_key(bitmap_id, start)):
                return
            for item in cursor:
                key = bytes(item[0])
                if key >= limit:
                    return
                yield schema.parse_region_key(key)[1], self._checked(key, bytes(item[1]))

    def next_region(self, bitmap_id: int, start: int) -> int | None:
        """The first region from `start` on that has a record."""
        with self._cursor("regions") as cursor:
            if not cursor.set_range(schema.region_key(bitmap_id, start)):
                return None
            found, region = schema.parse_region_key(bytes(cursor.key()))
            return region if found == bitmap_id else None

    def _checked(self, key: bytes, value: bytes) -> Region:
        region = schema.decode_region(key, value)
        if region.damaged:
            bitmap_id, number = schema.parse_region_key(key)
            log.error("store %s: region %d of bitmap %d is damaged: all of it counts as dirty",
                      self._place, number, bitmap_id)  # fmt: skip
        return region

    def _get(self, database: str, key: bytes) -> bytes | None:
        value = self._txn.get(key, db=self._databases[database])
        return None if value is None else bytes(value)

    @contextlib.contextmanager
    def _cursor(self, database: str) -> Iterator[lmdb.Cursor]:
        cursor = self._txn.cursor(db=self._databases[database])
        try:
            yield cursor
        finally:
            cursor.close()

    def _items(self, database: str, prefix: bytes) -> Iterator[tuple[bytes, bytes]]:
        with self._cursor(database) as cursor:
            if not cursor.set_range(prefix):
                return
            for item in cursor:
                key = bytes(item[0])
                if not key.startswith(prefix):
                    return
                yield key, bytes(item[1])


class Writer(Reader):
    """A view that can be changed. Nothing is visible to others until its transaction is durable."""

    def put_disk(self, disk: Disk) -> None:
        self._put("disks", disk.uuid.bytes, schema.encode(disk))

    def delete_disk(self, disk_uuid: UUID) -> None:
        self._delete("disks", disk_uuid.bytes)

    def put_checkpoint(self, checkpoint: Checkpoint) -> None:
        key = schema.checkpoint_key(checkpoint.disk, checkpoint.sequence)
        self._put("checkpoints", key, schema.encode(checkpoint))

    def delete_checkpoint(self, checkpoint: Checkpoint) -> None:
        self._delete("checkpoints", schema.checkpoint_key(checkpoint.disk, checkpoint.sequence))

    def new_bitmap_id(self) -> int:
        """A number that no bitmap of this store ever had."""
        last = int.from_bytes(self._get("meta", _BITMAP_ID_KEY) or b"", "big")
        self._put("meta", _BITMAP_ID_KEY, (last + 1).to_bytes(8, "big"))
        return last + 1

    def put_bitmap(self, bitmap: Bitmap) -> None:
        self._put("bitmaps", schema.bitmap_key(bitmap.id), schema.encode(bitmap))

    def delete_bitmap(self, bitmap_id: int) -> None:
        """Drop the description and every region record."""
        self.delete_regions(bitmap_id)
        self._delete("bitmaps", schema.bitmap_key(bitmap_id))

    def put_region(self, bitmap_id: int, region: int, armed: int, bits: bytes) -> None:
        key = schema.region_key(bitmap_id, region)
        self._put("regions", key, schema.encode_region(key, armed, bits))

    def delete_regions(self, bitmap_id: int, start: int = 0) -> None:
        """Make every region from `start` on all clean."""
        limit = schema.region_key(bitmap_id + 1, 0)
        with self._cursor("regions") as cursor:
            more = cursor.set_range(schema.region_key(bitmap_id, start))
            while more and bytes(cursor.key()) < limit:
                more = cursor.delete()

    def put_header(self, header: StoreHeader) -> None:
        self._put("meta", _HEADER_KEY, schema.encode(header))

    def _put(self, database: str, key: bytes, value: bytes) -> None:
        self._txn.put(key, value, db=self._databases[database])

    def _delete(self, database: str, key: bytes) -> None:
        self._txn.delete(key, db=self._databases[database])


class Store:
    """An open store; safe for many threads. `Store.open` and `Store.create` hand one out; `close` it."""

    def __init__(self, path: str, environment: _Environment) -> None:
        self.path = path
        self._environment = environment
        self._closed = False

    @classmethod
    def open(cls, path: str) -> Store:
        """The store at `path`, which must be one.

        Raises `NotFound` where none is, `FormatError` for one that is too new or damaged, `StorageError`
        where the file system refuses, `Busy` where LMDB's lock cannot be shared.
        """
        path = os.path.abspath(path)
        if not os.path.isfile(os.path.join(path, "lmdb", "data.mdb")):
            raise NotFound(
                f"{path} is not a store", next_step="name another, or make one with `lmdbitmap add`"
            )
        return cls(path, _shared_environment(path))

    @classmethod
    def create(cls, path: str) -> Store:
        """The store at `path`, made now unless it is there already; durable before this returns."""
        path = os.path.abspath(path)
        if not os.path.isfile(os.path.join(path, "lmdb", "data.mdb")):
            _make(path)
        return cls.open(path)

    @property
    def uuid(self) -> UUID:
        return self._environment.header.uuid

    @contextlib.contextmanager
    def read(self) -> Iterator[Reader]:
        """A consistent view. Do not keep it: an old view makes the store's file grow."""
        with self._alive().transaction(write=False) as txn:
            yield Reader(txn, self._environment.databases, self.path)

    def update(self, change: Callable[[Writer], T]) -> T:
        """Run `change` in one transaction and return its answer once the transaction is durable.

        The change may run more than once (see the top of this module). If it raises, or the commit fails,
        the store is as it was before; only after `CommitInDoubt` nobody can say.
        """
        environment = self._alive()
        while True:
            try:
                with environment.transaction(write=True) as txn:
                    return change(Writer(txn, environment.databases, self.path))
            except lmdb.MapFullError:
                environment.grow()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            _release_environment(self._environment)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def owner_path(self, disk_uuid: UUID) -> str:
        return os.path.join(self.path, "owners", str(disk_uuid))

    def control_path(self, disk_uuid: UUID) -> str:
        return os.path.join(self.path, "control", str(disk_uuid))

    def _alive(self) -> _Environment:
        if self._closed or self._environment.pid != os.getpid():
            raise StorageError(
                f"store {self.path}",
                OSError(errno.EBADF, "closed"),
                next_step="open the store again, in the process that uses it",
            )
        return self._environment


class _Environment:
    """The one LMDB handle of this process for one environment, with the room it grows in."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.pid = os.getpid()
        self.users = 0
        self._quiet = threading.Condition()
        self._running = 0
        self._resizing = False
        self._mine = threading.local()
        self._is_open = True
        self._lmdb = _open_lmdb(path)
        try:
            self.databases = self._open_databases()
            self.header = self._read_header()
            self._lmdb.reader_check()
        except BaseException:
            self._lmdb.close()
            raise

    @contextlib.contextmanager
    def transaction(self, *, write: bool) -> Iterator[lmdb.Transaction]:
        """A transaction, committed on the way out; a refusal of LMDB leaves as an error of ours."""
        with _translated(self.path):
            txn = self._begin(write)
            try:
                with txn:
                    yield txn
            except lmdb.Error as error:
                if self._is_spent():  # looked up before we are counted out, as somebody may open it anew then
                    raise _in_doubt(self.path, error) from error
                raise
            finally:
                self._count(-1)

    def grow(self) -> None:
        """Double the map."""
        size = self._lmdb.info()["map_size"]
        with _translated(self.path):
            self._resize_map(max(2 * size, size + _MIN_MAP_BYTES))
        log.info("store %s: map grown to %d bytes", self.path, self._lmdb.info()["map_size"])

    def close(self) -> None:
        self._lmdb.close()

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
            if not self._is_open:
                raise _not_open(self.path)
            return self._lmdb.begin(write=write)
        except BaseException:
            self._count(-1)
            raise

    def _count(self, difference: int) -> None:
        with self._quiet:
            self._mine.open = getattr(self._mine, "open", 0) + difference
            self._running += difference
            self._quiet.notify_all()

    def _has_one_open(self) -> bool:
        """Whether the calling thread has a transaction open, and may not be made to wait for its end."""
        return bool(getattr(self._mine, "open", 0))

    def _resize_map(self, size: int) -> None:
        """LMDB asks that no transaction of this process is open. 0 is what others made of it."""
        assert not self._has_one_open(), "a change inside a view of the same thread would wait for itself"
        with self._alone():
            self._lmdb.set_mapsize(size)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """No transaction of this process is open in the block; new ones wait."""
        with self._quiet:
            self._resizing = True
            try:
                self._quiet.wait_for(lambda: self._running == 0)
                yield
            finally:
                self._resizing = False
                self._quiet.notify_all()

    def _is_spent(self) -> bool:
        """Whether LMDB refuses everything, because the write of a meta page failed."""
        try:
            self._lmdb.begin().abort()
        except lmdb.PanicError:
            return True
        except lmdb.Error:
            return False
        return False

    def _open_anew(self) -> None:
        """Begin again with what is in the file, as a restart would."""
        if self._has_one_open():
            raise _not_open(self.path)  # the caller's own view is in the way
        with self._alone():
            if self._is_open and not self._is_spent():
                return  # another thread was first
            self._is_open = False
            self._lmdb.close()
            self._lmdb = _open_lmdb(self.path)
            with self._lmdb.begin(write=True) as txn:
                self.databases = self._databases_in(txn)
            self._is_open = True
        log.warning("store %s: opened anew after the write of a meta page failed", self.path)

    def _open_databases(self) -> dict[str, lmdb._Database]:
        self._fill_up()
        with self.transaction(write=True) as txn:  # ours, because another process may be growing the map
            return self._databases_in(txn)

    def _databases_in(self, txn: lmdb.Transaction) -> dict[str, lmdb._Database]:
        return {name: self._lmdb.open_db(name.encode(), txn=txn, create=False) for name in _DATABASES}

    def _fill_up(self) -> None:
        """Give a file that was cut its length again: its missing pages would be SIGBUS, those of zeroes are damage.

        A sound file may lack pages that were never used, so its length alone proves nothing.
        """
        data_path = os.path.join(self.path, "data.mdb")
        if os.path.getsize(data_path) >= self._used_bytes():
            return
        with self.transaction(write=True):  # nobody else changes the length meanwhile
            if os.path.getsize(data_path) < self._used_bytes() <= self._lmdb.info()["map_size"]:
                os.truncate(data_path, self._used_bytes())

    def _used_bytes(self) -> int:
        page_bytes: int = self._lmdb.stat()["psize"]
        return (self._lmdb.info()["last_pgno"] + 1) * page_bytes

    def _read_header(self) -> StoreHeader:
        with self.transaction(write=False) as txn:
            value = txn.get(_HEADER_KEY, db=self.databases["meta"]) or b""
        header = schema.decode(StoreHeader, bytes(value), place=self.path)
        if header.magic != schema.STORE_MAGIC:
            raise _not_a_store(self.path, header.magic)
        return header


_environments: dict[tuple[int, int], _Environment] = {}
_environments_lock = threading.Lock()


def _shared_environment(path: str) -> _Environment:
    """This process's handle for the environment in `path`, opened at the first call."""
    status = os.stat(os.path.join(path, "lmdb"))
    key = (status.st_dev, status.st_ino)
    with _environments_lock:
        environment = _environments.get(key)
        if environment is None or environment.pid != os.getpid():
            if environment is not None:
                environment.close()  # a fork's copy: closing it in the child leaves the parent's alone
            environment = _environments[key] = _Environment(os.path.join(path, "lmdb"))
        environment.users += 1
        return environment


def _release_environment(environment: _Environment) -> None:
    with _environments_lock:
        environment.users -= 1
        if environment.users == 0 and environment.pid == os.getpid():
            for key in [key for key, value in _environments.items() if value is environment]:
                del _environments[key]
            environment.close()


def _open_lmdb(path: str, *, create: bool = False) -> lmdb.Environment:
    """Open with the settings that durability rests on; ask for less address space where there is a limit."""
    _refuse_network_filesystem(path)
    data_path = os.path.join(path, "data.mdb")
    wanted = max(MAP_BYTES, 2 * os.path.getsize(data_path) if os.path.exists(data_path) else 0)
    while True:
        try:
            with _translated(path):
                return lmdb.open(
                    path, map_size=wanted, subdir=True, create=create, mode=0o600, lock=True,
                    sync=True, metasync=True, writemap=False, map_async=False, meminit=True, readahead=False,
                    max_readers=_MAX_READERS, max_dbs=_MAX_DATABASES, max_spare_txns=0, lib_version=0,
                )  # fmt: skip
        except StorageError as error:
            if error.errno != errno.ENOMEM or wanted // 2 < _MIN_MAP_BYTES:
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


def _make(path: str) -> None:
    """Make a store in a folder that is missing or empty. The environment appears whole, by one rename."""
    with _as_storage_error(path):
        os.makedirs(path, mode=0o700, exist_ok=True)
        strangers = sorted(name for name in os.listdir(path) if not _is_ours(name))
    if strangers:
        raise _not_a_store(path, f"a folder with {strangers[0]!r} in it")
    with _as_storage_error(path):
        for name in ("owners", "control"):
            os.makedirs(os.path.join(path, name), mode=0o700, exist_ok=True)
        files.replace_atomically(os.path.join(path, "README"), _README.encode())
        files.replace_atomically(os.path.join(path, ".nobackup"), b"")
        _make_environment(path)


def _is_ours(name: str) -> bool:
    return name in ("owners", "control", "lmdb") or name.startswith(("README", ".nobackup", "lmdb.new-"))


def _make_environment(path: str) -> None:
    fresh = os.path.join(path, f"lmdb.new-{secrets.token_hex(4)}")
    os.mkdir(fresh, mode=0o700)
    try:
        environment = _open_lmdb(fresh, create=True)
        databases = {name: environment.open_db(name.encode()) for name in _DATABASES}
        with environment.begin(write=True) as txn:
            Writer(txn, databases, fresh).put_header(StoreHeader(schema.STORE_MAGIC, uuid4()))
        environment.close()
        files.fsync_folder(fresh)
        os.rename(fresh, os.path.join(path, "lmdb"))
        files.fsync_folder(path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # else another process was first
            raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


@contextlib.contextmanager
def _translated(path: str) -> Iterator[None]:
    """LMDB's refusals as errors of ours, except a full map, which `Store.update` mends itself."""
    try:
        yield
    except lmdb.MapFullError:
        raise
    except lmdb.Error as error:
        raise _our_error(path, error) from error
    except PermissionError as error:
        raise StorageError(f"store {path}", error, next_step="run as the user who owns the store") from error


def _our_error(path: str, error: lmdb.Error) -> LmdbitmapError:
    if isinstance(error, lmdb.LockError) or error.code == errno.EAGAIN:
        return Busy(
            f"store {path} cannot be locked: a process with this one's number, in another container, has it open",
            next_step="let one process own the store, and reach it over its socket",
        )
    if isinstance(error, lmdb.CorruptedError | lmdb.PageNotFoundError):
        return FormatError(
            f"store {path}", expected="a sound environment", found=str(error),
            next_step="restore the store or make a new one, then make a full backup",
        )  # fmt: skip
    if isinstance(error, lmdb.InvalidError | lmdb.VersionMismatchError | lmdb.NotFoundError):
        return _not_a_store(path, str(error))
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
    if code == errno.EIO and _is_full(path):
        code = errno.ENOSPC
    step = _FULL_STEPS.get(code) or f"see what the system's log says ({error})"
    return StorageError(f"store {path}", OSError(code, str(error)), next_step=step)


def _is_full(path: str) -> bool:
    try:
        return files.free_bytes(path) < 1 << 20
    except OSError:
        return False


def _not_a_store(path: str, found: object) -> FormatError:
    return FormatError(
        f"store {path}", expected=f"{schema.STORE_MAGIC!r}, schema {schema.SCHEMA_VERSION}", found=found,
        next_step="name another folder, or an empty one to make a new store",
    )  # fmt: skip


@contextlib.contextmanager
def _as_storage_error(path: str) -> Iterator[None]:
    try:
        yield
    except LmdbitmapError:
        raise
    except OSError as error:
        raise StorageError(
            f"store {path}", error, next_step="choose a folder that this user can write"
        ) from error
