"""The store: the records in one LMDB environment, in its own folder.

    STORE/lmdb/        the environment (never open, copy or hash these files: see the README beside it)
    STORE/owners/      one small file per disk, for its owner process (owner_file.py)
    STORE/control/     sockets of processes that serve disks
    STORE/syncs/       how far copies of disks are synced (sync_note.py)
    STORE/holds/       which checkpoints repositories count from (holds.py)
    STORE/users        locked by every process that has the environment open (presence.py)
    STORE/newest       the number of the newest transaction (highwater.py)

records.py describes the records, environment.py the environment. Invariants of changes:
- A change is a function of a `Writer`. It runs again from the start if the map had to grow. So it reads what it needs
  inside, and has no side effect that matters if its transaction is given up.
- Opening a damaged store heals it (salvage.py). An open store is complete and whole, unless it is damaged meanwhile.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar
from uuid import UUID

from lmdbitmap.errors import LmdbitmapError, NotFound, StorageError
from lmdbitmap.interfaces import StoreMark
from lmdbitmap.storage import creating, environment, lmdb_errors, owner, owner_file, salvage, schema
from lmdbitmap.storage.environment import Environment
from lmdbitmap.storage.lmdb_errors import CommitInDoubt as CommitInDoubt
from lmdbitmap.storage.lmdb_errors import DamagedStore, FullMapError
from lmdbitmap.storage.lmdb_opening import File, file_of
from lmdbitmap.storage.records import Reader as Reader
from lmdbitmap.storage.records import Writer as Writer
from lmdbitmap.storage.schema import Bitmap

log = logging.getLogger(__name__)

WENT_BACK = "the store's newest changes were lost: its file is damaged, or an older one"
_PASSING = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}
"""What keeps a process from reading a file that it can read a moment later."""
_HEALINGS = 3
"""Most healings in one opening: another process may be healing, too."""

T = TypeVar("T")


class Store:
    """An open store; safe for many threads. `Store.open` and `Store.create` hand one out; `close` it.

    It stays open for the disks that are attached with it: one that is closed before they are detached goes on until
    then.
    """

    def __init__(self, path: str, shared: Environment) -> None:
        self.path = path
        self._environment = shared
        self._using = threading.Lock()
        self._users = 1
        """Whoever opened it, and the disks attached with it."""
        self._is_given_up = False

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Store:
        """Open the store at `path`. A damaged store is made anew first (salvage.py).

        Raises `NotFound` if there is none, `FormatError` if it is too new, or damaged while others use it,
        `StorageError` where the file system refuses, `Busy` where LMDB's lock cannot be shared.
        """
        path = os.path.abspath(path)
        for _ in range(_HEALINGS):
            looked_at = creating.environment_file(path)
            try:
                return cls._open(path)
            except DamagedStore as damage:
                salvage.heal(path, damage, looked_at)
        return cls._open(path)

    @classmethod
    def _open(cls, path: str) -> Store:
        _require_environment(path)
        acquired = environment.acquire(os.path.join(path, "lmdb"), lambda shared: cls(path, shared)._prove())
        opened = cls(path, acquired)
        try:
            with creating.refusals(path):
                creating.make_folders(path)
            opened._distrust_if_older()
        except BaseException:
            opened.close()
            raise
        return opened

    @classmethod
    def create(cls, path: str | os.PathLike[str]) -> Store:
        """Open the store at `path`; create it first unless it is there already. Durable on return."""
        path = os.path.abspath(path)
        if creating.environment_file(path) is None and not salvage.is_lost(path):
            salvage.make(path)
        return cls.open(path)

    @property
    def uuid(self) -> UUID:
        return self._environment.header.uuid

    @property
    def file(self) -> File:
        """The environment's file, as it was when it was opened."""
        return self._environment.file

    def is_in_place(self) -> bool:
        """Whether the store's folder still leads to the environment that is open, and to no copy of it."""
        try:
            return file_of(os.path.join(self.path, "lmdb")) == self.file
        except (LmdbitmapError, OSError):
            return False

    def require_its_place(self) -> None:
        """Raise `StorageError` unless the store is where it was."""
        if not self.is_in_place():
            raise lmdb_errors.not_the_same(self.path, "its folder was moved or removed, or a copy put there")

    def is_same(self, other: Store) -> bool:
        """Whether a transaction of one is one of the other. A copy of a store has the same uuid, and is another."""
        return self._environment is other._environment

    @contextlib.contextmanager
    def read(self) -> Iterator[Reader]:
        """Yield a consistent view, for this thread. Do not keep it open: an old view makes the store's file grow.

        Its `disks()`, `disk_named(name)` and `checkpoints(disk.uuid)` describe what there is.
        """
        with self._alive().transaction(write=False) as txn:
            reader = Reader(txn, self._environment.databases, self.path, self._environment.disk_keys)
            try:
                reader.require_newest(txn.id())
                yield reader
            finally:
                reader.end()

    def update(self, change: Callable[[Writer], T]) -> T:
        """Run `change` in one transaction and return its answer once the transaction is durable.

        The change may run more than once (see the top of this module). If it raises, or the commit fails, the store is
        as it was before. Only after `CommitInDoubt` is it unknown whether the change was made.
        """
        shared = self._alive()
        while True:
            try:
                with shared.transaction(write=True) as txn:
                    writer = Writer(txn, shared.databases, self.path, shared.disk_keys)
                    writer.require_newest(txn.id() - 1)
                    answer, transaction = change(writer), txn.id()
                    changed = writer.seal()
                if changed:
                    shared.highwater.raise_to(transaction)
                return answer
            except FullMapError:
                shared.grow()

    def keep_house(self) -> None:
        """Keep house, see `Environment.keep_house`. Whichever process keeps the store open calls it often."""
        self._alive().keep_house()

    def structural_problems(self) -> list[str]:
        """Return what is wrong with LMDB's pages: see `Environment.structural_problems`."""
        return self._alive().structural_problems()

    def views(self) -> list[tuple[int, int]]:
        """Return (process, transactions behind) of every open view in any process."""
        return self._alive().readers()

    def close(self) -> None:
        with self._using:
            was_given_up, self._is_given_up = self._is_given_up, True
        if not was_given_up:
            self.let_go()

    def keep_open(self) -> None:
        """Keep the store open until `let_go`, as for a disk that is attached with it. Raise if it is closed already."""
        with self._using:
            self._alive()
            self._users += 1

    def let_go(self) -> None:
        with self._using:
            self._users -= 1
            is_unused = self._users == 0
        if is_unused:
            environment.release(self._environment)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def data_path(self) -> str:
        """The environment's file, to be examined from outside: only LMDB may open it."""
        return os.path.join(self.path, "lmdb", "data.mdb")

    def owner_path(self, disk_uuid: UUID) -> str:
        return os.path.join(self.path, "owners", str(disk_uuid))

    def control_path(self, disk_uuid: UUID) -> str:
        return os.path.join(self.path, "control", str(disk_uuid))

    def _prove(self) -> None:
        """Examine a store that nobody else has open, nor opens meanwhile.

        A later user could not have it made anew, and its transactions could make up for those that it lacks.
        """
        with self.read() as reader:
            reader.require_descriptions()
        self._distrust_if_older()
        self._distrust_what_it_lacks()

    def _distrust_if_older(self) -> None:
        """If the file is older than what was durable, make everything dirty: every bitmap lacks an unknown part."""
        newest, found = self._environment.highwater.read(), self._transaction()
        if found < newest:
            log.error(
                "store %s: it was at transaction %d, and is at %d: %s", self.path, newest, found, WENT_BACK
            )
            self.update(_make_everything_dirty)
            self._environment.highwater.set(self._transaction())

    def _distrust_what_it_lacks(self) -> None:
        """Distrust disks whose last sign of life names a transaction that this file does not have, before it goes on.

        Once other disks have used it for as many transactions, it would pass for complete. Where one cannot be
        distrusted, everything counts as dirty. A disk whose sign of life cannot be read cannot be attached either. One
        without an identity is not believed anyway, as in a store that was made anew.
        """
        with self.read() as reader:
            paths = [self.owner_path(disk.uuid) for disk in reader.disks() if disk.identity is not None]
        mark = self.mark
        for path in paths:
            try:
                is_lacking = _is_lacking(path, mark)
            except LmdbitmapError as error:
                if isinstance(error, StorageError) and error.errno in _PASSING:
                    raise
                continue
            if is_lacking:
                log.error("store %s: %s, as %s knows", self.path, WENT_BACK, path)
                try:
                    owner.declare_distrust_at_rest(path, WENT_BACK, time.time_ns())
                except LmdbitmapError:
                    self.update(_make_everything_dirty)

    @property
    def mark(self) -> StoreMark:
        """What a sign of life says of the store now."""
        return StoreMark(self.file.inode, self._transaction(), self.file.born_ns)

    def _transaction(self) -> int:
        with self.read() as reader:
            return reader.transaction

    def _alive(self) -> Environment:
        if self._environment.pid != os.getpid():
            raise lmdb_errors.dead_error(self.path)
        if self._users == 0:
            raise StorageError(
                f"store {self.path}",
                OSError(errno.EBADF, "it is closed"),
                next_step="open the store again",
            )
        return self._environment


def _require_environment(path: str) -> None:
    if creating.environment_file(path) is None:
        if salvage.is_lost(path):
            raise salvage.gone(path)
        raise NotFound(f"{path} is not a store", next_step="name another, or make one with `lmdbitmap add`")


def _is_lacking(owner_path: str, mark: StoreMark) -> bool:
    sign = owner_file.last_beat(owner_path)
    return sign is not None and mark.lacks(sign.store) and owner_file.distrust(owner_path) is None


def _make_everything_dirty(writer: Writer) -> None:
    for _, value in writer.records("bitmaps"):
        bitmap = schema.decode(Bitmap, bytes(value), place="bitmaps")
        writer.put_bitmap(dataclasses.replace(bitmap, all_dirty=bitmap.all_dirty or WENT_BACK))
