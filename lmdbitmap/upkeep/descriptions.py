"""Checks what descriptions say together: names, chains of checkpoints, and the bitmaps that these record into."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from lmdbitmap.errors import InvalidArgument
from lmdbitmap.storage import schema
from lmdbitmap.storage.schema import Checkpoint, Disk
from lmdbitmap.store import WENT_BACK
from lmdbitmap.upkeep.findings import Finding, Gravity, damage, orphan
from lmdbitmap.upkeep.inventory import Inventory


def contradictions(inventory: Inventory) -> Iterator[Finding]:
    yield from _names(inventory)
    yield from _disks(inventory)
    yield from _bitmaps(inventory)


def _names(inventory: Inventory) -> Iterator[Finding]:
    """Check that each name means one disk or stand-alone bitmap, and each path one disk."""
    names = [disk.name for disk in inventory.disks.values()]
    names += [bitmap.name for bitmap in inventory.bitmaps.values() if bitmap.name is not None]
    for name in _twice(names):
        yield damage(f"name {name!r}", "several disks or bitmaps have it")
    for image in _twice(disk.image for disk in inventory.disks.values()):
        yield damage(f"image {image}", "several disks track it")


def _twice(words: Iterable[str]) -> list[str]:
    return [word for word, count in Counter(words).items() if count > 1]


def _disks(inventory: Inventory) -> Iterator[Finding]:
    for disk in inventory.disks.values():
        place, chain = f"disk {disk.name!r}", inventory.chain_of(disk)
        yield from (damage(place, problem) for problem in _problems_of(disk))
        yield from (damage(place, problem) for problem in _problems_of_chain(disk, chain))
        yield from (damage(place, problem) for problem in _problems_of_periods(disk, chain, inventory))
    for lost in {checkpoint.disk for checkpoint in inventory.checkpoints} - inventory.disks.keys():
        yield damage(f"checkpoints of disk {lost}", "no such disk is described")


def _problems_of(disk: Disk) -> Iterator[str]:
    try:
        schema.check_disk_name(disk.name)
    except InvalidArgument as error:
        yield error.problem


def _problems_of_chain(disk: Disk, chain: Sequence[Checkpoint]) -> Iterator[str]:
    """Check that a chain is ordered, its epochs follow each other, and its last epoch is the disk's."""
    if not chain:
        yield "it has no checkpoint, so nothing records"
        return
    epochs = [epoch for epoch, _ in groupby(chain, key=lambda checkpoint: checkpoint.epoch)]
    if len(set(epochs)) < len(epochs):
        yield "the checkpoints of an epoch do not follow each other"
    if epochs[-1] != disk.epoch:
        yield "its newest checkpoint is of another epoch than the disk"
    if chain[-1].sequence >= disk.next_sequence:
        yield f"checkpoint {chain[-1].name!r} has number {chain[-1].sequence}, the next is {disk.next_sequence}"
    for name in _twice(checkpoint.name for checkpoint in chain):
        yield f"several checkpoints are called {name!r}"


def _problems_of_periods(disk: Disk, chain: Sequence[Checkpoint], inventory: Inventory) -> Iterator[str]:
    for checkpoint in chain:
        bitmap = inventory.bitmaps.get(checkpoint.bitmap_id)
        if bitmap is None:
            yield f"the bitmap of checkpoint {checkpoint.name!r} is not described"
        elif bitmap.geometry != disk.geometry:
            yield f"the bitmap of checkpoint {checkpoint.name!r} is of another size or granularity"
        elif bitmap.name is not None:
            yield f"the bitmap of checkpoint {checkpoint.name!r} stands alone as {bitmap.name!r} too"


def _bitmaps(inventory: Inventory) -> Iterator[Finding]:
    for disk in inventory.disks.values():
        chain = inventory.chain_of(disk)
        recording = inventory.bitmaps.get(chain[-1].bitmap_id) if chain else None
        if recording is not None and recording.all_dirty == WENT_BACK:
            step = "look at the disk under the store, and make a full backup"
            yield Finding(Gravity.DISTRUST, f"disk {disk.name!r}", WENT_BACK, step)
    used = Counter(checkpoint.bitmap_id for checkpoint in inventory.checkpoints)
    for bitmap in inventory.bitmaps.values():
        place = f"bitmap {bitmap.id}"
        if used[bitmap.id] > 1:
            yield damage(place, "several checkpoints record into it")
        if bitmap.id > inventory.last_bitmap_id:
            yield damage(place, f"its number is past the last one given out, {inventory.last_bitmap_id}")
        if not used[bitmap.id] and bitmap.name is None and inventory.complete:
            yield orphan(place, "it belongs to no checkpoint and has no name")
