"""What a store describes: its records, counted as they are read, and the descriptions among them.

Every description is decoded by itself: a bad one does not hide the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar
from uuid import UUID

from lmdbitmap.errors import FormatError
from lmdbitmap.storage import schema, tally
from lmdbitmap.storage.records import BITMAP_ID_KEY
from lmdbitmap.storage.schema import Bitmap, Checkpoint, Disk
from lmdbitmap.storage.tally import Tally
from lmdbitmap.store import Reader
from lmdbitmap.upkeep.findings import COUNTS_AS_DIRTY, LOST_STEP, Finding, damage

D = TypeVar("D", Disk, Checkpoint, Bitmap)


class Ledger:
    """Yields every record as it is, sound or not, and counts it: what it has `found` is compared with the tallies."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.found: dict[bytes, Tally] = {}
        """Tallies of the records yielded so far, by the keys of their groups."""
        self.counts: Counter[str] = Counter()
        """How many records were yielded of each database."""

    def records(self, database: str) -> Iterator[tuple[bytes, bytes]]:
        for key, value in self.reader.records(database):
            group = tally.group_key(database, key)
            self.found[group] = self.found.get(group, tally.NOTHING).plus(tally.of([(key, value)]))
            self.counts[database] += 1
            yield key, value


@dataclass(frozen=True)
class Inventory:
    """The descriptions that could be read. `complete` if all could."""

    disks: dict[UUID, Disk]
    checkpoints: list[Checkpoint]
    bitmaps: dict[int, Bitmap]
    last_bitmap_id: int
    complete: bool

    def chain_of(self, disk: Disk) -> list[Checkpoint]:
        return [checkpoint for checkpoint in self.checkpoints if checkpoint.disk == disk.uuid]

    def name_of(self, bitmap_id: int) -> str | None:
        """Return the name of a bitmap that stands alone; None of any other."""
        bitmap = self.bitmaps.get(bitmap_id)
        return None if bitmap is None else bitmap.name

    def place_of(self, bitmap_id: int) -> str:
        """Return a bitmap's place for people, with its checkpoint's and disk's names, or its own."""
        place, name = f"bitmap {bitmap_id}", self.name_of(bitmap_id)
        for checkpoint in self.checkpoints:
            disk = self.disks.get(checkpoint.disk)
            if checkpoint.bitmap_id == bitmap_id and disk is not None:
                return f"{place} (checkpoint {checkpoint.name!r} of disk {disk.name!r})"
        return place if name is None else f"{place} ({name!r})"

    def step_for_regions(self, bitmap_id: int) -> str:
        """Return the next step for damaged region records. No backup mends a bitmap that stands alone."""
        name = self.name_of(bitmap_id)
        if name is None:
            return LOST_STEP
        return f"{COUNTS_AS_DIRTY}, remove the bitmap (`lmdbitmap rm {name}`) and import it again"


def take_inventory(ledger: Ledger) -> tuple[Inventory, list[Finding]]:
    findings: list[Finding] = []
    disks = _decoded(ledger, "disks", Disk, lambda disk: disk.uuid.bytes, findings)
    checkpoints = _decoded(
        ledger, "checkpoints", Checkpoint, lambda c: schema.checkpoint_key(c.disk, c.sequence), findings
    )
    bitmaps = _decoded(ledger, "bitmaps", Bitmap, lambda bitmap: schema.bitmap_key(bitmap.id), findings)
    inventory = Inventory(
        {disk.uuid: disk for disk in disks},
        checkpoints,
        {bitmap.id: bitmap for bitmap in bitmaps},
        int.from_bytes(dict(ledger.records("meta")).get(BITMAP_ID_KEY, b""), "big"),
        complete=not findings,
    )
    return inventory, findings


def _decoded(
    ledger: Ledger, database: str, kind: type[D], key_of: Callable[[D], bytes], findings: list[Finding]
) -> list[D]:
    """Return the descriptions that can be read and are where they belong; add a finding for each of the others."""
    found = []
    for key, value in ledger.records(database):
        try:
            description = schema.decode(kind, value, place=f"{database}/{key.hex()}")
        except FormatError as error:
            findings.append(damage(error.place, f"expected {error.expected}, found {error.found}"))
            continue
        if key == key_of(description):
            found.append(description)
        else:
            findings.append(damage(f"{kind.what} at {database}/{key.hex()}", "it belongs under another key"))
    return found
