"""Checks whether a store is sound, by a walk over everything that it holds, and says what to do if it is not.

All records are read in one view, so a change by another process is seen whole or not at all. Region records stream by;
only descriptions are kept. Every description is decoded by itself: a bad one does not hide the others. Damage is
reported once per bitmap, however many records it hit.

Nothing is repaired here. Unsound records count as dirty wherever they are used, so a damaged store never calls a
changed block clean. A finding says how to get exact answers again.

LMDB's pages are checked first, in a copy: a walk over damaged ones could end the process. Then all records are counted
and compared with the tallies of their groups (tally.py), so that missing records are found too.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple, TypeVar
from uuid import UUID

from lmdbitmap.errors import FormatError, InvalidArgument, LmdbitmapError, NotFound
from lmdbitmap.extents import Trust
from lmdbitmap.geometry import REGION_BLOCKS
from lmdbitmap.images.image import is_far
from lmdbitmap.images.whereabouts import WHILE_THERE_IS_TIME
from lmdbitmap.storage import owner, schema, tally
from lmdbitmap.storage.records import BITMAP_ID_KEY
from lmdbitmap.storage.schema import Bitmap, Checkpoint, Disk
from lmdbitmap.storage.tally import Tally
from lmdbitmap.store import WENT_BACK, Reader, Store
from lmdbitmap.tracker import continuity, session
from lmdbitmap.tracker.changes import open_period_standing
from lmdbitmap.upkeep.check_folder import remarks_on
from lmdbitmap.work.progress import Progress

_START_ANEW = (
    "make a full backup; if this stays, stop what uses the store, move its folder lmdb aside, and the next command"
    " makes it anew"
)
_DISK_FAILS = (
    "look at the disk under the store; stop what uses it, move its folder lmdb aside, and the next command makes it"
    " anew, all dirty"
)
_COUNTS_AS_DIRTY = "what they stand for counts as dirty; look at the disk under the store"
_LOST_STEP = f"{_COUNTS_AS_DIRTY}, and make a full backup"
_OLD_VIEW_TRANSACTIONS = 1000
_REGION_KEY_BYTES = len(schema.region_key(0, 0))
_REGIONS_PER_REPORT = 4096


class Gravity(enum.IntEnum):
    """How bad a finding is."""

    NOTE = 0
    """Good to know; nothing is lost."""
    DISTRUST = 1
    """A disk needs a full backup; the store itself is sound."""
    DAMAGE = 2
    """Bytes of the store are not what was written."""


class Finding(NamedTuple):
    """Something that is wrong with a store or worth knowing, where it is, and what to do about it."""

    gravity: Gravity
    place: str
    problem: str
    next_step: str

    def __str__(self) -> str:
        return f"{self.place}: {self.problem}; {self.next_step}"


def check_store(store: Store, progress: Progress | None = None) -> list[Finding]:
    """Return everything that is wrong with the store or worth knowing; nothing if it is sound.

    What `progress` raises ends the check.
    """
    pages = list(_pages(store))
    if pages:
        return pages
    with store.read() as reader:
        ledger = _Ledger(reader)
        inventory, findings = _take_inventory(ledger)
        findings += [*_names(inventory), *_disks(inventory), *_bitmaps(inventory)]
        findings += _regions(ledger, inventory, progress or _untold)
        findings += ledger.losses(inventory)
    findings += _views(store)
    for disk in inventory.disks.values():
        findings += _standing(store, disk)
    return [*findings, *_folder(store, inventory)]


def _untold(done: int, total: int) -> None:
    """Do nothing: nobody wants to know."""


# --- pages, and what is lost ---


def _pages(store: Store) -> Iterator[Finding]:
    problems = store.structural_problems()
    if problems:
        yield _damage(
            f"{len(problems)} places in the pages of {store.path}/lmdb/data.mdb", problems[0], _DISK_FAILS
        )


class _Ledger:
    """Yields every record as it is, sound or not, and counts it."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._found: dict[bytes, Tally] = {}
        self._counts: Counter[str] = Counter()

    def records(self, database: str) -> Iterator[tuple[bytes, bytes]]:
        for key, value in self._reader.records(database):
            group = tally.group_key(database, key)
            self._found[group] = self._found.get(group, tally.NOTHING).plus(tally.of([(key, value)]))
            self._counts[database] += 1
            yield key, value

    def losses(self, inventory: _Inventory) -> Iterator[Finding]:
        """Yield a finding for records that are missing by count or tally. Call it after all records were yielded."""
        for database, count in sorted(self._counts.items()):
            said = self._reader.record_count(database)
            if count != said:
                yield _damage(
                    f"database {database}", f"{count} of its {said} records can be found", _DISK_FAILS
                )
        expected = self._reader.tallies()
        expected.pop(tally.STAMP_KEY, None)
        unsound = [key for key in expected.keys() | self._found if expected.get(key) != self._found.get(key)]
        for place, groups in groupby(sorted(unsound), lambda key: _place_of_group(key, inventory)):
            lost = list(groups)
            step = _LOST_STEP if lost[0][:1] != b"r" else _step_for_regions(_bitmap_of(lost[0]), inventory)
            yield _damage(place, f"{len(lost)} groups of its records lost some of them", step)


