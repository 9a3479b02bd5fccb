"""What the qcow2 tests measure against: files in memory and on disk, and a naive look at an image's bytes.

The naive half follows the specification cluster by cluster and shares no line with `lmdbitmap.qcow2`.
"""

from __future__ import annotations

import os
import struct
import sys
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

from lmdbitmap.interfaces import Buffer


class MemoryFile:
    """A source and a sink that keeps to its bounds and remembers every write and every read."""

    def __init__(self, content: bytes = b"") -> None:
        self.content = bytearray(content)
        self.writes: list[tuple[int, int]] = []
        self.reads: list[tuple[int, int]] = []

    @property
    def size(self) -> int:
        return len(self.content)

    def pread(self, length: int, offset: int) -> bytes:
        assert 0 <= offset <= offset + length <= self.size, f"read of {offset}+{length} in {self.size}"
        self.reads.append((offset, length))
        return bytes(self.content[offset : offset + length])

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        buffer[:] = self.pread(len(buffer), offset)

    def pwrite(self, data: Buffer, offset: int) -> None:
        self.writes.append((offset, len(data)))
        self.content.extend(bytes(max(0, offset + len(data) - self.size)))
        self.content[offset : offset + len(data)] = data


class DiskFile:
    """The same on a real file, for images too large to hold."""

    def __init__(self, path: Path, *, create: bool = False) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL if create else os.O_RDONLY, 0o644)

    @property
    def size(self) -> int:
        return os.fstat(self._fd).st_size

    def pread(self, length: int, offset: int) -> bytes:
        data = os.pread(self._fd, length, offset)
        assert len(data) == length
        return data

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        assert os.preadv(self._fd, [buffer], offset) == len(buffer)

    def pwrite(self, data: Buffer, offset: int) -> None:
        assert os.pwrite(self._fd, data, offset) == len(data)

    def __enter__(self) -> DiskFile:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def u64(image: Buffer, offset: int) -> int:
    value: int = struct.unpack_from(">Q", image, offset)[0]
    return value


def u32(image: Buffer, offset: int) -> int:
    value: int = struct.unpack_from(">I", image, offset)[0]
    return value


def naive_chain_read(images: list[bytes]) -> bytes:
    """All the bytes of the newest of `images`, oldest last."""
    if not images:
        return b""
    below = naive_chain_read(images[1:])
    size = u64(images[0], 24)
    return b"".join(_naive_clusters(images[0], below.ljust(size, b"\0")[:size]))


