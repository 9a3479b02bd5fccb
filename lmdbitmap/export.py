"""Export of bitmaps from a store to files, and import. docs/format.md specifies the file.

Out: exporting the same bitmap twice gives the same bytes. Nothing in a file depends on the time, the place or the
process; the uuid of a disk's changes is made from the two checkpoints that bound them. The bits are counted as they are
written, so if the period records meanwhile, the file is still consistent.

In: a file is copied into the store's folder and proven to its last bit before the store is changed, and the copy's
bits go into one transaction. So not even a file that changes meanwhile is kept in part, and no commit waits for the
file's own disk. An imported bitmap keeps its identity: exported again, it has the same bits, sizes, flags, uuids and
times; only the names in the metadata differ.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import os
import uuid
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from itertools import islice, zip_longest

from lmdbitmap import format as flat
from lmdbitmap.access import operations
from lmdbitmap.errors import Busy, InvalidArgument, Untrusted, error_from_os
from lmdbitmap.extents import Trust
from lmdbitmap.filter import Filter
from lmdbitmap.flat_file import in_qcow2
from lmdbitmap.flat_file.flatfile import FlatFile, NewFlatFile, writing
from lmdbitmap.flat_file.in_qcow2 import NewImage, writing_image
from lmdbitmap.format import NO_UUID, Chunk, Flags, FlatHeader, Metadata, Zeroes
from lmdbitmap.geometry import REGION_BYTES, Geometry
from lmdbitmap.storage import schema
from lmdbitmap.storage.schema import Bitmap, Disk
from lmdbitmap.store import Reader, Store, Writer
from lmdbitmap.system import file_systems
from lmdbitmap.targets.target import refuse_tracked
from lmdbitmap.tracker import chain, standalone
from lmdbitmap.tracker.changes import Changes, unknown_error
from lmdbitmap.tracker.standalone import Dirt, Origin

_BATCH_REGIONS = 512
"""Regions marked in one commit: enough that commits cost little, few enough that no guest waits long."""

# -- out ---------------------------------------------------------------------------------------------------


class FileForm(enum.Enum):
    """What a bitmap is written as: the flat file, or a qcow2 image that holds it, for QEMU's programs."""

    FLAT = "flat"
    QCOW2 = "qcow2"


def export_changes(
    changes: Changes, path: str | os.PathLike[str], *, form: FileForm = FileForm.FLAT
) -> FlatHeader:
    """Write the changes to a flat file, durable at `path` on return; return its header.

    In a qcow2 image the bitmap has the disk's name. Raises `Untrusted` if the changes are not known, `AlreadyExists` if
    `path` is the image of a tracked disk, `FormatError` if it is any other file that is neither empty nor, for a flat
    file, one itself, and `InvalidArgument` for a bitmap that is too large for QEMU. If it raises, nothing was written
    and the old file is still there.
    """
    _require_known(changes)
    refuse_tracked(changes.store, os.fspath(path))
    disk, since, until = changes.disk, changes.since, changes.until
    header = FlatHeader(
        disk_size=disk.size,
        granularity_bits=disk.granularity_bits,
        bitmap_uuid=_uuid_of(changes),
        disk_uuid=disk.uuid,
        epoch_uuid=disk.epoch,
        since_uuid=since.uuid,
        until_uuid=None if until is None else until.uuid,
        since_time_ns=since.time_ns,
        flags=Flags.RECORDING if until is None else flat.NO_FLAGS,
    )
    metadata = {"disk": disk.name, "checkpoint": since.name} | ({"until": until.name} if until else {})
    loose = changes.standing.trust is Trust.SUPERSET
    with _new_file(path, form, header, metadata, disk.name) as new:
        _fill(
            new, path, changes.slices(), loose=loose, needs_room=changes.all_dirty and form is FileForm.FLAT
        )
    return new.header