def _bitmap_of(group: bytes) -> int:
    return int.from_bytes(group[1:9], "big")


def _place_of_group(group: bytes, inventory: _Inventory) -> str:
    kind, rest = group[:1], group[1:]
    if kind == b"r":
        bitmap_id = _bitmap_of(group)
        return f"bitmap {bitmap_id}{_owner_of(bitmap_id, inventory)}"
    words = {b"d": "description of disk", b"c": "checkpoints of disk", b"b": "description of bitmap"}
    return f"{words.get(kind, 'group')} {rest.hex()}"


def _views(store: Store) -> Iterator[Finding]:
    for process, behind in store.views():
        if behind > _OLD_VIEW_TRANSACTIONS:
            yield Finding(
                Gravity.NOTE, f"process {process}", f"it looks at the store as it was {behind} transactions ago,"
                " and what was freed since then takes space", "see what it waits for, or end it",
            )  # fmt: skip


# --- descriptions ---


@dataclass(frozen=True)
class _Inventory:
    """The descriptions that could be read. `complete` if all could."""

    disks: dict[UUID, Disk]
    checkpoints: list[Checkpoint]
    bitmaps: dict[int, Bitmap]
    last_bitmap_id: int
    complete: bool

    def chain_of(self, disk: Disk) -> list[Checkpoint]:
        return [checkpoint for checkpoint in self.checkpoints if checkpoint.disk == disk.uuid]


D = TypeVar("D", Disk, Checkpoint, Bitmap)


def _take_inventory(ledger: _Ledger) -> tuple[_Inventory, list[Finding]]:
    findings: list[Finding] = []
    disks = _decoded(ledger, "disks", Disk, lambda disk: disk.uuid.bytes, findings)
    checkpoints = _decoded(
        ledger, "checkpoints", Checkpoint, lambda c: schema.checkpoint_key(c.disk, c.sequence), findings
    )
    bitmaps = _decoded(ledger, "bitmaps", Bitmap, lambda bitmap: schema.bitmap_key(bitmap.id), findings)
    inventory = _Inventory(
        {disk.uuid: disk for disk in disks},
        checkpoints,
        {bitmap.id: bitmap for bitmap in bitmaps},
        int.from_bytes(dict(ledger.records("meta")).get(BITMAP_ID_KEY, b""), "big"),
        complete=not findings,
    )
    return inventory, findings


def _decoded(
    ledger: _Ledger, database: str, kind: type[D], key_of: Callable[[D], bytes], findings: list[Finding]
) -> list[D]:
    """Return the descriptions that can be read and are where they belong; add a finding for each of the others."""
    found = []
    for key, value in ledger.records(database):
        try:
            description = schema.decode(kind, value, place=f"{database}/{key.hex()}")
        except FormatError as error:
            findings.append(_damage(error.place, f"expected {error.expected}, found {error.found}"))
            continue
        if key == key_of(description):
            found.append(description)
        else:
            findings.append(_damage(f"{kind.what} at {database}/{key.hex()}", "it belongs under another key"))
    return found


def _damage(place: str, problem: str, next_step: str = _START_ANEW) -> Finding:
    return Finding(Gravity.DAMAGE, place, problem, next_step)


# --- what descriptions say together ---


def _names(inventory: _Inventory) -> Iterator[Finding]:
    """Check that each name means one disk or stand-alone bitmap, and each path one disk."""
    names = [disk.name for disk in inventory.disks.values()]
    names += [bitmap.name for bitmap in inventory.bitmaps.values() if bitmap.name is not None]
    for name in _twice(names):
        yield _damage(f"name {name!r}", "several disks or bitmaps have it")
    for image in _twice(disk.image for disk in inventory.disks.values()):
        yield _damage(f"image {image}", "several disks track it")


def _twice(words: Iterable[str]) -> list[str]:
    return [word for word, count in Counter(words).items() if count > 1]


def _disks(inventory: _Inventory) -> Iterator[Finding]:
    for disk in inventory.disks.values():
        place, chain = f"disk {disk.name!r}", inventory.chain_of(disk)
        yield from (_damage(place, problem) for problem in _problems_of(disk))
        yield from (_damage(place, problem) for problem in _problems_of_chain(disk, chain))
        yield from (_damage(place, problem) for problem in _problems_of_periods(disk, chain, inventory))
    for lost in {checkpoint.disk for checkpoint in inventory.checkpoints} - inventory.disks.keys():
        yield _damage(f"checkpoints of disk {lost}", "no such disk is described")


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


