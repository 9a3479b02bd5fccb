"""Bitmaps that belong to no chain: imported ones, copies, and combinations of them.

A stand-alone bitmap has no armed extents, and a name that no disk and no other bitmap has. To an observer it never
changes in place: a combined bitmap gets another uuid, in one transaction.

No operation here may turn a dirty block into a clean one; clean ones may become dirty. A bitmap is *exact*, or a
*superset* (loose: it may name clean blocks), or *all dirty* because nothing is known:

                     or                      and                     and-not             xor
    target loose     superset                superset                superset            refused
    target all dirty all dirty               superset: the source    refused             refused
    source loose     superset                superset                refused             refused
    source all dirty all dirty               superset: the target    refused             refused
    granularities    the source is regrained outward; into finer     refused             refused
    differ           blocks that makes a superset

Subtracting a loose bitmap would hide changes, hence the refusals. A damaged record counts as all dirty, and makes its
bitmap loose.

Functions that take a `Writer` are durable when its transaction is.
"""

from __future__ import annotations

import enum
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from heapq import merge
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple, TypeAlias

from lmdbitmap import bits
from lmdbitmap.bits import Run
from lmdbitmap.errors import Busy, InvalidArgument, NotFound, Untrusted
from lmdbitmap.extents import Trust
from lmdbitmap.geometry import REGION_BLOCKS, REGION_BYTES, Geometry
from lmdbitmap.interfaces import Buffer
from lmdbitmap.storage import schema
from lmdbitmap.storage.schema import ALL_CLEAN_BITS, Bitmap, Disk
from lmdbitmap.store import Reader, Store, Writer
from lmdbitmap.tracker import chain
from lmdbitmap.tracker.slices import Slice, full_slices, runs_of, slices_of
from lmdbitmap.work.names import known_member, refuse_one_text

_DAMAGED = "a record of it is damaged and counts as all dirty"

Dirt: TypeAlias = Iterable[tuple[int, bytes]]
"""Region numbers, ascending, each with its 512 bytes of dirty bits; regions that are left out are clean."""


class Operation(enum.Enum):
    """How two bitmaps are combined; the values are the command line's words."""

    OR = "or"
    AND = "and"
    AND_NOT = "and-not"
    XOR = "xor"


class Origin(NamedTuple):
    """Whose changes a bitmap holds, and from when to when; None if that is not known."""

    disk: uuid.UUID | None = None
    epoch: uuid.UUID | None = None
    since: uuid.UUID | None = None
    until: uuid.UUID | None = None
    time_ns: int = 0


NO_ORIGIN = Origin()


def find(reader: Reader, name: str) -> Bitmap:
    for bitmap in reader.bitmaps():
        if bitmap.name == name:
            return bitmap
    raise NotFound(f"no bitmap is called {name!r}", next_step="`lmdbitmap ls` lists those there are")


def disk_or_bitmap_called(store: Store, name: str) -> Disk | Bitmap:
    """Find what has that name, in a read transaction of its own: disks and bitmaps share one set of names."""
    with store.read() as reader:
        everything: list[Disk | Bitmap] = [*reader.disks(), *reader.bitmaps()]
    for found in everything:
        if found.name == name:
            return found
    raise NotFound(f"no disk or bitmap is called {name!r}", next_step="`lmdbitmap ls` lists all of them")


def create(
    writer: Writer,
    name: str,
    geometry: Geometry,
    dirt: Dirt = (),
    *,
    bitmap_uuid: uuid.UUID | None = None,
    origin: Origin = NO_ORIGIN,
    superset: str | None = None,
    all_dirty: str | None = None,
) -> Bitmap:
    """Keep `dirt` under `name`. Raises `AlreadyExists` if the name is taken, and whatever `dirt` raises."""
    chain.refuse_taken_name(writer, schema.check_name(name, what="bitmap"))
    bitmap = Bitmap(
        id=writer.new_bitmap_id(), uuid=bitmap_uuid or uuid.uuid4(), name=name,
        size=geometry.size, granularity_bits=geometry.granularity_bits, superset=superset, all_dirty=all_dirty,
        origin_disk=origin.disk, origin_epoch=origin.epoch, origin_since=origin.since, origin_until=origin.until,
        origin_time_ns=origin.time_ns,
    )  # fmt: skip
    _put(writer, bitmap.id, dirt)
    writer.put_bitmap(bitmap)
    return bitmap