def export_bitmap(
    store: Store, name: str, path: str | os.PathLike[str], *, form: FileForm = FileForm.FLAT
) -> FlatHeader:
    """Write the stand-alone bitmap called `name` to a file, as `export_changes` does."""
    with store.read() as reader:
        bitmap = standalone.find(reader, name)
    refuse_tracked(store, os.fspath(path))
    header = FlatHeader(
        disk_size=bitmap.size,
        granularity_bits=bitmap.granularity_bits,
        bitmap_uuid=bitmap.uuid,
        disk_uuid=bitmap.origin_disk or NO_UUID,
        epoch_uuid=bitmap.origin_epoch or NO_UUID,
        since_uuid=bitmap.origin_since or NO_UUID,
        until_uuid=bitmap.origin_until,
        since_time_ns=bitmap.origin_time_ns,
        flags=Flags.RECORDING if bitmap.origin_since and not bitmap.origin_until else flat.NO_FLAGS,
    )
    loose = standalone.trust(bitmap) is Trust.SUPERSET
    parts = standalone.slices(store, bitmap)
    full = bitmap.all_dirty is not None
    with _new_file(path, form, header, {"bitmap": name}, name) as new:
        _fill(new, path, parts, loose=loose, needs_room=full and form is FileForm.FLAT)
    return new.header


def keep_changes(changes: Changes, name: str) -> Bitmap:
    """Keep the changes as the stand-alone bitmap `name`, in one transaction. Raises as `export_changes` does."""
    _require_known(changes)
    origin = Origin(
        disk=changes.disk.uuid,
        epoch=changes.disk.epoch,
        since=changes.since.uuid,
        until=changes.until.uuid if changes.until else None,
        time_ns=changes.since.time_ns,
    )

    create = partial(standalone.create, bitmap_uuid=_uuid_of(changes), origin=origin)

    def keep(writer: Writer) -> Bitmap:
        now = replace(changes)  # in the transaction nobody else writes to the store: two reads give the same
        if now.all_dirty:
            full = now.standing.reason or "a new epoch began"
            return create(writer, name, now.geometry, all_dirty=full)
        superset = now.summary.standing.reason
        return create(writer, name, now.geometry, _dirt_of_parts(now.slices()), superset=superset)

    return changes.store.update(keep)


def _require_known(changes: Changes) -> None:
    if changes.standing.trust is Trust.UNTRUSTED:
        raise unknown_error(changes)


def _uuid_of(changes: Changes) -> uuid.UUID:
    """Return a uuid that is always the same for the same changes."""
    until = "now" if changes.until is None else changes.until.uuid
    return uuid.uuid5(changes.disk.uuid, f"{changes.disk.epoch}/{changes.since.uuid}/{until}")


def _new_file(
    path: str | os.PathLike[str], form: FileForm, header: FlatHeader, metadata: Metadata, name: str
) -> AbstractContextManager[NewFlatFile | NewImage]:
    return writing(path, header, metadata) if form is FileForm.FLAT else writing_image(path, header, name)


def _fill(
    new: NewFlatFile | NewImage,
    path: str | os.PathLike[str],
    parts: Iterable[tuple[int, bytearray, bool]],
    *,
    loose: bool,
    needs_room: bool,
) -> None:
    """Fill the file with `parts`: (first region, dirt, loose). It `needs_room` if every bit is one, and stored."""
    if needs_room:
        _require_room(path, new.header.bits_size)
    if loose:
        new.note_superset()
    for region, dirty, is_loose in parts:
        _put(new, region * REGION_BYTES, dirty)
        if is_loose:
            new.note_superset()


def _put(new: NewFlatFile | NewImage, offset: int, dirty: bytearray) -> None:
    room = new.header.bits_size - offset
    if room > 0:  # a disk that grew meanwhile has bits beyond the end of this file
        new.put(offset, memoryview(dirty)[:room])


def _require_room(path: str | os.PathLike[str], size: int) -> None:
    """Raise an error unless the file system has `size` bytes free. A few bytes of description can stand for petabytes
    of ones, which should fail before they fill the disk.
    """
    folder = os.path.dirname(os.path.realpath(path))
    if file_systems.free_bytes(folder) < size:
        raise error_from_os(os.fspath(path), OSError(errno.ENOSPC, f"{size} bytes are needed"))


# -- in ----------------------------------------------------------------------------------------------------


