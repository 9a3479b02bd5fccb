"""Checks whether a store is sound, by a walk over everything that it holds, and says what to do if it is not.

All records are read in one view, so a change by another process is seen whole or not at all. Region records stream by;
only descriptions are kept (inventory.py). Damage is reported once per bitmap, however many records it hit.

Nothing is repaired here. Unsound records count as dirty wherever they are used, so a damaged store never calls a
changed block clean. A finding says how to get exact answers again.

LMDB's pages are checked first, in a copy: a walk over damaged ones could end the process. Then all records are counted
and compared with the tallies of their groups (tally.py), so that missing records are found too.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Final

from lmdbitmap.errors import LmdbitmapError, NotFound
from lmdbitmap.extents import Trust
from lmdbitmap.images.image import is_far
from lmdbitmap.images.whereabouts import WHILE_THERE_IS_TIME
from lmdbitmap.storage import owner, schema, tally
from lmdbitmap.storage.schema import Disk
from lmdbitmap.store import Store
from lmdbitmap.tracker import continuity, session
from lmdbitmap.tracker.changes import open_period_standing
from lmdbitmap.upkeep.descriptions import contradictions
from lmdbitmap.upkeep.findings import DISK_FAILS, LOST_STEP, Finding, Gravity, damage
from lmdbitmap.upkeep.folder import remarks_on
from lmdbitmap.upkeep.inventory import Inventory, Ledger, take_inventory
from lmdbitmap.upkeep.regions import unsound_regions
from lmdbitmap.work.progress import Progress

_OLD_VIEW_TRANSACTIONS: Final = 1000


def check_store(store: Store, progress: Progress | None = None) -> list[Finding]:
    """Return everything that is wrong with the store or worth knowing; nothing if it is sound.

    What `progress` raises ends the check.
    """
    pages = list(_pages(store))
    if pages:
        return pages
    with store.read() as reader:
        ledger = Ledger(reader)
        inventory, findings = take_inventory(ledger)
        findings += contradictions(inventory)
        findings += unsound_regions(ledger, inventory, progress or _untold)
        findings += _losses(ledger, inventory)
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
        yield damage(
            f"{len(problems)} places in the pages of {store.path}/lmdb/data.mdb", problems[0], DISK_FAILS
        )


def _losses(ledger: Ledger, inventory: Inventory) -> Iterator[Finding]:
    """Yield a finding for records that are missing by count or tally, once all records were yielded."""
    for database, count in sorted(ledger.counts.items()):
        said = ledger.reader.record_count(database)
        if count != said:
            yield damage(f"database {database}", f"{count} of its {said} records can be found", DISK_FAILS)
    expected, found = ledger.reader.tallies(), ledger.found
    expected.pop(tally.STAMP_KEY, None)
    unsound = [key for key in expected.keys() | found if expected.get(key) != found.get(key)]
    for place, groups in groupby(sorted(unsound), lambda key: _place_of_group(key, inventory)):
        lost = list(groups)
        step = LOST_STEP if lost[0][:1] != b"r" else inventory.step_for_regions(_bitmap_of(lost[0]))
        yield damage(place, f"{len(lost)} groups of its records lost some of them", step)


def _bitmap_of(group: bytes) -> int:
    return int.from_bytes(group[1:9], "big")


def _place_of_group(group: bytes, inventory: Inventory) -> str:
    kind, rest = group[:1], group[1:]
    if kind == b"r":
        return inventory.place_of(_bitmap_of(group))
    words = {b"d": "description of disk", b"c": "checkpoints of disk", b"b": "description of bitmap"}
    return f"{words.get(kind, 'group')} {rest.hex()}"


def _views(store: Store) -> Iterator[Finding]:
    for process, behind in store.views():
        if behind > _OLD_VIEW_TRANSACTIONS:
            yield Finding(
                Gravity.NOTE, f"process {process}", f"it looks at the store as it was {behind} transactions ago,"
                " and what was freed since then takes space", "see what it waits for, or end it",
            )  # fmt: skip


# --- around the environment ---


def _standing(store: Store, disk: Disk) -> Iterator[Finding]:
    """Check that the disk's image is still the one that its bitmaps describe.

    It is not a finding that the owner of a disk in deferred mode keeps its bits in memory. One disk about which nothing
    can be known does not hide the others.
    """
    place = f"disk {disk.name!r}"
    try:
        standing = open_period_standing(store, disk, persisted=disk.durability == schema.DEFERRED)
    except LmdbitmapError as error:
        yield damage(place, f"whether it can be trusted is not known: {error.problem}", error.next_step)
        return
    problem = standing.reason or ""
    if standing.trust is Trust.UNTRUSTED:
        yield Finding(Gravity.DISTRUST, place, problem, next_step_for(store, disk))
    elif standing.trust is Trust.SUPERSET:
        yield Finding(Gravity.NOTE, place, problem, "the next backup reads a little more than it must")


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
    return (
        f"make a full backup, or `lmdbitmap adopt {disk.name}` if you know that the image is the same, and that the"
        " store is no copy that was put back"
    )


def _folder(store: Store, inventory: Inventory) -> Iterator[Finding]:
    known = {str(disk_uuid) for disk_uuid in inventory.disks}
    for remark in remarks_on(store, known if inventory.complete else None):
        yield Finding(Gravity.NOTE, *remark)