def remove(writer: Writer, name: str) -> None:
    writer.delete_bitmap(find(writer, name).id)


def trust(bitmap: Bitmap) -> Trust:
    return Trust.SUPERSET if bitmap.superset or bitmap.all_dirty else Trust.EXACT


# -- reading, in short transactions ------------------------------------------------------------------------


def slices(store: Store, bitmap: Bitmap) -> Iterator[Slice]:
    """Yield the parts of the bitmap that have dirt, ascending; bits past the end are clear.

    Raises `Busy` or `NotFound` if the bitmap is changed or removed while it is read.
    """

    def unchanged(reader: Reader) -> list[int]:
        if find(reader, bitmap.name or "") != bitmap:
            raise Busy(f"bitmap {bitmap.name!r} was changed while it was read", next_step="try again")
        return [bitmap.id]

    if bitmap.all_dirty:
        return full_slices(bitmap.geometry)
    return slices_of(store, bitmap.geometry, unchanged)


def runs(store: Store, bitmap: Bitmap) -> Iterator[Run]:
    """Yield the dirty blocks as ascending runs, cut where slices end."""
    return runs_of(slices(store, bitmap))


# -- dirt from elsewhere -----------------------------------------------------------------------------------


def dirt_of_bits(first_region: int, dirty: Buffer) -> Iterator[tuple[int, bytes]]:
    """Yield the regions of a stretch of bits that begins with a region."""
    for position in range(0, len(dirty), REGION_BYTES):
        region = bytes(dirty[position : position + REGION_BYTES]).ljust(REGION_BYTES, b"\0")
        if region != ALL_CLEAN_BITS:
            yield first_region + position // REGION_BYTES, region


def dirt_of_runs(ascending: Iterable[Run], geometry: Geometry) -> Iterator[tuple[int, bytes]]:
    """Yield runs of blocks as regions. Raise `InvalidArgument` for runs that overlap, descend or leave the disk."""
    number, region, last = 0, bytearray(REGION_BYTES), 0
    for start, stop in ascending:
        _check_run(start, stop, last, geometry)
        last = stop
        while start < stop:
            if start // REGION_BLOCKS != number:
                yield from dirt_of_bits(number, region)
                number, region = start // REGION_BLOCKS, bytearray(REGION_BYTES)
            base = number * REGION_BLOCKS
            end = min(stop, base + REGION_BLOCKS)
            bits.set_range(bits.bitmap_view(region), start - base, end - base)
            start = end
    yield from dirt_of_bits(number, region)


def regrained(dirt: Dirt, geometry: Geometry, granularity_bits: int) -> Dirt:
    """Yield dirt with `geometry` in blocks of another granularity: every block that it touches."""
    if granularity_bits == geometry.granularity_bits:
        return dirt
    outward = bits.regrain_outward(_runs_of(dirt), geometry, granularity_bits)
    return dirt_of_runs(outward, Geometry(geometry.size, granularity_bits))


def _runs_of(dirt: Dirt) -> Iterator[Run]:
    for number, region in dirt:
        for start, stop in bits.runs(region):
            yield number * REGION_BLOCKS + start, number * REGION_BLOCKS + stop


def _check_run(start: int, stop: int, last: int, geometry: Geometry) -> None:
    geometry.check_blocks(start, stop)
    if start < last:
        raise InvalidArgument(
            f"blocks {start}..{stop} come after block {last}", next_step="sort the runs and keep them apart"
        )


# -- combining ---------------------------------------------------------------------------------------------


