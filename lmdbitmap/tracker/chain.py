"""Disks and their chains of checkpoints, as changes to one transaction of the store.

A disk's chain is ordered by sequence number. Each checkpoint owns the bitmap of the period that begins with it. Only
the newest bitmap records. So:

    checkpoint     monday ---------- tuesday --------- wednesday ------ now
    bitmap           [ monday's ]      [ tuesday's ]     [ wednesday's, recording ]

    changes since tuesday        =  tuesday's OR wednesday's
    forget(tuesday)              =  monday's becomes monday's OR tuesday's
    forget(monday), the first    =  its bitmap is deleted: no question can need it any more

An epoch is a stretch without a gap in tracking. It begins with a checkpoint `epoch-N` whose bitmap is all
dirty. Chains of different epochs are never merged, and never answer for each other.

All functions take the open transaction; their changes are durable when that transaction is.
"""

from __future__ import annotations

import dataclasses
from uuid import uuid4

from lmdbitmap import bits
from lmdbitmap.errors import AlreadyExists, InvalidArgument, NotFound, Untrusted
from lmdbitmap.geometry import REGION_BLOCKS, Geometry, ceil_div
from lmdbitmap.interfaces import ImageIdentity
from lmdbitmap.storage import schema
from lmdbitmap.storage.schema import Bitmap, Checkpoint, Disk
from lmdbitmap.store import Reader, Store, Writer

MAX_REGIONS = 1 << 25
"""Most regions of one disk: 16 GiB of bits, as for 64 TiB in blocks of 512 bytes."""
_LISTED = "`lmdbitmap ls` lists those there are"
_DAMAGED = "records of it were damaged"
NEVER_BACKED_UP = "everything counts as dirty until the first full backup"


def find_disk(reader: Reader, name: str) -> Disk:
    if (disk := reader.disk_named(name)) is not None:
        return disk
    if any(bitmap.name == name for bitmap in reader.bitmaps()):
        raise NotFound(f"{name!r} is a stand-alone bitmap, not a disk", next_step=_LISTED)
    raise NotFound(f"no disk is called {name!r}", next_step=_LISTED)


def disk_called(store: Store, name: str) -> Disk:
    """Find the disk in a read transaction of its own."""
    with store.read() as reader:
        return find_disk(reader, name)


def find_checkpoint(reader: Reader, disk: Disk, name: str) -> Checkpoint:
    """Return the disk's checkpoint of that name, of any epoch."""
    for checkpoint in reader.checkpoints(disk.uuid):
        if checkpoint.name == name:
            return checkpoint
    raise NotFound(
        f"disk {disk.name!r} has no checkpoint {name!r}",
        next_step=f"`lmdbitmap info {disk.name}` lists those there are",
    )


def current_checkpoint(reader: Reader, disk: Disk) -> Checkpoint:
    """Return the newest checkpoint, whose bitmap records. Raises `NotFound` for a disk that was removed."""
    checkpoints = reader.checkpoints(disk.uuid)
    if not checkpoints:
        raise NotFound(f"disk {disk.name!r} was removed meanwhile", next_step=_LISTED)
    return checkpoints[-1]


def epoch_chain(reader: Reader, disk: Disk) -> list[Checkpoint]:
    """Return the checkpoints of the disk's present epoch, oldest first; never empty."""
    return [checkpoint for checkpoint in reader.checkpoints(disk.uuid) if checkpoint.epoch == disk.epoch]


def begun_anew(reader: Reader, disk: Disk) -> str | None:
    """Return why the disk's epoch began, if an earlier one ended and this one has no further checkpoint yet."""
    is_fresh = disk.epoch_number > 1 and len(epoch_chain(reader, disk)) == 1
    return disk.epoch_reason if is_fresh else None


