"""Mistakes that the product does not make, made on purpose: the laboratory must notice each of them.

Each lasts for the rest of the process that makes it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import lmdb

from lmdbitmap.filter import Filter
from lmdbitmap.interfaces import BlockDevice, Buffer
from lmdbitmap.restoring import restore
from lmdbitmap.storage.owner import Owner
from lmdbitmap.syncs import sync, target
from lmdbitmap.targets.target import opened_target
from lmdbitmap.tracker import points
from lmdbitmap.tracker.lane import FilterLane
from tests.crash.power_cut.stage import COPY, REPOSITORY, SECOND_REPOSITORY, A, B


@contextmanager
def replaced(place: Any, name: str, value: object) -> Iterator[None]:
    before = getattr(place, name)
    setattr(place, name, value)
    try:
        yield
    finally:
        setattr(place, name, before)


def _replace(place: Any, name: str, value: object) -> None:
    setattr(place, name, value)


def commit_after_write() -> None:
    """Law 1 the wrong way round."""
    new_lane, pwrite = Filter.lane, FilterLane.pwrite
    devices: WeakKeyDictionary[FilterLane, BlockDevice] = WeakKeyDictionary()

    def lane(disk: Filter) -> FilterLane:
        made = new_lane(disk)
        devices[made] = disk.device
        return made

    def data_first(lane: FilterLane, data: Buffer, offset: int) -> None:
        devices[lane].pwrite(data, offset)
        pwrite(lane, data, offset)

    _replace(Filter, "lane", lane)
    _replace(FilterLane, "pwrite", data_first)


def store_not_synced() -> None:
    _open_lmdb_with(sync=False)


def meta_not_synced() -> None:
    _open_lmdb_with(metasync=False)


def _open_lmdb_with(**careless: bool) -> None:
    open_lmdb = lmdb.open

    def open_carelessly(*arguments: Any, **options: Any) -> lmdb.Environment:
        return open_lmdb(*arguments, **{**options, **careless})

    _replace(lmdb, "open", open_carelessly)


def image_not_flushed() -> None:
    """A point in time is acknowledged while the image's last writes are in the page cache only."""
    _replace(points, "_flush_images", lambda *_: None)


def distrust_not_synced() -> None:
    declare_distrust = Owner.declare_distrust

    def careless(owner: Owner, reason: str, time_ns: int) -> None:
        with replaced(os, "fdatasync", lambda descriptor: None):
            declare_distrust(owner, reason, time_ns)

    _replace(Owner, "declare_distrust", careless)


def files_not_synced() -> None:
    _replace(os, "fsync", lambda descriptor: None)


def copies_not_synced() -> None:
    """Only the store and the disks' own images are."""
    for name in ("fsync", "fdatasync"):
        _replace(os, name, _except_for_copies(getattr(os, name)))


def copy_noted_first() -> None:
    """A sync notes what its target is at before that is durable."""
    note = sync._note_where_it_is

    def careless(job: Any, point: Any) -> None:
        note(job, point)
        os.fsync(job.target.device.fd)

    _replace(target.SyncTarget, "flush", lambda copy: None)
    _replace(target, "identity_to_keep", lambda device: device.identity())
    _replace(sync, "_note_where_it_is", careless)


def restored_without_sync() -> None:
    """What is restored in place is acknowledged while it is in the page cache only."""

    @contextmanager
    def careless(*places: Any, in_place: bool, **options: Any) -> Iterator[Any]:
        with ExitStack() as careless_until_closed:
            for name in ("fsync", "fdatasync") if in_place else ():
                sync = replaced(os, name, _except_for_images(getattr(os, name)))
                careless_until_closed.enter_context(sync)
            with opened_target(*places, in_place=in_place, **options) as target:
                yield target

    _replace(restore, "opened_target", careless)


def _except_for_images(fsync: Callable[[int], None]) -> Callable[[int], None]:
    def careless(descriptor: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{descriptor}")).name not in (f"{A}.raw", f"{B}.raw"):
            fsync(descriptor)

    return careless


def _except_for_copies(fsync: Callable[[int], None]) -> Callable[[int], None]:
    def careless(descriptor: int) -> None:
        parts = Path(os.readlink(f"/proc/self/fd/{descriptor}")).parts
        if not {REPOSITORY, SECOND_REPOSITORY, f"{COPY}.raw"} & {*parts}:
            fsync(descriptor)

    return careless


FLAWS: dict[str, Callable[[], None]] = {
    flaw.__name__: flaw
    for flaw in (
        commit_after_write, store_not_synced, meta_not_synced, image_not_flushed, distrust_not_synced,
        files_not_synced, copies_not_synced, copy_noted_first, restored_without_sync,
    )
}  # fmt: skip
