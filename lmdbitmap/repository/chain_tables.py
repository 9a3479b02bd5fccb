"""Checks that the images of a backup can be opened and their tables followed, before an increment is stacked on them.

An increment on a chain that cannot be read is no backup. So the header, the names and the first table of each image are
checked before one is made, and some of the second tables, those of the newest images first: as many as take no
noticeable time beside the increment. `thoroughly` means all of them, which is right for a caller that reads the chain
anyway. Data is not checked: that takes `verify`.

An image may also be in order, and not what was backed up: `qemu-img rebase -u` and its like write the header anew, and
no restore accepts that. So unless the caller proves what it reads, the chunk with the header is proven by its digest,
of the newest images first and within a ration.

The reader of images (qcow2/reader.py) says what is wrong with a second table. It takes ten times as long as one look at
all entries at once, so it is asked only about tables that such a look does not find in order.
"""

from __future__ import annotations

import functools
import logging
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from lmdbitmap.copying.digest_algorithms import is_available
from lmdbitmap.errors import FormatError, LmdbitmapError, StorageError, os_errors_at
from lmdbitmap.images.device import FileDevice
from lmdbitmap.images.file_pool import FilePool, PooledFile
from lmdbitmap.qcow2 import Qcow2Reader
from lmdbitmap.qcow2.layout import (
    COMPRESSED,
    COPIED,
    L1_RESERVED,
    L2_RESERVED,
    OFFSET_MASK,
    ZERO,
    decode_entries,
    l1_entries,
)
from lmdbitmap.repository.backup_chain import image_reader
from lmdbitmap.repository.backup_folder import BackupFolder
from lmdbitmap.repository.digests import digests_length, is_damage, read_digests
from lmdbitmap.repository.manifest import BackupEntry
from lmdbitmap.repository.proof import ChunkProof

log = logging.getLogger(__name__)

_MOST_FIRST_BYTES = 4 << 20
"""First tables, in all: 16 KiB stand for a TiB of a disk with clusters of 64 KiB, in each image."""
_MOST_SECOND_BYTES = 4 << 20
"""Second tables, in all: 64 of 64 KiB."""
_MOST_PROVEN_BYTES = 8 << 20
"""Chunks with headers, 1 MiB each unless the image is shorter, and digests: 32 KiB for a GiB of an image."""


class _Looked(NamedTuple):
    first_bytes: int
    second_bytes: int


def what_is_broken(
    folder: BackupFolder, entries: Sequence[BackupEntry], *, thoroughly: bool = False
) -> LmdbitmapError | None:
    """Return why the chain of `entries`, the full one first, cannot be read.

    That is a `FormatError`, or a `StorageError` of a bad disk. Also None if another program is in the way, or if
    reading is not permitted: then nothing is known against the chain.
    """
    parents = [None, *(entry.file for entry in entries)]
    first_left, second_left = _MOST_FIRST_BYTES, _MOST_SECOND_BYTES
    proven_left = 0 if thoroughly else _MOST_PROVEN_BYTES  # who reads the chain proves it, too
    for entry, parent in reversed(list(zip(entries, parents, strict=False))):
        share = None if thoroughly else _share(entry, len(entries), second_left)
        try:
            looked = _looked_at(folder.image_path(entry.file), entry, parent, share)
            proven_left -= _prove_header(folder, entry, proven_left)
        except FormatError as broken:
            return broken
        except LmdbitmapError as refusal:
            if isinstance(refusal, StorageError) and refusal.is_of_bad_disk:
                return refusal
            log.info("%s: its tables are not looked at: %s", entry.file, refusal.problem)
            continue
        first_left, second_left = first_left - looked.first_bytes, second_left - looked.second_bytes
        if first_left <= 0 and not thoroughly:
            break
    return None