def _problems_of_periods(disk: Disk, chain: Sequence[Checkpoint], inventory: _Inventory) -> Iterator[str]:
    for checkpoint in chain:
        bitmap = inventory.bitmaps.get(checkpoint.bitmap_id)
        if bitmap is None:
            yield f"the bitmap of checkpoint {checkpoint.name!r} is not described"
        elif bitmap.geometry != disk.geometry:
            yield f"the bitmap of checkpoint {checkpoint.name!r} is of another size or granularity"
        elif bitmap.name is not None:
            yield f"the bitmap of checkpoint {checkpoint.name!r} stands alone as {bitmap.name!r} too"


def _bitmaps(inventory: _Inventory) -> Iterator[Finding]:
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
            yield _damage(place, "several checkpoints record into it")
        if bitmap.id > inventory.last_bitmap_id:
            yield _damage(place, f"its number is past the last one given out, {inventory.last_bitmap_id}")
        if not used[bitmap.id] and bitmap.name is None and inventory.complete:
            yield _orphan(place, "it belongs to no checkpoint and has no name")


def _orphan(place: str, problem: str) -> Finding:
    return Finding(Gravity.NOTE, place, problem, "nothing needs it; it only takes space")


# --- region records ---


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


def _regions(ledger: _Ledger, inventory: _Inventory, progress: Progress) -> Iterator[Finding]:
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
        yield _orphan("region records", f"{strays} of them belong to no bitmap")


def _walked(ledger: _Ledger, inventory: _Inventory, progress: Progress) -> Iterator[tuple[int, int, bool]]:
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


def _told(unsound: _Unsound, bitmap_id: int, inventory: _Inventory) -> Iterator[Finding]:
    place = f"bitmap {bitmap_id}{_owner_of(bitmap_id, inventory)}"
    step = _step_for_regions(bitmap_id, inventory)
    if unsound.damaged:
        problem = f"{unsound.damaged} of its region records are damaged, the first of region {unsound.first}"
        yield _damage(place, problem, step)
    if unsound.outside:
        problem = f"{unsound.outside} of its region records lie past the disk's end"
        yield _damage(place, problem, step if _stands_alone(bitmap_id, inventory) else _START_ANEW)


def _step_for_regions(bitmap_id: int, inventory: _Inventory) -> str:
    """Return the next step for damaged region records. No backup mends a stand-alone bitmap."""
    name = _stands_alone(bitmap_id, inventory)
    if name is None:
        return _LOST_STEP
    return f"{_COUNTS_AS_DIRTY}, remove the bitmap (`lmdbitmap rm {name}`) and import it again"


def _stands_alone(bitmap_id: int, inventory: _Inventory) -> str | None:
    bitmap = inventory.bitmaps.get(bitmap_id)
    return None if bitmap is None else bitmap.name


def _owner_of(bitmap_id: int, inventory: _Inventory) -> str:
    """Return a bitmap's name for people: its checkpoint's and disk's names, or its own."""
    for checkpoint in inventory.checkpoints:
        disk = inventory.disks.get(checkpoint.disk)
        if checkpoint.bitmap_id == bitmap_id and disk is not None:
            return f" (checkpoint {checkpoint.name!r} of disk {disk.name!r})"
    bitmap = inventory.bitmaps.get(bitmap_id)
    return "" if bitmap is None or bitmap.name is None else f" ({bitmap.name!r})"


# --- around the environment ---


def _standing(store: Store, disk: Disk) -> Iterator[Finding]:
    """Check that the disk's image is still the one that its bitmaps describe.

    It is not a finding that the owner of a disk in deferred mode keeps its bits in memory.
    """
    standing = open_period_standing(store, disk, persisted=disk.durability == schema.DEFERRED)
    place, problem = f"disk {disk.name!r}", standing.reason or ""
    if standing.trust is Trust.UNTRUSTED:
        yield Finding(Gravity.DISTRUST, place, problem, next_step_for(store, disk))
    elif standing.trust is Trust.SUPERSET:
        yield Finding(Gravity.NOTE, place, problem, "the next backup copies a little more than it must")


def next_step_for(store: Store, disk: Disk) -> str:
    """Return the next step for a disk that cannot be trusted: never one that would be refused."""
    is_owned = owner.is_owned(store.owner_path(disk.uuid))
    is_open_here = is_owned and not is_far(disk.image)
    try:
        image = session.look_at(store, disk)
    except LmdbitmapError as error:
        return WHILE_THERE_IS_TIME if is_open_here and isinstance(error, NotFound) else error.next_step
    if is_open_here and disk.identity is not None and not continuity.is_same_file(disk.identity, image):
        return WHILE_THERE_IS_TIME
    if is_owned:
        return (
            "see what the process that serves it has logged, and stop and start it if this lasts; the next backup is"
            " a full one"
        )
    if session.why_not_adopted(store, disk) is not None:
        return "make a full backup"
    return f"make a full backup, or `lmdbitmap adopt {disk.name}` if you know that the image is the same"


def _folder(store: Store, inventory: _Inventory) -> Iterator[Finding]:
    known = {str(disk_uuid) for disk_uuid in inventory.disks}
    for remark in remarks_on(store, known if inventory.complete else None):
        yield Finding(Gravity.NOTE, *remark)
