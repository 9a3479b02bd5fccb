"""The records of a store, read and changed inside one transaction.

Invariants:
- Values fit in a leaf page; record sizes never vary. Keys are in schema.py.
- No record, and no absence of one, is believed against the tally of its group (tally.py). If LMDB lost or mixed up
  region records, their whole group is dirty; if it lost a description, the store is damaged. Only `Reader.region` and
  `checkpoint` read one record alone: the former for a caller that adds to it (a lost record stays missing in the
  tally), the latter for a caller that has seen the whole chain.
- A view whose stamp is not its transaction's number is of a damaged file, and is an error.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from uuid import UUID

import lmdb

from lmdbitmap.geometry import ceil_div
from lmdbitmap.storage import environment, schema, tally
from lmdbitmap.storage.lmdb_errors import DamagedStore
from lmdbitmap.storage.schema import Bitmap, Checkpoint, Disk, Region, StoreHeader
from lmdbitmap.storage.tally import GROUP_REGIONS, Tally
from lmdbitmap.work.names import require_text

log = logging.getLogger(__name__)

BITMAP_ID_KEY = b"next bitmap id"


class Reader:
    """One consistent view of the store. Valid inside its `with` block, in one thread; keep it short."""

    def __init__(
        self,
        txn: lmdb.Transaction,
        databases: dict[str, lmdb._Database],
        place: str,
        disk_keys: dict[str, bytes] | None = None,
    ) -> None:
        self._txn = txn
        self._databases = databases
        self._place = place
        self._disk_keys = {} if disk_keys is None else disk_keys
        """Keys of disks by name, as found in earlier views: hints, which may be wrong by now."""

    def end(self) -> None:
        """Drop the transaction: a reference to it keeps a forked child from opening the store."""
        del self._txn

    @property
    def transaction(self) -> int:
        """The number of the transaction that this view shows; for a writer its own."""
        return self._txn.id()

    def require_newest(self, transaction: int) -> None:
        """Raise `FormatError` unless this is a view of what transaction `transaction` left."""
        found = self._tally(tally.STAMP_KEY)
        if found != Tally(transaction):
            raise self._lost(
                f"the stamp of transaction {transaction}", f"{found.records if found else 'none'}"
            )

    def require_descriptions(self) -> None:
        """Raise `DamagedStore` unless every description is there and is what was written: all at once, undecoded."""
        groups: dict[bytes, list[tuple[bytes, bytes]]] = {
            key: []
            for key in self.tallies()
            if not key.startswith((tally.groups_of("regions"), tally.STAMP_KEY))
        }
        for database in ("meta", "disks", "checkpoints", "bitmaps"):
            for key, value in self._items(database, b""):
                if database != "meta" and not schema.is_whole(value):
                    raise self._lost(f"a whole record at {database}/{key.hex()}", f"{len(value)} other bytes")
                groups.setdefault(tally.group_key(database, key), []).append((key, value))
        for group, records in groups.items():
            self._require_whole(group, records)

    def disks(self) -> list[Disk]:
        """All disks, by name."""
        found = [schema.decode(Disk, value, place=self._place) for _, value in self._all("disks")]
        return sorted(found, key=lambda disk: disk.name)

    def disk(self, disk_uuid: UUID) -> Disk | None:
        value = self._one("disks", disk_uuid.bytes)
        return None if value is None else schema.decode(Disk, value, place=self._place)

    def disk_named(self, name: str) -> Disk | None:
        """Return the disk of that name, and prove only this one: with hundreds of disks, proving each would add up.

        Raises `InvalidArgument` for a name that is not text.
        """
        key = self._disk_keys.get(require_text(name, "disk"), b"")
        value = self._get("disks", key) if key else None
        if value is not None and (disk := self._if_called(name, key, value)) is not None:
            return disk
        for key, value in self._items("disks", b""):
            if (disk := self._if_called(name, key, value)) is not None:
                self._disk_keys[name] = key
                return disk
        self._all("disks")  # none is lost
        return None

    def _if_called(self, name: str, key: bytes, value: bytes) -> Disk | None:
        """Return the disk if it has that name."""
        if name.encode(errors="replace") not in value:
            return None
        self._require_whole(tally.group_key("disks", key), [(key, value)])
        disk = schema.decode(Disk, value, place=self._place)
        return disk if disk.name == name else None

    def checkpoints(self, disk_uuid: UUID) -> list[Checkpoint]:
        """The disk's whole chain, oldest first, older epochs included."""
        items = list(self._items("checkpoints", disk_uuid.bytes))
        self._require_whole(tally.group_key("checkpoints", disk_uuid.bytes), items)
        return [schema.decode(Checkpoint, value, place=self._place) for _, value in items]

    def checkpoint(self, disk_uuid: UUID, sequence: int) -> Checkpoint | None:
        """Return one checkpoint, for a caller that has seen the whole chain and asks whether it is still there."""
        value = self._get("checkpoints", schema.checkpoint_key(disk_uuid, sequence))
        return None if value is None else schema.decode(Checkpoint, value, place=self._place)

    def bitmap(self, bitmap_id: int) -> Bitmap:
        value = self._one("bitmaps", schema.bitmap_key(bitmap_id))
        if value is None:
            raise self._lost(f"a description of bitmap {bitmap_id}", "none")
        return schema.decode(Bitmap, value, place=self._place)

    def bitmaps(self) -> list[Bitmap]:
        """All stand-alone bitmaps, by name."""
        found = [schema.decode(Bitmap, value, place=self._place) for _, value in self._all("bitmaps")]
        return sorted((b for b in found if b.name is not None), key=lambda b: b.name or "")

    def region(self, bitmap_id: int, region: int) -> Region | None:
        """Return one region record; None if all is clean, or if it was lost: only for a caller that adds to it."""
        key = schema.region_key(bitmap_id, region)
        value = self._get("regions", key)
        return None if value is None else self._checked(key, value)

    def regions(self, bitmap_id: int, start: int = 0, stop: int = 2**63) -> Iterator[tuple[int, Region]]:
        """Yield the records of regions [start, stop), ascending; absent regions are all clean.

        The caller may write while it reads: records are read a group at a time.
        """
        group = self._next_group(bitmap_id, start // GROUP_REGIONS)
        while group is not None and group * GROUP_REGIONS < stop:
            yield from (item for item in self._group(bitmap_id, group) if start <= item[0] < stop)
            group = self._next_group(bitmap_id, group + 1)

    def next_group(self, bitmap_id: int, start: int) -> int | None:
        """Return the start of the first group that has records and does not end before region `start`."""
        group = self._next_group(bitmap_id, start // GROUP_REGIONS)
        return None if group is None else group * GROUP_REGIONS

    def next_region(self, bitmap_id: int, start: int) -> int | None:
        """The first region from `start` on that has a record."""
        return next((number for number, _ in self.regions(bitmap_id, start)), None)

    def records(self, database: str) -> Iterator[tuple[bytes, bytes]]:
        """Every record as it is, proven or not."""
        return self._items(database, b"")

    def record_count(self, database: str) -> int:
        """Return the number of records according to LMDB."""
        count: int = self._txn.stat(self._databases[database])["entries"]
        return count

    def tallies(self) -> dict[bytes, Tally | None]:
        """Return every group's tally by its key; None if it is damaged."""
        return {key: tally.decode(key, value) for key, value in self._items("tallies", b"")}

    def _next_group(self, bitmap_id: int, start: int) -> int | None:
        """Return the first group from `start` on that has records, or should have some."""
        bitmap_key = schema.bitmap_key(bitmap_id)
        found: list[int] = []
        with self._cursor("regions") as cursor:
            if cursor.set_range(schema.region_key(bitmap_id, start * GROUP_REGIONS)):
                key = bytes(cursor.key())
                if key.startswith(bitmap_key):
                    found.append(int.from_bytes(key[8:16], "big") // GROUP_REGIONS)
        with self._cursor("tallies") as cursor:
            if cursor.set_range(tally.region_group_key(bitmap_key, start)):
                key = bytes(cursor.key())
                if key.startswith(tally.groups_of("regions") + bitmap_key):
                    found.append(int.from_bytes(key[9:17], "big"))
        return min((group for group in found if group >= start), default=None)

    def _group(self, bitmap_id: int, group: int) -> list[tuple[int, Region]]:
        """Return the records of one group; if they are not those that were written, all of its regions as damaged."""
        start = group * GROUP_REGIONS
        records = self._region_records(bitmap_id, start)
        if self._tally(tally.region_group_key(schema.bitmap_key(bitmap_id), group)) == tally.of(records):
            return [(int.from_bytes(key[8:], "big"), self._checked(key, value)) for key, value in records]
        log.error(
            "store %s: region records from %d on of bitmap %d were lost: all that %d of them stand for counts as dirty",
            self._place, start, bitmap_id, GROUP_REGIONS,
        )  # fmt: skip
        stop = min(start + GROUP_REGIONS, self._region_count(bitmap_id))
        return [(number, Region(0, schema.ALL_DIRTY_BITS, damaged=True)) for number in range(start, stop)]

    def _region_records(self, bitmap_id: int, start: int) -> list[tuple[bytes, bytes]]:
        """Return a group's records as they are; if the tree is a ring, slightly more than a group can have."""
        limit = schema.region_key(bitmap_id, start + GROUP_REGIONS)
        found: list[tuple[bytes, bytes]] = []
        with self._cursor("regions") as cursor:
            if cursor.set_range(schema.region_key(bitmap_id, start)):
                for item in cursor:
                    key = bytes(item[0])
                    if key >= limit or len(found) > GROUP_REGIONS:
                        break
                    found.append((key, bytes(item[1])))
        return found

    def _region_count(self, bitmap_id: int) -> int:
        value = self._one("bitmaps", schema.bitmap_key(bitmap_id))
        return (
            1 << 63
            if value is None
            else schema.decode(Bitmap, value, place=self._place).geometry.region_count
        )

    def _all(self, database: str) -> list[tuple[bytes, bytes]]:
        """Every description of a kind; raises `FormatError` if one is lost, or not the newest."""
        items = list(self._items(database, b""))
        for key, value in items:
            self._require_whole(tally.group_key(database, key), [(key, value)])
        tallies = sum(1 for _ in self._items("tallies", tally.groups_of(database)))
        if tallies != len(items):
            raise self._lost(f"{tallies} records in {database}", str(len(items)))
        return items

    def _one(self, database: str, key: bytes) -> bytes | None:
        value = self._get(database, key)
        self._require_whole(tally.group_key(database, key), [] if value is None else [(key, value)])
        return value

    def _require_whole(self, group_key: bytes, records: list[tuple[bytes, bytes]]) -> None:
        expected = self._tally(group_key)
        if expected != tally.of(records):
            count = "?" if expected is None else expected.records
            raise self._lost(
                f"{count} records in group {group_key.hex()}", f"{len(records)}, or others than were written"
            )

    def _tally(self, group_key: bytes) -> Tally | None:
        """Return the group's tally; None if it is damaged."""
        value = self._get("tallies", group_key)
        return tally.NOTHING if value is None else tally.decode(group_key, value)

    def _lost(self, expected: str, found: str) -> DamagedStore:
        return DamagedStore(self._place, expected=expected, found=found)

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
            before = None
            for item in cursor:
                key = bytes(item[0])
                if before is not None and key <= before:
                    raise self._lost(f"a key after {before.hex()} in {database}", key.hex())
                if not key.startswith(prefix):
                    return
                before = key
                yield key, bytes(item[1])


class Writer(Reader):
    """A view that can be changed. Nothing is visible to others until its transaction is durable.

    `seal` it before its transaction is committed.
    """

    def __init__(
        self,
        txn: lmdb.Transaction,
        databases: dict[str, lmdb._Database],
        place: str,
        disk_keys: dict[str, bytes] | None = None,
    ) -> None:
        super().__init__(txn, databases, place, disk_keys)
        self._differences: dict[bytes, Tally] = {}
        self._is_changed = False

    def seal(self) -> bool:
        """Write the tallies of what was changed, and the stamp; return whether anything was changed."""
        self._write_tallies()
        if self._is_changed:
            self._put_tally(tally.STAMP_KEY, Tally(self._txn.id()))
        return self._is_changed

    def _write_tallies(self) -> None:
        for key in list(self._differences):
            self._put_tally(key, self._tally(key))
            self._is_changed = True
        self._differences.clear()

    def _all(self, database: str) -> list[tuple[bytes, bytes]]:
        self._write_tallies()  # which are counted there
        return super()._all(database)

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
        """Return a number that no bitmap of this store ever had."""
        self._require_whole(tally.group_key("meta", b""), list(self._items("meta", b"")))
        last = int.from_bytes(self._get("meta", BITMAP_ID_KEY) or b"", "big")
        self._put("meta", BITMAP_ID_KEY, (last + 1).to_bytes(8, "big"))
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

    def delete_region(self, bitmap_id: int, region: int) -> None:
        """Make it all clean."""
        self._delete("regions", schema.region_key(bitmap_id, region))

    def delete_regions(self, bitmap_id: int, start: int = 0) -> None:
        """Make every region from `start` on all clean."""
        limit = schema.region_key(bitmap_id + 1, 0)
        with self._cursor("regions") as cursor:
            cursor.set_range(schema.region_key(bitmap_id, start))
            while b"" < (key := bytes(cursor.key())) < limit:  # it has no key at the end
                self._count("regions", key, bytes(cursor.value()), None)
                cursor.delete()
        self._drop_groups(schema.bitmap_key(bitmap_id), ceil_div(start, GROUP_REGIONS))

    def _drop_groups(self, bitmap_key: bytes, start: int) -> None:
        """Delete the tallies, whatever they were, of groups that were deleted as a whole."""
        first, prefix = tally.region_group_key(bitmap_key, start), tally.groups_of("regions") + bitmap_key
        with self._cursor("tallies") as cursor:
            cursor.set_range(first)
            while bytes(cursor.key()).startswith(prefix):
                cursor.delete()
        gone = {key: tally.NOTHING for key in self._differences if key >= first and key.startswith(prefix)}
        self._differences.update(gone)

    def put_header(self, header: StoreHeader) -> None:
        self._put("meta", environment.HEADER_KEY, schema.encode(header))

    def _put(self, database: str, key: bytes, value: bytes) -> None:
        before = self._txn.replace(key, value, db=self._databases[database])
        self._count(database, key, None if before is None else bytes(before), value)

    def _delete(self, database: str, key: bytes) -> None:
        before = self._txn.pop(key, db=self._databases[database])
        self._count(database, key, None if before is None else bytes(before), None)

    def _count(self, database: str, key: bytes, before: bytes | None, after: bytes | None) -> None:
        group = tally.group_key(database, key)
        difference = self._differences.get(group, tally.NOTHING)
        if before is not None:
            difference = difference.minus(tally.of([(key, before)]))
        if after is not None:
            difference = difference.plus(tally.of([(key, after)]))
        self._differences[group] = difference

    def _tally(self, group_key: bytes) -> Tally | None:
        stored = super()._tally(group_key)
        difference = self._differences.get(group_key)
        return stored if stored is None or difference is None else stored.plus(difference)

    def _put_tally(self, key: bytes, new: Tally | None) -> None:
        """Write a tally; a damaged one (None) stays as it is, as its value is unknown."""
        if new == tally.NOTHING:
            self._txn.delete(key, db=self._databases["tallies"])
        elif new is not None:
            self._txn.put(key, tally.encode(key, new), db=self._databases["tallies"])