def _share(entry: BackupEntry, count: int, left: int) -> int:
    """Return the bytes of tables to read of an image: at least one table each, as long as something is left."""
    return min(max(_MOST_SECOND_BYTES // count, entry.cluster_size), left)


def _looked_at(path: str, entry: BackupEntry, parent: str | None, share: int | None) -> _Looked:
    with FileDevice.open(path, read_only=True) as device, os_errors_at(path):
        reader = image_reader(device, entry, parent)
        count = l1_entries(reader.size, reader.header.cluster_bits)
        raw = device.pread(8 * count, reader.header.l1_table_offset) if count else b""
        pointers = [(index, pointer) for index, pointer in enumerate(decode_entries(raw)) if pointer]
        for index, pointer in pointers:
            _require_place(device, reader, index, pointer)
        return _Looked(len(raw), _follow(device, reader, pointers, share))


def _prove_header(folder: BackupFolder, entry: BackupEntry, left: int) -> int:
    """Prove the chunk with the image's header, if at most `left` bytes are read for it. Return how many were read.

    Digests that are lost, or that this Python cannot compute, prove nothing and say nothing against the image.
    """
    chunks = entry.chunks
    if chunks is None or not is_available(chunks.algorithm):
        return 0
    cost = digests_length(entry.bytes_stored, chunks.chunk_size) + min(chunks.chunk_size, entry.bytes_stored)
    if cost > left:
        return 0
    try:
        digests = read_digests(folder, entry.bytes_stored, chunks)
    except LmdbitmapError as unusable:
        if not is_damage(unusable):
            raise
        return cost
    with FilePool(1) as pool:
        file = PooledFile(pool, folder.image_path(entry.file))
        ChunkProof(file, chunks, digests, partial(folder.step_without, entry)).require(0, 1)
    return cost


def _require_place(device: FileDevice, reader: Qcow2Reader, index: int, pointer: int) -> None:
    """Raise `FormatError` unless the pointer can be that of a second table."""
    size, offset = reader.cluster_size, pointer & OFFSET_MASK
    fits = not offset or (offset % size == 0 and size <= offset <= device.size - size)
    if pointer & L1_RESERVED or not fits:
        raise FormatError(
            f"{device.path}: L1 entry {index}",
            expected=f"a multiple of {size}, all inside the file of {device.size} bytes",
            found=f"{pointer:#x}",
            next_step="look at it with qemu-img check and use another backup",
        )


def _follow(
    device: FileDevice, reader: Qcow2Reader, pointers: Sequence[tuple[int, int]], share: int | None
) -> int:
    """Check the second tables, at most `share` bytes of them. Return how many bytes were checked."""
    size, read, seen = reader.cluster_size, 0, set[int]()
    for index, pointer in pointers:
        offset = pointer & OFFSET_MASK
        if not offset:
            continue
        if share is not None and read + size > share:
            break
        read += size
        if offset in seen or not is_plain(device.pread(size, offset), size, device.size):
            start, length = index * size * size // 8, size * size // 8
            deque(reader.extents(start, min(length, reader.size - start)), maxlen=0)
        seen.add(offset)
    return read


def is_plain(raw: bytes, cluster_size: int, file_size: int) -> bool:
    """Return whether all entries of a second table surely are in order, none of them compressed."""
    if any(raw[number::8].translate(None, known) for number, known in _known_bytes(cluster_size)):
        return False
    if COPIED.to_bytes(8, "big") in raw or (COPIED | ZERO).to_bytes(8, "big") in raw:
        return False  # the bytes may span two entries, and be right
    offsets = bytearray(raw)
    offsets[::8] = bytes(len(raw) // 8)
    return max(decode_entries(bytes(offsets))) + cluster_size <= file_size


@functools.cache
def _known_bytes(cluster_size: int) -> Sequence[tuple[int, bytes]]:
    """Return those bytes of an entry that cannot have any value: the number of each, and its allowed values."""
    unknown = L2_RESERVED | COMPRESSED | OFFSET_MASK & (cluster_size - 1)
    return [
        (number, bytes(value for value in range(256) if not value & bits))
        for number, bits in enumerate(unknown.to_bytes(8, "big"))
        if bits
    ]