def import_file(
    store: Store,
    path: str | os.PathLike[str],
    name: str,
    *,
    bitmap: str | None = None,
    into: str | None = None,
    all_dirty: bool = False,
) -> Bitmap:
    """Keep the file as the stand-alone bitmap `name`; with `into`, also OR it into that disk's open period.

    The file is a flat file, or a qcow2 image in which QEMU keeps a `bitmap` of that name; None is its only one.
    Takes the room of the file's data in the store's folder, for as long as it runs.
    `all_dirty` takes every block as dirty, whatever the file's bits say. Durable on return; if it raises, it leaves no
    new bitmap. Importing the same file under the same name again is allowed: repeating an import that was killed
    before the merge into `into` completes it. Raises `Untrusted` for a file that is not CLEAN, `FormatError` for a bad
    file, `NotFound` for a bitmap that the image does not have, `AlreadyExists` for a name that is taken,
    `InvalidArgument` for a disk of another size, and `Busy` if the disk cannot be owned, another process changed the
    bitmap while it was merged into the disk, or a guest runs on the image.
    """
    file, is_ours = _opened(store, path, bitmap, all_dirty=all_dirty)
    with file:
        with store.read() as reader:
            _require_place(reader, file.header, name, into)
        with contextlib.nullcontext(file) if all_dirty or is_ours else _proven(file, store) as proven:
            kept, is_new = store.update(lambda writer: _keep(writer, proven, name, into, all_dirty))
    if into is not None:
        try:
            _merge_wherever_owned(store, name, into)
            _require_unchanged(store, kept, into)
        except BaseException:
            if is_new:
                store.update(lambda writer: _remove_unchanged(writer, kept))
            raise
    return kept


def importable_header(path: str | os.PathLike[str], *, bitmap: str | None = None) -> FlatHeader:
    """Return the header of what `import_file` would keep. Raises as that does for a file that it cannot use."""
    if in_qcow2.is_image(path):
        return in_qcow2.header_of(path, bitmap)
    with _flat(path, bitmap) as file:
        return file.header


def _opened(
    store: Store, path: str | os.PathLike[str], bitmap: str | None, *, all_dirty: bool
) -> tuple[FlatFile, bool]:
    """Return the file, and whether it is ours alone: then no copy of it has to be made first."""
    if in_qcow2.is_image(path):
        return in_qcow2.flat_copy(path, bitmap, store.path, all_dirty=all_dirty), True
    return _flat(path, bitmap), False


def _flat(path: str | os.PathLike[str], bitmap: str | None) -> FlatFile:
    file = FlatFile.open(path)
    if bitmap is not None:
        file.close()
        raise InvalidArgument(
            f"{file.path} is no qcow2 image, and holds one bitmap", next_step="do not name a bitmap of it"
        )
    return file


def _proven(file: FlatFile, store: Store) -> FlatFile:
    try:
        return file.proven_copy(store.path)
    except Untrusted as unclean:
        raise Untrusted(
            unclean.problem, next_step="import it with --all-dirty, or make a full backup"
        ) from unclean


def _require_place(reader: Reader, header: FlatHeader, name: str, into: str | None) -> None:
    if _earlier(reader, header, name) is None:
        chain.refuse_taken_name(reader, schema.check_name(name, what="bitmap"))
    if into is not None:
        _require_size(chain.find_disk(reader, into), header.disk_size)


def _require_size(disk: Disk, size: int) -> None:
    if disk.size != size:
        raise InvalidArgument(
            f"the bitmap is of a disk of {size} bytes, and disk {disk.name!r} has {disk.size} bytes",
            next_step="choose the disk that it is of",
        )


def _earlier(reader: Reader, header: FlatHeader, name: str) -> Bitmap | None:
    """Return the bitmap of that name if it has the file's uuid and geometry: maybe an earlier import of the file."""
    for bitmap in reader.bitmaps():
        if (bitmap.name, bitmap.uuid, bitmap.geometry) == (name, header.bitmap_uuid, header.geometry):
            return bitmap
    return None


def _keep(
    writer: Writer, file: FlatFile, name: str, into: str | None, all_dirty: bool
) -> tuple[Bitmap, bool]:
    """Return the bitmap, and whether it is new."""
    header = file.header
    _require_place(writer, header, name, into)
    earlier = _earlier(writer, header, name)
    if earlier is None:
        return _create(writer, file, name, all_dirty), True
    if not _holds(writer, earlier, file, all_dirty):
        chain.refuse_taken_name(writer, name)
    return earlier, False