def add_disk(
    writer: Writer,
    name: str,
    image: str,
    identity: ImageIdentity,
    *,
    granularity_bits: int,
    durability: str,
    policy: str,
    time_ns: int,
) -> Disk:
    """Start tracking: the first checkpoint is made, and everything is dirty."""
    refuse_taken_name(writer, schema.check_disk_name(name))
    for other in writer.disks():
        if other.image == image:
            raise AlreadyExists(
                f"{image} is tracked already, as {other.name!r}",
                next_step=f"use disk {other.name!r}, or name another image",
            )
    check_trackable(Geometry(identity.size, granularity_bits))
    _check_modes(durability, policy)
    disk = Disk(
        uuid=uuid4(), name=name, image=image, size=identity.size, granularity_bits=granularity_bits,
        epoch=uuid4(), epoch_number=1, epoch_reason="tracking began here", durability=durability,
        policy=policy, created_ns=time_ns, next_sequence=1, identity=identity,
    )  # fmt: skip
    return _begin_epoch(writer, disk, NEVER_BACKED_UP, time_ns)


def check_trackable(geometry: Geometry) -> None:
    """Refuse a disk whose bitmap would need more address space than a process can count on."""
    if geometry.region_count > MAX_REGIONS:
        raise InvalidArgument(
            f"a disk of {geometry.size} bytes has too many blocks of {geometry.granularity} bytes",
            next_step="choose a larger granularity",
        )


def _check_modes(durability: str, policy: str) -> None:
    for mode, known in ((durability, schema.DURABILITIES), (policy, schema.POLICIES)):
        if mode not in known:
            raise InvalidArgument(
                f"{mode!r} is no mode of a disk", next_step=f"name one of {', '.join(known)}"
            )


def refuse_taken_name(reader: Reader, name: str) -> None:
    """Disks and stand-alone bitmaps share their names, so that one word says which is meant."""
    if any(disk.name == name for disk in reader.disks()):
        raise AlreadyExists(f"a disk is called {name!r} already", next_step="choose another name")
    if any(bitmap.name == name for bitmap in reader.bitmaps()):
        raise AlreadyExists(f"a bitmap is called {name!r} already", next_step="choose another name")


def remove_disk(writer: Writer, disk: Disk) -> None:
    """Forget the disk, its chain and its bitmaps. The image is not touched."""
    for checkpoint in writer.checkpoints(disk.uuid):
        _drop(writer, checkpoint)
    writer.delete_disk(disk.uuid)


def start_epoch(writer: Writer, disk: Disk, reason: str, time_ns: int) -> Disk:
    """Begin a new epoch, in which everything is dirty, after track was lost. Return the disk as it is now."""
    reason = schema.storable(reason)
    disk = dataclasses.replace(
        disk, epoch=uuid4(), epoch_number=disk.epoch_number + 1, epoch_reason=reason, resizing_from=None
    )
    return _begin_epoch(writer, disk, f"a new epoch began: {reason}", time_ns)


def _begin_epoch(writer: Writer, disk: Disk, reason: str, time_ns: int) -> Disk:
    name = f"epoch-{disk.epoch_number}"
    if any(checkpoint.name == name for checkpoint in writer.checkpoints(disk.uuid)):
        name = f"{name}-{disk.epoch.hex[:8]}"
    disk, _ = _append(writer, disk, name, time_ns, all_dirty=reason)
    return disk


def add_checkpoint(writer: Writer, disk: Disk, name: str, time_ns: int) -> tuple[Disk, Checkpoint]:
    """Close the recording period and open the next, all clean. The caller has drained the writes in flight.

    Raises what `require_new_name` raises.
    """
    require_new_name(writer, disk, name)
    return _append(writer, disk, name, time_ns, all_dirty=None)


def require_new_name(reader: Reader, disk: Disk, name: str) -> None:
    """Raise `AlreadyExists` for the name of a checkpoint of any epoch, `InvalidArgument` for one that none can have."""
    schema.check_name(name, what="checkpoint")
    if any(checkpoint.name == name for checkpoint in reader.checkpoints(disk.uuid)):
        raise AlreadyExists(
            f"disk {disk.name!r} has a checkpoint {name!r} already",
            next_step="choose another name, or forget that one",
        )


