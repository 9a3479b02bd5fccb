"""The store: the records in one LMDB environment, which has a folder of its own.

    STORE/lmdb/        the environment (never open, copy or hash these files: see the README beside it)
    STORE/owners/      one small file per disk, for its owner process (owner.py)
    STORE/control/     sockets of processes that serve disks
    STORE/users        locked by every process that has the environment open (presence.py)

Invariants (those of the environment are in environment.py):
- A change is a function of a `Writer`. It may run again from the start, when the map had to grow, so it
  reads what it needs inside, and nothing it does elsewhere may matter if its transaction is given up.
- Values fit in a leaf page; record sizes never vary. Keys are in schema.py.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from typing import TypeVar
from uuid import UUID, uuid4

import lmdb

from lmdbitmap import environment, files, schema
from lmdbitmap.environment import CommitInDoubt as CommitInDoubt
from lmdbitmap.environment import Environment, FullMapError
from lmdbitmap.errors import FormatError, LmdbitmapError, NotFound, StorageError
from lmdbitmap.schema import Bitmap, Checkpoint, Disk, Region, StoreHeader

log = logging.getLogger(__name__)

_BITMAP_ID_KEY = b"next bitmap id"
_README = """This folder is an lmdbitmap store. While a process uses it, do not open, copy or hash the files in lmdb/:
closing them would drop that process's locks. A bitmap leaves the store with `lmdbitmap export`.
"""

T = TypeVar("T")


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
        self._put("meta", environment.HEADER_KEY, schema.encode(header))

    def _put(self, database: str, key: bytes, value: bytes) -> None:
        self._txn.put(key, value, db=self._databases[database])

    def _delete(self, database: str, key: bytes) -> None:
        self._txn.delete(key, db=self._databases[database])


class Store:
    """An open store; safe for many threads. `Store.open` and `Store.create` hand one out; `close` it."""

    def __init__(self, path: str, shared: Environment) -> None:
        self.path = path
        self._environment = shared
        self._closed = False

    @classmethod
    def open(cls, path: str) -> Store:
        """The store at `path`, which must be one.

        Raises `NotFound` where none is, `FormatError` for one that is too new or damaged, `StorageError`
        where the file system refuses, `Busy` where LMDB's lock cannot be shared.
        """
        path = os.path.abspath(path)
        if not _is_there(path):
            raise NotFound(
                f"{path} is not a store", next_step="name another, or make one with `lmdbitmap add`"
            )
        return cls(path, environment.acquire(os.path.join(path, "lmdb")))

    @classmethod
    def create(cls, path: str) -> Store:
        """The store at `path`, made now unless it is there already; durable before this returns."""
        path = os.path.abspath(path)
        if not _is_there(path):
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
        shared = self._alive()
        while True:
            try:
                with shared.transaction(write=True) as txn:
                    return change(Writer(txn, shared.databases, self.path))
            except FullMapError:
                shared.grow()

    def keep_house(self) -> None:
        """To be called every now and then by whoever keeps the store open: see `Environment.keep_house`."""
        self._alive().keep_house()

    def views(self) -> list[tuple[int, int]]:
        """(process, how many transactions behind) of every view that is open, in whatever process."""
        return self._alive().readers()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            environment.release(self._environment)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def owner_path(self, disk_uuid: UUID) -> str:
        return os.path.join(self.path, "owners", str(disk_uuid))

    def control_path(self, disk_uuid: UUID) -> str:
        return os.path.join(self.path, "control", str(disk_uuid))

    def _alive(self) -> Environment:
        if self._environment.pid != os.getpid():
            raise environment.dead_error(self.path)
        if self._closed:
            raise StorageError(
                f"store {self.path}",
                OSError(errno.EBADF, "closed"),
                next_step="open the store again",
            )
        return self._environment


def _is_there(path: str) -> bool:
    data_path = os.path.join(path, "lmdb", "data.mdb")
    with _as_storage_error(path):
        try:
            return stat.S_ISREG(os.stat(data_path).st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return False


def _make(path: str) -> None:
    """Make a store in a folder that is missing or empty. The environment appears whole, by one rename."""
    with _as_storage_error(path):
        os.makedirs(path, mode=0o700, exist_ok=True)
        strangers = sorted(name for name in os.listdir(path) if not _is_ours(name))
    if strangers:
        raise environment.not_a_store(path, f"a folder with {strangers[0]!r} in it")
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
        made = environment.open_lmdb(fresh, create=True)
        databases = {name: made.open_db(name.encode()) for name in environment.DATABASES}
        with made.begin(write=True) as txn:
            Writer(txn, databases, fresh).put_header(StoreHeader(schema.STORE_MAGIC, uuid4()))
        made.close()
        files.fsync_folder(fresh)
        os.rename(fresh, os.path.join(path, "lmdb"))
        files.fsync_folder(path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # else another process was first
            raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


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
