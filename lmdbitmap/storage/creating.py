"""Making a store: its folder, and an environment that appears in it whole, by one rename.

The maker of an environment locks the folder (`file_locks.lock_folder`), so that there is only one maker, and sweeps
away the remains of makers that died. A damaged environment is never written to: it is renamed, and stays.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

from lmdbitmap.errors import InvalidArgument, LmdbitmapError, StorageError
from lmdbitmap.storage import environment, lmdb_errors, lmdb_opening, schema
from lmdbitmap.storage.highwater import NEWEST
from lmdbitmap.storage.presence import USERS
from lmdbitmap.storage.records import Writer
from lmdbitmap.storage.schema import StoreHeader
from lmdbitmap.system import atomic_files, files

DAMAGED_PREFIX = "lmdb.damaged-"
FRESH_PREFIX = "lmdb.new-"
FOLDERS = ("owners", "control", "syncs", "holds")
"""Folders beside the environment, whose files each belong to one disk."""
_FIRST_WORDS = "This folder is an lmdbitmap store."
_README = f"""{_FIRST_WORDS} While a process uses it, do not open, copy or hash the files in lmdb/:
closing them would drop that process's locks. A bitmap leaves the store with `lmdbitmap export`.
"""


def environment_file(path: str) -> tuple[int, int] | None:
    """Return which file the store's environment is now; None if there is none."""
    with refusals(path):
        try:
            status = os.stat(os.path.join(path, "lmdb", "data.mdb"))
        except (FileNotFoundError, NotADirectoryError):
            return None
    return (status.st_dev, status.st_ino) if stat.S_ISREG(status.st_mode) else None


def is_ours(path: str) -> bool:
    """Return whether a store was ever made in that folder, whatever became of its environment."""
    try:
        with open(os.path.join(path, "README"), "rb", opener=files.open_nonblocking) as readme:
            return readme.read(len(_FIRST_WORDS)) == _FIRST_WORDS.encode()
    except OSError:
        return False


def refuse_inside(place: str | os.PathLike[str]) -> None:
    """Raise `InvalidArgument` for a store and for anything inside one, also through links.

    A store that is damaged is made anew, and one that is removed takes with it what is inside.
    """
    path = os.path.realpath(place)
    above = [path, *map(str, Path(path).parents)]
    for folder in filter(_was_made_a_store, above):
        raise InvalidArgument(
            f"{os.fspath(place)} is inside of the store {folder}",
            next_step="name a place outside of it; what is there already can be moved as it is",
        )


def _was_made_a_store(path: str) -> bool:
    return is_ours(path) or all(os.path.isdir(os.path.join(path, name)) for name in ("lmdb", *FOLDERS))


def prepare_folder(path: str) -> None:
    """Make a store's folder, without its environment. Refuses a folder that has other things in it."""
    with refusals(path):
        files.make_folders(path)
        strangers = sorted(name for name in os.listdir(path) if not _belongs(name))
    if strangers:
        raise lmdb_errors.not_a_store(path, f"a folder with {strangers[0]!r} in it")
    with refusals(path):
        make_folders(path)
        atomic_files.replace(os.path.join(path, "README"), _README.encode(), like_folder=True)
        atomic_files.replace(os.path.join(path, ".nobackup"), b"", like_folder=True)


def make_folders(path: str) -> None:
    """Make the folders beside the environment. What a lost one held is reported by the code that needs it."""
    for name in FOLDERS:
        files.make_folder_like(os.path.join(path, name))


def _belongs(name: str) -> bool:
    return name in (*FOLDERS, "lmdb", USERS, NEWEST) or name.startswith(
        ("README", ".nobackup", FRESH_PREFIX, DAMAGED_PREFIX)
    )


def make_environment(path: str, fill: Callable[[Writer], None]) -> str | None:
    """Make an environment with what `fill` puts in it. Keep an existing one under another name, and return that name.

    A death between the two renames leaves no environment, which is healed like a damaged one.
    """
    with refusals(path):
        _sweep_unfinished(path)
        fresh = os.path.join(path, f"{FRESH_PREFIX}{secrets.token_hex(4)}")
        os.mkdir(fresh, mode=0o700)
        try:
            _write_environment(path, fresh, fill)
            kept = _put_aside(path)
            os.rename(fresh, os.path.join(path, "lmdb"))
            files.fsync_folder(path)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    return kept


def _sweep_unfinished(path: str) -> None:
    for name in os.listdir(path):
        if name.startswith(FRESH_PREFIX):
            shutil.rmtree(os.path.join(path, name), ignore_errors=True)


def _write_environment(path: str, fresh: str, fill: Callable[[Writer], None]) -> None:
    lmdb_opening.reserve_lock_file(fresh)
    with lmdb_errors.translated(path), lmdb_opening.open_lmdb(fresh, create=True) as made:
        databases = {name: made.open_db(name.encode()) for name in environment.DATABASES}
        with made.begin(write=True) as txn:
            writer = Writer(txn, databases, path)
            writer.put_header(StoreHeader(schema.STORE_MAGIC, uuid4()))
            fill(writer)
            writer.seal()
    files.fsync_folder(fresh)
    _give(path, fresh)


def _give(path: str, fresh: str) -> None:
    """Give an environment that root makes to the store's owner; the folder last, so nobody gets in before."""
    for place in (*(os.path.join(fresh, name) for name in os.listdir(fresh)), fresh):
        fd = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            files.give_to_owner_of(path, fd)
        finally:
            os.close(fd)


def _put_aside(path: str) -> str | None:
    """Rename the environment. Nothing is ever deleted: a damaged one may be all that a person has."""
    old = os.path.join(path, "lmdb")
    if not os.path.lexists(old):
        return None
    moment = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    kept = os.path.join(path, f"{DAMAGED_PREFIX}{moment}")
    if os.path.lexists(kept):
        kept = f"{kept}-{secrets.token_hex(2)}"
    os.rename(old, kept)
    return kept


@contextlib.contextmanager
def refusals(path: str) -> Iterator[None]:
    """Turn the system's errors into errors of the store in `path`."""
    try:
        yield
    except LmdbitmapError:
        raise
    except OSError as error:
        step = lmdb_errors.FULL_STEPS.get(error.errno or 0, "choose a folder that this user can write")
        raise StorageError(f"store {path}", error, next_step=step) from error