def _append(
    writer: Writer, disk: Disk, name: str, time_ns: int, *, all_dirty: str | None
) -> tuple[Disk, Checkpoint]:
    bitmap = Bitmap(writer.new_bitmap_id(), uuid4(), disk.size, disk.granularity_bits, all_dirty=all_dirty)
    checkpoint = Checkpoint(disk.uuid, disk.next_sequence, name, uuid4(), time_ns, disk.epoch, bitmap.id)
    disk = dataclasses.replace(disk, next_sequence=disk.next_sequence + 1)
    writer.put_bitmap(bitmap)
    writer.put_checkpoint(checkpoint)
    writer.put_disk(disk)
    return disk, checkpoint


def forget(writer: Writer, disk: Disk, name: str) -> None:
    """Delete a checkpoint; its bitmap is ORed into the one before it, if that is of the same epoch.

    The newest checkpoint's bitmap records, so a caller that owns the disk persists its bits before, and loads them
    again after. The only checkpoint of the present epoch cannot be deleted: a bitmap has to record.
    """
    checkpoint = find_checkpoint(writer, disk, name)
    chain = [other for other in writer.checkpoints(disk.uuid) if other.epoch == checkpoint.epoch]
    if checkpoint.epoch == disk.epoch and len(chain) == 1:
        raise InvalidArgument(
            f"checkpoint {name!r} is the only one that records disk {disk.name!r}",
            next_step="make another checkpoint first",
        )
    position = chain.index(checkpoint)
    if position > 0:
        merge_into(writer, chain[position - 1].bitmap_id, checkpoint.bitmap_id)
    _drop(writer, checkpoint)


def note_superset(writer: Writer, disk: Disk, reason: str) -> None:
    """Note that from now on the recording bitmap may name clean blocks as dirty."""
    bitmap = writer.bitmap(current_checkpoint(writer, disk).bitmap_id)
    writer.put_bitmap(dataclasses.replace(bitmap, superset=bitmap.superset or schema.storable(reason)))


def _drop(writer: Writer, checkpoint: Checkpoint) -> None:
    writer.delete_bitmap(checkpoint.bitmap_id)
    writer.delete_checkpoint(checkpoint)


def note_damage(writer: Writer, bitmap_id: int) -> None:
    """Note that a damaged record of the bitmap is written anew: it names clean blocks, and no longer shows why."""
    bitmap = writer.bitmap(bitmap_id)
    writer.put_bitmap(dataclasses.replace(bitmap, superset=bitmap.superset or _DAMAGED))


def merge_into(writer: Writer, target_id: int, source_id: int) -> None:
    """OR one bitmap into another of the same granularity; the source stays as it is.

    Where everything is dirty, records say nothing, and none are kept.
    """
    target, source = writer.bitmap(target_id), writer.bitmap(source_id)
    all_dirty, damaged = target.all_dirty or source.all_dirty, False
    if all_dirty is None:
        damaged = _merge_regions(writer, target_id, source_id)
    else:
        writer.delete_regions(target_id)
    superset = target.superset or source.superset or (_DAMAGED if damaged else None)
    writer.put_bitmap(dataclasses.replace(target, all_dirty=all_dirty, superset=superset))


def _merge_regions(writer: Writer, target_id: int, source_id: int) -> bool:
    """OR the records of one bitmap into those of the other; return whether one was damaged."""
    damaged = False
    for number, region in writer.regions(source_id):
        mine = writer.region(target_id, number)
        damaged = damaged or region.damaged or (mine is not None and mine.damaged)
        armed, merged = region.armed, bytearray(region.bits)
        if mine is not None:
            armed |= mine.armed
            bits.or_into(merged, mine.bits)
        writer.put_region(target_id, number, armed, bytes(merged))
    return damaged


