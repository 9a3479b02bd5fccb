"""Checks a store's region records: each by its CRC-32 and its place, each reported once per bitmap."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from lmdbitmap.geometry import REGION_BLOCKS
from lmdbitmap.storage import schema
from lmdbitmap.upkeep.findings import START_ANEW, Finding, damage, orphan
from lmdbitmap.upkeep.inventory import Inventory, Ledger
from lmdbitmap.work.progress import Progress

_REGION_KEY_BYTES: Final = len(schema.region_key(0, 0))
_REGIONS_PER_REPORT: Final = 4096


@dataclass
class _Unsound:
    """The number of unsound region records of a bitmap, and the first one."""

    damaged: int = 0
    outside: int = 0
    first: int = 0

    def count(self, region: int, *, damaged: bool, outside: bool) -> None:
        if not self.damaged and not self.outside:
            self.first = region
        self.damaged += damaged
        self.outside += outside


def unsound_regions(ledger: Ledger, inventory: Inventory, progress: Progress) -> Iterator[Finding]:
    found = {number: _Unsound() for number in inventory.bitmaps}
    strays = 0
    for bitmap_id, region, sound in _walked(ledger, inventory, progress):
        bitmap = inventory.bitmaps.get(bitmap_id)
        if bitmap is None:
            strays += 1
        elif not sound or region >= bitmap.geometry.region_count:
            outside = region >= bitmap.geometry.region_count
            found[bitmap_id].count(region, damaged=not sound, outside=outside)
    for bitmap_id, unsound in found.items():
        if unsound.damaged or unsound.outside:
            yield from _told(unsound, bitmap_id, inventory)
    if strays and inventory.complete:
        yield orphan("region records", f"{strays} of them belong to no bitmap")


def _walked(ledger: Ledger, inventory: Inventory, progress: Progress) -> Iterator[tuple[int, int, bool]]:
    """Yield (bitmap id, region, whether its bytes are what was written) of every region record, ascending."""
    before, total = {}, 0
    for number, bitmap in sorted(inventory.bitmaps.items()):
        before[number] = total
        total += bitmap.size
    for count, (key, value) in enumerate(ledger.records("regions")):
        if len(key) != _REGION_KEY_BYTES:
            yield -1, 0, False
            continue
        bitmap_id, region = schema.parse_region_key(key)
        yield bitmap_id, region, not schema.decode_region(key, value).damaged
        if count % _REGIONS_PER_REPORT == 0 and bitmap_id in before:
            bitmap = inventory.bitmaps[bitmap_id]
            progress(before[bitmap_id] + bitmap.geometry.bytes_of(region * REGION_BLOCKS, 0)[0], total)
    progress(total, total)


def _told(unsound: _Unsound, bitmap_id: int, inventory: Inventory) -> Iterator[Finding]:
    place, step = inventory.place_of(bitmap_id), inventory.step_for_regions(bitmap_id)
    if unsound.damaged:
        problem = f"{unsound.damaged} of its region records are damaged, the first of region {unsound.first}"
        yield damage(place, problem, step)
    if unsound.outside:
        problem = f"{unsound.outside} of its region records lie past the disk's end"
        yield damage(place, problem, step if inventory.name_of(bitmap_id) else START_ANEW)