def _naive_clusters(image: bytes, below: bytes) -> Iterator[bytes]:
    cluster_size = 1 << u32(image, 20)
    for offset in range(0, len(below), cluster_size):
        length = min(cluster_size, len(below) - offset)
        entry = _l2_entry(image, offset // cluster_size)
        host_offset = entry & 0x00FFFFFFFFFFFE00
        if entry >> 62 & 1:
            yield _naive_cluster(image, entry)[:length]
        elif entry & 1:
            yield bytes(length)
        else:
            yield (
                image[host_offset : host_offset + length] if host_offset else below[offset : offset + length]
            )


def _naive_cluster(image: bytes, entry: int) -> bytes:
    cluster_size = 1 << u32(image, 20)
    start, stop = compressed_range(entry, u32(image, 20))
    if image[104] == 1 and u32(image, 100) > 104:
        return bytes(zstd.ZstdDecompressor().decompress(image[start:stop], max_length=cluster_size))
    return zlib.decompressobj(-15).decompress(image[start:stop], cluster_size)


def compressed_range(entry: int, cluster_bits: int) -> tuple[int, int]:
    """Where compressed data begins, and where its last sector ends."""
    x = 62 - (cluster_bits - 8)
    start = entry % 2**x
    sectors = entry % 2**62 // 2**x + 1
    return start, start // 512 * 512 + sectors * 512


def _l2_entry(image: bytes, cluster: int) -> int:
    index, slot = divmod(cluster, (1 << u32(image, 20)) // 8)
    table = u64(image, u64(image, 40) + 8 * index) & 0x00FFFFFFFFFFFE00
    return u64(image, table + 8 * slot) if table else 0


def structure_problems(image: bytes) -> list[str]:
    """What `qemu-img check` would complain about, and clusters of the file that have no use."""
    cluster_size = 1 << u32(image, 20)
    used = _references(image, cluster_size)
    stored = _stored_refcounts(image, cluster_size)
    wrong = [
        f"cluster {cluster}: {used[cluster]} uses, refcount {stored[cluster]}"
        for cluster in sorted(used | stored)
        if used[cluster] != stored[cluster]
    ]
    expected = set(range(len(image) // cluster_size))
    gaps = [f"cluster {cluster} is outside the file or unused" for cluster in expected ^ set(used)]
    odd = [f"{len(image)} bytes are no whole clusters"] if len(image) % cluster_size else []
    return wrong + gaps + odd + _flag_problems(image, cluster_size, stored)


def _references(image: bytes, cluster_size: int) -> Counter[int]:
    used: Counter[int] = Counter([0])
    l1, l1_bytes = u64(image, 40), 8 * u32(image, 36)
    used.update(range(l1 // cluster_size, -(-(l1 + l1_bytes) // cluster_size)))
    table, table_clusters = u64(image, 48), u32(image, 56)
    used.update(table // cluster_size + cluster for cluster in range(table_clusters))
    used.update(block // cluster_size for block in _refcount_blocks(image, cluster_size) if block)
    used.update(offset // cluster_size for _, offset, _ in _pointers(image, cluster_size))
    for entry in _compressed_entries(image, cluster_size):
        start, stop = compressed_range(entry, u32(image, 20))
        used.update(range(start // cluster_size, -(-stop // cluster_size)))
    return used


def _compressed_entries(image: bytes, cluster_size: int) -> Iterator[int]:
    """The entries of compressed clusters, in tables that the L1 points to; those stand there once each."""
    for pointer in set(struct.unpack_from(f">{u32(image, 36)}Q", image, u64(image, 40))) - {0}:
        table = struct.unpack_from(f">{cluster_size // 8}Q", image, pointer & 0x00FFFFFFFFFFFE00)
        yield from (entry for entry in table if entry >> 62 & 1)


def _pointers(image: bytes, cluster_size: int) -> Iterator[tuple[str, int, bool]]:
    """(level, offset, COPIED) of all that L1 and L2 entries point to, but compressed clusters."""
    entries: dict[int, tuple[int, ...]] = {}
    for pointer in struct.unpack_from(f">{u32(image, 36)}Q", image, u64(image, 40)):
        table = pointer & 0x00FFFFFFFFFFFE00
        if not table:
            continue
        yield "L1", table, bool(pointer >> 63)
        if table not in entries:
            whole = struct.unpack_from(f">{cluster_size // 8}Q", image, table)
            entries[table] = tuple(
                entry for entry in whole if entry & 0x00FFFFFFFFFFFE00 and not entry >> 62 & 1
            )
        for entry in entries[table]:
            yield "L2", entry & 0x00FFFFFFFFFFFE00, bool(entry >> 63)


def _refcount_blocks(image: bytes, cluster_size: int) -> Iterator[int]:
    table, table_clusters = u64(image, 48), u32(image, 56)
    for position in range(table, table + table_clusters * cluster_size, 8):
        yield u64(image, position)


def _stored_refcounts(image: bytes, cluster_size: int) -> Counter[int]:
    stored: Counter[int] = Counter()
    for index, block in enumerate(_refcount_blocks(image, cluster_size)):
        if block:
            counts = struct.unpack_from(f">{cluster_size // 2}H", image, block)
            first = index * len(counts)
            stored.update({first + slot: count for slot, count in enumerate(counts) if count})
    return stored


def _flag_problems(image: bytes, cluster_size: int, stored: Counter[int]) -> list[str]:
    both = [
        f"entry {entry:#x}: compressed and COPIED"
        for entry in _compressed_entries(image, cluster_size)
        if entry >> 63
    ]
    return both + [
        f"{level} entry to {offset:#x}: COPIED is {copied}"
        for level, offset, copied in _pointers(image, cluster_size)
        if copied != (stored[offset // cluster_size] == 1)
    ]


# --- an image with compressed clusters, by hand ---


def deflated(data: bytes) -> bytes:
    work = zlib.compressobj(9, zlib.DEFLATED, -12)
    return work.compress(data) + work.flush()


def zstd_packed(data: bytes) -> bytes:
    return zstd.compress(data)


def compressed_image(packed: Sequence[bytes], *, cluster_bits: int = 12, is_zstd: bool = False) -> bytes:
    """A full image of as many compressed clusters, packed byte to byte from an odd place on, for one L2 table.

    Clusters: the header, L1, L2, a refcount block, the refcount table, then data.
    """
    cluster_size = 1 << cluster_bits
    start = 5 * cluster_size + 7
    data = bytes(7) + b"".join(packed)
    entries = []
    for piece in packed:
        more = (start + len(piece) - 1) // 512 - start // 512
        entries.append(1 << 62 | more << 70 - cluster_bits | start)
        start += len(piece)
    features = 8 if is_zstd else 0
    header = struct.pack(
        ">4sIQIIQIIQQIIQQQQIIB", b"QFI\xfb", 3, 0, 0, cluster_bits, len(packed) * cluster_size, 0, 1,
        cluster_size, 4 * cluster_size, 1, 0, 0, features, 0, 0, 4, 112, is_zstd,
    )  # fmt: skip
    parts = [
        header,
        struct.pack(">Q", 1 << 63 | 2 * cluster_size),
        struct.pack(f">{len(entries)}Q", *entries),
    ]
    parts += [b"", struct.pack(">Q", 3 * cluster_size)]
    image = bytearray(b"".join(part.ljust(cluster_size, b"\0") for part in parts) + data)
    image.extend(bytes(-len(image) % cluster_size))
    for cluster, count in _references(bytes(image), cluster_size).items():
        struct.pack_into(">H", image, 3 * cluster_size + 2 * cluster, count)
    return bytes(image)