def mark_outward(writer: Writer, bitmap: Bitmap, offset: int, length: int) -> None:
    """Make every block that the byte range touches dirty, by hand. Durable with the transaction."""
    blocks = bitmap.geometry.blocks_outward(offset, length)
    for number in range(blocks.start // REGION_BLOCKS, ceil_div(blocks.stop, REGION_BLOCKS)):
        region = writer.region(bitmap.id, number)
        if region is not None and region.damaged:
            note_damage(writer, bitmap.id)
        block_bits = bytearray(region.bits if region else schema.ALL_CLEAN_BITS)
        base = number * REGION_BLOCKS
        view = bits.bitmap_view(block_bits)
        bits.set_range(view, max(blocks.start - base, 0), min(blocks.stop - base, REGION_BLOCKS))
        writer.put_region(bitmap.id, number, region.armed if region else 0, bytes(block_bits))


def resize(writer: Writer, disk: Disk, size: int) -> Disk:
    """Give the disk another size: new blocks are dirty, and blocks past the end leave every bitmap for good.

    New blocks are dirty in the epoch's closed periods too: these may have lost bits there to an earlier cut. Nothing is
    marked where all is dirty anyway: that could be millions of records.
    """
    resized = dataclasses.replace(disk, size=size)
    for checkpoint in writer.checkpoints(disk.uuid):
        bitmap = dataclasses.replace(writer.bitmap(checkpoint.bitmap_id), size=size)
        if size < disk.size and _truncate(writer, checkpoint.bitmap_id, resized.geometry):
            bitmap = dataclasses.replace(bitmap, superset=bitmap.superset or _DAMAGED)
        writer.put_bitmap(bitmap)
        if size > disk.size and checkpoint.epoch == disk.epoch and bitmap.all_dirty is None:
            mark_outward(writer, bitmap, disk.size, size - disk.size)
    writer.put_disk(resized)
    return resized


def _truncate(writer: Writer, bitmap_id: int, geometry: Geometry) -> bool:
    """Drop the bits past the end; the block that the end cuts keeps its bit. Armed extents become exact bits.

    So does all dirt of a last region that was damaged, or lost with its group, whose tally goes: return whether it was.
    """
    last, kept = divmod(geometry.block_count, REGION_BLOCKS)
    region = next((found for _, found in writer.regions(bitmap_id, last, last + 1)), None) if kept else None
    writer.delete_regions(bitmap_id, last)
    if region is None:
        return False
    block_bits = bytearray(bits.dirty_bits(region.armed, region.bits))
    bits.truncate(block_bits, kept)
    writer.put_region(bitmap_id, last, 0, bytes(block_bits))
    return region.damaged


def begin_resize(writer: Writer, disk: Disk, size: int) -> Disk:
    """Allow either size from now on; the image decides, and may refuse a size.

    Blocks that will be cut off are dirty first (law 1): a power cut may leave zeroes there, and the old size.
    """
    check_trackable(Geometry(size, disk.granularity_bits))
    if size < disk.size:
        recording = writer.bitmap(current_checkpoint(writer, disk).bitmap_id)
        mark_outward(writer, recording, size, disk.size - size)
    return dataclasses.replace(disk, resizing_from=size)


def end_resize(writer: Writer, disk: Disk, size: int) -> Disk:
    return dataclasses.replace(resize(writer, disk, size), resizing_from=None)


def require_same_epoch(disk: Disk, checkpoint: Checkpoint) -> None:
    """Raise `Untrusted` for a checkpoint of an older epoch: the changes since then cannot be known."""
    if checkpoint.epoch != disk.epoch:
        raise Untrusted(
            f"nothing is known since checkpoint {checkpoint.name!r} of disk {disk.name!r}: {disk.epoch_reason}",
            next_step="make a full backup",
        )
