"""The flat bitmap file: what is accepted keeps every rule of docs/format.md, and what is CLEAN is true."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator

import msgpack

from lmdbitmap import export
from lmdbitmap import format as flat
from lmdbitmap.errors import FormatError, Untrusted
from lmdbitmap.extents import Trust
from lmdbitmap.flat_file.flatfile import FlatFile
from lmdbitmap.flat_file.inspection import inspect_file
from lmdbitmap.format import Flags, FlatHeader, Metadata
from lmdbitmap.geometry import REGION_BLOCKS
from lmdbitmap.store import Store
from lmdbitmap.tracker import standalone
from tests.fuzz.inputs import Input, fill_scratch_file, scratch_file, scratch_folder
from tests.helpers import naive_flat

PLACE = "x.dbm"
RAW, MEND_HEADER, MEND_SIZES, MEND_BITS, UNSEALED, SPARSE, TO_DISK, SPREAD = (1 << bit for bit in range(8))
MOST_BLOCKS = 1 << 19
MAX_PRETENDED = 1 << 52


def flat_file(data: bytes) -> None:
    source = Input(data)
    mode = source.byte()
    if mode & SPARSE and not mode & RAW:
        check_pretender(assembled(source, mode))
        return
    file = source.rest() if mode & RAW else assembled(source, mode)
    dirty = check_in_memory(file)
    if mode & TO_DISK:
        check_on_disk(file, dirty)


def flat_import(data: bytes) -> None:
    """What an imported bitmap calls dirty is what the file calls dirty, no block less and none more."""
    source = Input(data)
    file = assembled(source, source.byte() & ~(RAW | UNSEALED | SPARSE))
    dirty = check_in_memory(file)
    path = fill_scratch_file(file)
    with Store.create(os.path.join(scratch_folder(), "store")) as store:
        try:
            export.import_file(store, path, "taken")
        except (FormatError, Untrusted):
            assert dirty is None
            return
        assert dirty is not None
        try:
            check_imported(store, dirty)
        finally:
            store.update(lambda writer: standalone.remove(writer, "taken"))


# --- making a file of an input ---


def assembled(source: Input, mode: int) -> bytes:
    """A file with the fields of the input, some of them made right, its metadata and its bits."""
    fields = bytearray(source.take(flat.FIXED_SIZE).ljust(flat.FIXED_SIZE, b"\0"))
    if mode & MEND_HEADER:
        mend_header(fields)
    if mode & MEND_SIZES:
        mend_sizes(fields)
    size = naive_flat.get(fields, "header_size")
    if not 4096 <= size <= flat.MAX_HEADER_SIZE:
        size = 4096
    metadata = source.take(min(naive_flat.get(fields, "metadata_length"), size - flat.FIXED_SIZE))
    bits = spread(source.rest()) if mode & SPREAD else source.rest()
    if mode & MEND_BITS:
        bits = mend_bits(fields, bits)
    header = fields + metadata.ljust(size - flat.FIXED_SIZE, b"\0")
    return bytes((header if mode & UNSEALED else naive_flat.seal(header)) + bits)


def spread(bits: bytes) -> bytes:
    """A few bytes to a page, so that there are pages of zeroes too: a file has holes for those."""
    return b"".join(
        bits[start : start + 16].ljust(4096, b"\0") for start in range(0, min(len(bits), 256), 16)
    )


def mend_header(fields: bytearray) -> None:
    known = {"magic": int.from_bytes(flat.MAGIC, "little"), "major_version": 1, "header_size": 4096}
    for name in ("incompatible_features", "reserved", "reserved_space"):
        known[name] = 0
    known["flags"] = naive_flat.get(fields, "flags") % 8
    for name, number in known.items():
        naive_flat.put(fields, name, number)


def mend_sizes(fields: bytearray) -> None:
    granularity_bits = 9 + naive_flat.get(fields, "granularity_bits") % 23
    disk_size = naive_flat.get(fields, "disk_size") % (MOST_BLOCKS << granularity_bits)
    blocks = -(-disk_size >> granularity_bits)
    naive_flat.put(fields, "granularity_bits", granularity_bits)
    naive_flat.put(fields, "disk_size", disk_size)
    naive_flat.put(fields, "bit_count", blocks)
    naive_flat.put(fields, "bits_size", -(-blocks // 64) * 8)


def mend_bits(fields: bytearray, bits: bytes) -> bytes:
    """As many bits as the header says, none past the disk's end, counted and summed up rightly."""
    size, count = naive_flat.get(fields, "bits_size"), naive_flat.get(fields, "bit_count")
    size = min(size, MOST_BLOCKS // 8)
    number = int.from_bytes(bits[:size], "little") & ((1 << min(count, 8 * size)) - 1)
    mended = number.to_bytes(size, "little")
    naive_flat.put(fields, "dirty_count", number.bit_count())
    naive_flat.put(fields, "bits_checksum", zlib.crc32(mended))
    return mended


# --- what must hold ---


def check_in_memory(file: bytes) -> int | None:
    """The dirty blocks, as the bits of a number, if the file can be believed."""
    try:
        header, metadata = flat.decode_header(file[: flat.MAX_HEADER_SIZE], file_size=len(file), place=PLACE)
    except FormatError:
        return None
    check_header(file, header, metadata)
    bits = file[header.header_size :]
    try:
        kept = b"".join(flat.trusted_bits(header, pages_of(bits), place=PLACE))
    except Untrusted:
        assert not header.clean
        return None
    except FormatError:
        assert not bits_are_sound(file, bits)
        return None
    assert header.clean
    assert kept == bits
    assert bits_are_sound(file, bits)
    return int.from_bytes(kept, "little")


def check_header(file: bytes, header: FlatHeader, metadata: Metadata) -> None:
    size, packed_size = naive_flat.get(file, "header_size"), naive_flat.get(file, "metadata_length")
    assert file[:8] == flat.MAGIC
    assert naive_flat.seal(bytearray(file[:size])) == file[:size]
    assert naive_flat.get(file, "bit_count") == header.bit_count
    assert header.bit_count == -(-header.disk_size >> header.granularity_bits)
    assert header.header_size == size >= flat.FIXED_SIZE + packed_size
    assert not header.clean or len(file) == size + header.bits_size
    assert header.dirty_count <= header.bit_count
    packed = file[flat.FIXED_SIZE : flat.FIXED_SIZE + packed_size]
    check_encoding(file[:size], header, metadata, packed)
    check_unsealing(file[:size], header, metadata)


def check_encoding(area: bytes, header: FlatHeader, metadata: Metadata, packed: bytes) -> None:
    """What was accepted can be written again, and comes out the same if it was written as we write."""
    again = flat.encode_header(header, metadata)
    whole = len(again) + header.bits_size
    assert flat.decode_header(again, file_size=whole, place=PLACE) == (header, metadata)
    plain = not naive_flat.get(area, "minor_version") and not naive_flat.get(area, "compatible_features")
    if plain and len(again) == len(area) and msgpack.packb(metadata) == packed:
        assert again == area


def check_unsealing(area: bytes, header: FlatHeader, metadata: Metadata) -> None:
    cleared, kept = flat.decode_header(flat.without_clean(area), file_size=len(area), place=PLACE)
    assert cleared.flags == header.flags & ~Flags.CLEAN
    assert kept == metadata
    assert (cleared.disk_size, cleared.disk_uuid) == (header.disk_size, header.disk_uuid)


def bits_are_sound(file: bytes, bits: bytes) -> bool:
    number, count = int.from_bytes(bits, "little"), naive_flat.get(file, "bit_count")
    return (
        len(bits) == naive_flat.get(file, "bits_size")
        and zlib.crc32(bits) == naive_flat.get(file, "bits_checksum")
        and number >> count == 0
        and number.bit_count() == naive_flat.get(file, "dirty_count")
    )


def pages_of(bits: bytes) -> Iterator[bytes]:
    return (bits[start : start + 4096] for start in range(0, len(bits), 4096))


def check_on_disk(file: bytes, dirty: int | None) -> None:
    """Through the file system, holes and all, the file says the same; and cleared it says nothing any more."""
    path = fill_scratch_file(file)
    try:
        found = inspect_file(path)
    except FormatError:
        assert dirty is None
        return
    believed = found.trust is not Trust.UNTRUSTED
    assert believed == (dirty is not None) == (not found.problems)
    expected = found.header.disk_size if dirty is None else dirty_bytes(found.header, dirty)
    assert found.dirty_bytes == expected
    with FlatFile.open(path, writable=True) as opened:
        opened.clear_clean()
    assert inspect_file(path).trust is Trust.UNTRUSTED


def dirty_bytes(header: FlatHeader, dirty: int) -> int:
    """Of the blocks in the number `dirty`, the last of which may be short."""
    last_is_dirty = dirty.bit_length() == header.bit_count > 0
    missing = -header.disk_size % (1 << header.granularity_bits) if last_is_dirty else 0
    return (dirty.bit_count() << header.granularity_bits) - missing


def check_pretender(file: bytes) -> None:
    """A file of holes that is as long as its header wants costs next to nothing, and is one of ours or refused."""
    path = fill_scratch_file(file)
    claimed = naive_flat.get(file, "header_size") + naive_flat.get(file, "bits_size")
    if len(file) <= claimed <= MAX_PRETENDED:
        os.ftruncate(scratch_file()[0], claimed)
    try:
        found = inspect_file(path)
    except FormatError:
        return
    assert found.dirty_bytes <= found.header.disk_size


def check_imported(store: Store, dirty: int) -> None:
    found = 0
    with store.read() as reader:
        bitmap = standalone.find(reader, "taken")
        assert bitmap.all_dirty is None
        for region, record in reader.regions(bitmap.id):
            assert not record.damaged
            assert record.armed == 0
            found |= int.from_bytes(record.bits, "little") << region * REGION_BLOCKS
    assert found == dirty