def _create(writer: Writer, file: FlatFile, name: str, all_dirty: bool) -> Bitmap:
    header = file.header
    file_name = schema.storable(os.path.basename(file.path))
    superset = f"{file_name} may be a superset" if Flags.SUPERSET in header.flags else None
    return standalone.create(
        writer,
        name,
        header.geometry,
        () if all_dirty else _dirt_of_chunks(file.chunks()),
        bitmap_uuid=header.bitmap_uuid,
        origin=Origin(
            disk=_known(header.disk_uuid),
            epoch=_known(header.epoch_uuid),
            since=_known(header.since_uuid),
            until=header.until_uuid,
            time_ns=header.since_time_ns,
        ),
        superset=superset,
        all_dirty=f"{file_name} was taken as everything dirty" if all_dirty else None,
    )


def _holds(reader: Reader, bitmap: Bitmap, file: FlatFile, all_dirty: bool) -> bool:
    """Return whether the bitmap equals what an import of the file would make."""
    if (bitmap.all_dirty is not None, bitmap.superset is not None) != (
        all_dirty,
        Flags.SUPERSET in file.header.flags,
    ):
        return False
    if all_dirty:
        return True
    mine = ((number, region.bits) for number, region in reader.regions(bitmap.id))
    return all(pair[0] == pair[1] for pair in zip_longest(mine, _dirt_of_chunks(file.chunks())))


def _known(number: uuid.UUID) -> uuid.UUID | None:
    return None if number == NO_UUID else number


def _merge_wherever_owned(store: Store, name: str, disk_name: str) -> None:
    """Merge through the process that owns the disk, or own the disk for a moment."""
    disk = chain.disk_called(store, disk_name)
    operations.perform(store, disk, "merge", lambda attached: merge_into(attached, name), bitmap=name)


def _require_unchanged(store: Store, bitmap: Bitmap, disk_name: str) -> None:
    """Raise `Busy` if the bitmap is not the imported one any more.

    The owner merged the bitmap that had the name by then. If it was combined meanwhile, it may lack some of the file's
    blocks.
    """
    with store.read() as reader:
        if bitmap not in reader.bitmaps():
            raise Busy(
                f"bitmap {bitmap.name!r} was changed or removed while it went into disk {disk_name!r}",
                next_step="import the file again, under a name that no other program uses",
            )


def _remove_unchanged(writer: Writer, bitmap: Bitmap) -> None:
    if bitmap in writer.bitmaps():
        writer.delete_bitmap(bitmap.id)


def merge_into(attached: Filter, name: str) -> None:
    """OR the stand-alone bitmap `name` into the disk's open period, regrained outward. Durable on return."""
    with attached.store.read() as reader:
        bitmap = standalone.find(reader, name)
        loose = standalone.why_loose(reader, bitmap)
    dirt = _dirt_of_parts(standalone.slices(attached.store, bitmap))
    add_dirt(attached, dirt, bitmap.geometry, loose=loose)


def merge_file_into(attached: Filter, file: FlatFile, *, loose: str | None) -> None:
    """OR a file's bits into the disk's open period. If the file turns out bad at its end, its bits are in already."""
    add_dirt(attached, _dirt_of_chunks(file.chunks()), file.header.geometry, loose=loose)


def add_dirt(attached: Filter, dirt: Dirt, geometry: Geometry, *, loose: str | None) -> None:
    """OR dirt with `geometry` into the open period; `loose` is why it may name clean blocks as dirty."""
    disk = attached.disk
    _require_size(disk, geometry.size)
    regrained = iter(standalone.regrained(dirt, geometry, disk.granularity_bits))
    while True:
        if loose is not None:  # before and after each batch: a checkpoint may begin a new period in between
            attached.store.update(lambda writer: chain.note_superset(writer, disk, loose))
        batch = list(islice(regrained, _BATCH_REGIONS))
        if not batch:
            return
        attached.mark_regions(batch, disk.geometry)


def _dirt_of_parts(parts: Iterable[tuple[int, bytearray, bool]]) -> Dirt:
    return (pair for region, dirty, _ in parts for pair in standalone.dirt_of_bits(region, dirty))


def _dirt_of_chunks(chunks: Iterable[Chunk]) -> Dirt:
    """Yield the dirt of a file's chunks. Each begins at a multiple of a page of bits, and so at a region."""
    position = 0
    for chunk in chunks:
        if isinstance(chunk, Zeroes):
            position += chunk.length
            continue
        yield from standalone.dirt_of_bits(position // REGION_BYTES, chunk)
        position += len(chunk)