def combine(
    store: Store, name: str, operation: Operation, others: Iterable[str], *, into: str | None = None
) -> Bitmap:
    """Combine the bitmap `name` with each of the others in turn by `operation`; return the result.

    The result replaces `name`, or with `into` is kept as that new bitmap, and all others stay as they are. Durable on
    return; if it raises, nothing has happened. Raises `Untrusted` if the result could hide a change; `InvalidArgument`
    for names of disks, different disk sizes, granularities that do not fit, and `name` among the others without `into`;
    `NotFound`; `AlreadyExists` if a disk or a bitmap is called `into`.
    """
    refuse_one_text(others)
    # Anything else than an operation would pass by the refusals that are for it.
    known, names = known_member(Operation, operation, f"operation {operation!r} on bitmaps"), [name, *others]
    return store.update(lambda writer: _combine(writer, known, names, into))


def _combine(writer: Writer, operation: Operation, names: Sequence[str], into: str | None) -> Bitmap:
    """Combine in one transaction. The sources are found before the result exists, so none can be the result."""
    answer, *sources = [_operand(writer, name) for name in names]
    if into is None:
        _require_apart(answer, sources)
    else:
        chain.refuse_taken_name(writer, schema.check_name(into, what="bitmap"))
        answer = _copied(writer, answer)
    for source in sources:
        answer = _combined(writer, answer, operation, source)
    answer = replace(answer, name=answer.name if into is None else into)
    writer.put_bitmap(answer)
    return answer


def _operand(reader: Reader, name: str) -> Bitmap:
    if reader.disk_named(name) is not None:
        raise InvalidArgument(
            f"{name!r} is a disk, and only stand-alone bitmaps are combined",
            next_step="keep its changes as one first: `lmdbitmap export` them, and `lmdbitmap import` the file",
        )
    return find(reader, name)


def _copied(writer: Writer, bitmap: Bitmap) -> Bitmap:
    """Copy a bitmap under a new number. A damaged record becomes a sound all-dirty one; `superset` says so."""
    copy = replace(bitmap, id=writer.new_bitmap_id(), uuid=uuid.uuid4(), superset=why_loose(writer, bitmap))
    _put(writer, copy.id, _dirt(writer, bitmap, bitmap.granularity_bits))
    return copy


def _combined(writer: Writer, target: Bitmap, operation: Operation, source: Bitmap) -> Bitmap:
    _require_one_size(target, source)
    loose = why_loose(writer, target), why_loose(writer, source)
    if operation in (Operation.AND_NOT, Operation.XOR):
        _require_safe(target, operation, source, *loose)
    superset = loose[0] or loose[1] or _why_finer(target, source)
    change = _unite if operation is Operation.OR else _replace
    return replace(
        change(writer, target, operation, source),
        superset=superset,
        uuid=uuid.uuid4(),
        # it is no longer what changed from here to there, but may still be of one disk
        origin_disk=target.origin_disk if target.origin_disk == source.origin_disk else None,
        origin_epoch=None, origin_since=None, origin_until=None, origin_time_ns=0,
    )  # fmt: skip


def _unite(writer: Writer, target: Bitmap, _: Operation, source: Bitmap) -> Bitmap:
    """OR in place: write only the regions that the source holds."""
    all_dirty = target.all_dirty or source.all_dirty
    if all_dirty is not None:
        writer.delete_regions(target.id)
        return replace(target, all_dirty=all_dirty)
    for number, theirs in _dirt(writer, source, target.granularity_bits):
        mine = writer.region(target.id, number)
        united = bytearray(theirs)
        bits.or_into(united, ALL_CLEAN_BITS if mine is None else mine.bits)
        writer.put_region(target.id, number, 0, bytes(united))
    return target


def _replace(writer: Writer, target: Bitmap, operation: Operation, source: Bitmap) -> Bitmap:
    """Do the other operations: write the result's records under a new number, and delete the old ones."""
    both_all_dirty = target.all_dirty is not None and source.all_dirty is not None
    fresh = replace(target, id=writer.new_bitmap_id(), all_dirty=target.all_dirty if both_all_dirty else None)
    if not both_all_dirty:
        _put(writer, fresh.id, _answer(writer, target, operation, source))
    writer.delete_bitmap(target.id)
    return fresh


