"""Repair of damaged region records: their period becomes all dirty, in sound records.

A damaged region record, or a group that lost some, counts as dirty for ever, as its content is unknown. Once a full
backup is durable, a period that is all dirty costs nothing more. So the damaged period then becomes one in which
everything changed. Only closed periods are changed: nothing writes to them.
"""

from __future__ import annotations

import dataclasses

from lmdbitmap.storage.schema import Disk
from lmdbitmap.storage.tally import GROUP_REGIONS
from lmdbitmap.store import Store, Writer

WAS_DAMAGED = "some of its records were damaged"


def mend_closed_periods(store: Store, disk: Disk) -> None:
    """Make damaged closed periods all dirty; durable on return. The caller owns the disk."""
    with store.read() as reader:
        closed = [checkpoint.bitmap_id for checkpoint in reader.checkpoints(disk.uuid)[:-1]]
    for bitmap_id in closed:
        if _is_damaged(store, bitmap_id):
            store.update(lambda writer, bitmap_id=bitmap_id: _make_all_dirty(writer, bitmap_id))  # type: ignore[misc]


def _is_damaged(store: Store, bitmap_id: int) -> bool:
    """Whether a record is damaged. Reads a group at a time, so that no view is kept for long."""
    region: int | None = 0
    while region is not None:
        stop = (region // GROUP_REGIONS + 1) * GROUP_REGIONS
        with store.read() as reader:
            if any(record.damaged for _, record in reader.regions(bitmap_id, region, stop)):
                return True
            region = reader.next_region(bitmap_id, stop)
    return False


def _make_all_dirty(writer: Writer, bitmap_id: int) -> None:
    writer.delete_regions(bitmap_id)
    bitmap = writer.bitmap(bitmap_id)
    writer.put_bitmap(dataclasses.replace(bitmap, all_dirty=bitmap.all_dirty or WAS_DAMAGED))
