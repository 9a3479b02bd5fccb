"""Remarks on a store's folder, apart from the records: who may write it, and which files are left over in it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from typing import NamedTuple

from lmdbitmap.notes import holds, sync_note
from lmdbitmap.storage.creating import DAMAGED_PREFIX, FOLDERS, FRESH_PREFIX
from lmdbitmap.store import Store
from lmdbitmap.system.file_names import finished_name, is_uuid

_OTHERS_WRITE = 0o022


class Remark(NamedTuple):
    """A remark on a path; no record is lost by it."""

    path: str
    problem: str
    next_step: str


def remarks_on(store: Store, known: set[str] | None) -> Iterator[Remark]:
    """Yield all remarks. `known` are the uuids of the store's disks; None if these are unknown."""
    for folder in ("", "lmdb", *FOLDERS):
        yield from _access_to(os.path.join(store.path, folder))
    for name in sorted(name for name in os.listdir(store.path) if name.startswith(DAMAGED_PREFIX)):
        problem = "the store was damaged, and was made anew; this is what it was"
        step = "look at the disk under it; remove it once you do not want to look at it any more"
        yield Remark(os.path.join(store.path, name), problem, step)
    for path in _leftovers(store, known):
        yield Remark(path, "nothing needs it", "remove it")


def _access_to(path: str) -> Iterator[Remark]:
    """Yield remarks on a folder's access: a user that may write the store can make the tracker wrong."""
    if not os.path.isdir(path):
        yield Remark(path, "the folder is missing", f"make it: mkdir -m 700 {path}")
    elif stat.S_IMODE(os.stat(path).st_mode) & _OTHERS_WRITE:
        yield Remark(path, "other users may write to it", f"chmod go-w {path}")


def _leftovers(store: Store, known: set[str] | None) -> Iterator[str]:
    """Yield files that killed processes left, and files of removed disks; `known` is None if unknown.

    Only names that our files have count: other things that are kept here, even backups, are not ours to judge.
    """
    for name in sorted(os.listdir(store.path)):
        path = os.path.join(store.path, name)
        if name.startswith(FRESH_PREFIX) or (finished_name(name) and not os.path.isdir(path)):
            yield path
    for folder in FOLDERS:
        place = os.path.join(store.path, folder)
        for name in sorted(os.listdir(place)) if os.path.isdir(place) else ():
            path = os.path.join(place, name)
            if _is_left_over(name, known) and not os.path.isdir(path):
                yield path


def _is_left_over(name: str, known: set[str] | None) -> bool:
    if finished_name(name):
        return True
    disk = _disk_of(name)
    return known is not None and disk is not None and disk not in known


def _disk_of(name: str) -> str | None:
    """Return the uuid of a file's disk: a note's name begins with it, other files have it as their name."""
    return sync_note.disk_of(name) or holds.disk_of(name) or (name if is_uuid(name) else None)