def _answer(writer: Writer, target: Bitmap, operation: Operation, source: Bitmap) -> Dirt:
    """Combine two bitmaps. Only `and` has operands that are all dirty; its answer is then the other operand."""
    mine = _dirt(writer, target, target.granularity_bits)
    theirs = _dirt(writer, source, target.granularity_bits)
    if source.all_dirty is not None:
        return mine
    if target.all_dirty is not None:
        return theirs
    return _region_by_region(mine, theirs, _INTO[operation])


_INTO: dict[Operation, Callable[[bytearray, bytes], None]] = {
    Operation.AND: bits.and_into,
    Operation.AND_NOT: bits.and_not_into,
    Operation.XOR: bits.xor_into,
}


def _region_by_region(
    mine: Dirt, theirs: Dirt, change: Callable[[bytearray, bytes], None]
) -> Iterator[tuple[int, bytes]]:
    """Yield the regions of both together; an absent region is clean."""
    for number, sides in groupby(merge(_sided(mine, 0), _sided(theirs, 1)), key=itemgetter(0)):
        pair = [ALL_CLEAN_BITS, ALL_CLEAN_BITS]
        for _, side, region in sides:
            pair[side] = region
        answer = bytearray(pair[0])
        change(answer, pair[1])
        yield from dirt_of_bits(number, answer)


def _sided(dirt: Dirt, side: int) -> Iterator[tuple[int, int, bytes]]:
    return ((number, side, region) for number, region in dirt)


def _dirt(reader: Reader, bitmap: Bitmap, granularity_bits: int) -> Dirt:
    """Yield its records, regrained if need be. The caller may write meanwhile."""
    dirt = ((number, region.bits) for number, region in reader.regions(bitmap.id))
    return regrained(dirt, bitmap.geometry, granularity_bits)


def _put(writer: Writer, bitmap_id: int, dirt: Dirt) -> None:
    for number, region in dirt:
        writer.put_region(bitmap_id, number, 0, region)


# -- what must not be combined -----------------------------------------------------------------------------


def _require_apart(target: Bitmap, sources: Sequence[Bitmap]) -> None:
    """Refuse the target among the sources: in `a xor b a` the second `a` would not be what it was."""
    if target in sources:
        raise InvalidArgument(
            f"bitmap {target.name!r} would be combined with itself while it changes",
            next_step="do not name it among the others, or keep the result under another name (--into)",
        )


def _require_one_size(target: Bitmap, source: Bitmap) -> None:
    if target.size != source.size:
        raise InvalidArgument(
            f"bitmap {target.name!r} is of a disk of {target.size} bytes,"
            f" and {source.name!r} of one of {source.size} bytes",
            next_step="combine bitmaps of disks of one size",
        )


def _require_safe(
    target: Bitmap, operation: Operation, source: Bitmap, target_loose: str | None, source_loose: str | None
) -> None:
    """Refuse what could hide a change, for operations that remove blocks."""
    if target.granularity_bits != source.granularity_bits:
        raise InvalidArgument(
            f"bitmap {target.name!r} has blocks of {target.geometry.granularity} bytes,"
            f" and {source.name!r} of {source.geometry.granularity} bytes",
            next_step=f"use {operation.value} with bitmaps of one granularity",
        )
    _require_exact(source, source_loose, operation)
    _require_exact(target, target_loose if operation is Operation.XOR else target.all_dirty, operation)


def _require_exact(bitmap: Bitmap, loose: str | None, operation: Operation) -> None:
    if loose is not None:
        raise Untrusted(
            f"{operation.value} could hide changes, because bitmap {bitmap.name!r} may name clean blocks as dirty"
            f" ({loose})",
            next_step="use an exact one, or combine with `or` or `and`",
        )


def why_loose(reader: Reader, bitmap: Bitmap) -> str | None:
    """Return why a bitmap may name clean blocks as dirty; None if it is exact."""
    reason = bitmap.all_dirty or bitmap.superset
    if reason is None and any(region.damaged for _, region in reader.regions(bitmap.id)):
        return _DAMAGED
    return reason


def _why_finer(target: Bitmap, source: Bitmap) -> str | None:
    if target.granularity_bits >= source.granularity_bits:
        return None
    return f"blocks of {source.geometry.granularity} bytes went into it"
