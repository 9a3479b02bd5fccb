"""Writes an image in one pass. Every cluster of the file it leaves is in use:

    header | data.. L2 table | data.. L2 table | L2 table of zeroes | L1 | refcount blocks | refcount table

With compressed data, refcount blocks stand between data too (invariant 3). An L2 table follows the data it maps as soon
as writing has passed it, so that memory holds one L2 table and the L1, whatever the size of the disk.

Invariants:

1. The header is written last: a file that was not finished has no magic and is not a qcow2 image.
2. A cluster that is not mapped reads from the backing file. So with a backing file a range of zeroes
   becomes zero clusters and is never left out; without one it is left out, and reads as zeroes.
3. Refcounts are exact. All are 1 but those of two kinds of clusters, and COPIED means "the refcount is 1".
   An L2 table full of zero clusters is shared by all such stretches of the disk: 64 TiB of zeroes cost three such
   tables, not 8 GiB. Two L1 entries past the disk's end point there too: without them, a guest that writes to the
   image could leave the table with one user and no COPIED, which qemu-img check takes for damage.
   Compressed data lies without gaps, and a cluster of it counts the compressed clusters that lie in it, in part or
   whole. 16 bits are enough: zstd takes 4 bytes for each 128 KiB and 9 for a frame, and zlib takes more. A refcount
   block is written as soon as the file is past what it covers, so that memory holds the counts of one.
4. The image size is a multiple of 512. QEMU cuts other sizes off at the sector below, bytes that a restore
   needs; so the size is rounded up, the tail reads as zeroes, and the manifest keeps the true size.
"""

from __future__ import annotations

import struct
from array import array
from itertools import islice
from typing import Protocol

from lmdbitmap.errors import InvalidArgument
from lmdbitmap.geometry import ceil_div
from lmdbitmap.interfaces import Buffer
from lmdbitmap.qcow2.layout import (
    COMPRESSION_FEATURE,
    COPIED,
    DEFAULT_CLUSTER_BITS,
    EXTENSION_BACKING_FORMAT,
    EXTENSION_END,
    EXTENSION_STRUCT,
    HEADER_STRUCT,
    MAX_BACKING_NAME_BYTES,
    MAX_CLUSTER_BITS,
    MAX_L1_ENTRIES,
    MAX_REFCOUNT,
    MIN_CLUSTER_BITS,
    OFFSET_MASK,
    SECTOR,
    ZERO,
    CompressionType,
    Header,
    compressed_entry,
    compressed_offset_bits,
    encode_entries,
    is_text,
    l1_entries,
    zeroed_entries,
)

_BACKING_FORMAT = b"qcow2"
_REACH_RESERVE = 1 << 10
"""Clusters: more than are written before `can_point_to_compressed` is asked again."""
_ANCHORS = 2
"""L1 entries past the disk's end that point to a shared L2 table, so that its refcount never falls to 1."""

_MAX_L1_ENTRIES = MAX_L1_ENTRIES // 2
"""Half of what QEMU opens: then the refcount table of a full image is within QEMU's limit for it, too."""
_LARGEST_DISK = _MAX_L1_ENTRIES << 2 * MAX_CLUSTER_BITS - 3


class WritableFile(Protocol):
    """An empty file to fill. Writes are whole or raise OSError."""

    def pwrite(self, data: Buffer, offset: int) -> None: ...


class Qcow2Writer:
    """Writes one image of a disk of `size` bytes, from its beginning to its end, into an empty `sink`.

    Ranges come in ascending order, begin on a cluster and end on one or at the disk's end; ranges left out stay
    unallocated. Nothing is on stable storage before the caller has synced the sink. Discard an image with a failed
    write.
    """

    def __init__(
        self,
        sink: WritableFile,
        *,
        size: int,
        cluster_bits: int = DEFAULT_CLUSTER_BITS,
        backing_file: str | None = None,
        compression_type: CompressionType = CompressionType.ZLIB,
    ) -> None:
        _check_dimensions(size, cluster_bits)
        self.size = size
        self.image_size = ceil_div(size, SECTOR) * SECTOR
        self.cluster_size = 1 << cluster_bits
        self.backing_file = backing_file
        self.compression_type = compression_type
        self._cluster_bits = cluster_bits
        self._extensions, self._name = _encode_backing(backing_file, self.cluster_size)
        self._autoclear_features = 0
        self._sink = sink
        self._file_end = self.cluster_size
        self._disk_position = 0
        self._finished = False
        self._table_entries = self.cluster_size // 8
        self._l1 = zeroed_entries(l1_entries(size, cluster_bits))
        self._table = zeroed_entries(self._table_entries)
        self._table_index = 0
        self._full_of_zeroes = array("Q", [ZERO]) * self._table_entries
        self._zero_tables = array("Q")
        self._packed_end = 0
        self._shared: dict[int, int] = {}
        self._refcount_blocks = array("Q")

    def write(self, offset: int, data: Buffer) -> None:
        """Store `data` as one run of host clusters with one write; zeroes fill up the disk's last cluster."""
        clusters = self._take(offset, len(data))
        if clusters:
            host_offset = self._append(data)
            self._map(clusters, host_offset | COPIED, self.cluster_size)

    def reserve(self, offset: int, length: int) -> int:
        """Map the range to one run of host clusters, which the caller fills; return where they begin."""
        clusters, host_offset = self._take(offset, length), self._file_end
        padding = -length % self.cluster_size
        if padding:
            self._sink.pwrite(bytes(padding), host_offset + length)
        self._file_end += length + padding
        self._map(clusters, host_offset | COPIED, self.cluster_size)
        return host_offset

    @property
    def can_point_to_compressed(self) -> bool:
        """Whether an L2 entry can still point to the next piece's worth of compressed data."""
        reach = min(1 << compressed_offset_bits(self._cluster_bits), OFFSET_MASK)
        return self._file_end + _REACH_RESERVE * self.cluster_size <= reach

    def write_compressed(
        self, offset: int, packed: bytes, *, phase: int | None = None, shared: int = 0
    ) -> None:
        """Store one whole cluster of the disk. `packed` is smaller than the cluster, and decompresses to it.

        Bytes from another image end where their last sector does, as nobody knows where before. If they begin as far
        into a sector as they did there, their `phase`, they take no more sectors than there. The first `shared` of them
        are the last ones of the cluster that was stored before.
        """
        [cluster] = self._take(offset, min(self.cluster_size, self.size - offset) or 1)
        index, slot = divmod(cluster, self._table_entries)
        self._turn_to(index)
        self._table[slot] = compressed_entry(
            self._pack(packed, phase, shared), len(packed), self._cluster_bits
        )

    def write_zeroes(self, offset: int, length: int) -> None:
        """Make the range read as zeroes, at the cost of metadata only (invariant 2)."""
        clusters, per_table = self._take(offset, length), self._table_entries
        if self.backing_file is None:
            return
        tables = range(ceil_div(clusters.start, per_table), clusters.stop // per_table)
        if not tables:
            self._map(clusters, ZERO, 0)
            return
        self._map(range(clusters.start, tables.start * per_table), ZERO, 0)
        self._zero_tables.extend(tables)
        self._map(range(tables.stop * per_table, clusters.stop), ZERO, 0)

    def append(self, data: Buffer) -> int:
        """Store bytes that are no data of the disk, in clusters of their own; return where they begin."""
        return self._append(data)

    def add_extension(self, kind: int, data: bytes, *, autoclear_features: int = 0) -> None:
        """Have the header hold an extension, and those features."""
        padded = data.ljust(ceil_div(len(data), 8) * 8, b"\0")
        self._extensions = EXTENSION_STRUCT.pack(kind, len(data)) + padded + self._extensions
        self._autoclear_features |= autoclear_features

    def finish(self) -> int:
        """Write what maps the data, then the header; return the file's size in bytes."""
        self._take(self.size, 0)
        self._finished = True
        self._flush_table()
        self._write_zero_tables()
        l1_offset = self._append(encode_entries(self._l1))
        self._write_header(l1_offset, *self._write_refcounts())
        return self._file_end

    def _take(self, offset: int, length: int) -> range:
        """Return the guest clusters of the next range, after checking that it is one; move the position."""
        end = offset + length
        whole = all(edge == self.size or edge % self.cluster_size == 0 for edge in (offset, end))
        if self._finished or not whole or not self._disk_position <= offset <= end <= self.size:
            raise InvalidArgument(
                f"bytes {offset}..{end} cannot be the next of this image of {self.size} bytes",
                next_step=f"give whole clusters of {self.cluster_size} bytes in ascending order, then finish",
            )
        self._disk_position = end
        return range(ceil_div(offset, self.cluster_size), ceil_div(end, self.cluster_size))

    def _append(self, data: Buffer) -> int:
        """Write `data` to new clusters at the file's end; return where."""
        offset, length = self._file_end, len(data)
        padding = -length % self.cluster_size
        if length:
            self._sink.pwrite(data, offset)
        if padding:
            self._sink.pwrite(bytes(padding), offset + length)
        self._file_end += length + padding
        return offset

    def _pack(self, packed: bytes, phase: int | None, shared: int) -> int:
        """Write compressed bytes behind the previous ones, if these can go on; return where."""
        behind = self._packed_end - shared
        if self._settle_refcounts():
            behind = self._packed_end
        start = behind if phase is None else behind + (phase - behind) % SECTOR
        room_end = ceil_div(self._packed_end, self.cluster_size) * self.cluster_size
        goes_on = start + len(packed) <= room_end or room_end == self._file_end
        offset = start if goes_on else self._file_end + (phase or 0)
        self._sink.pwrite(packed, offset)
        self._packed_end = offset + len(packed)
        first, stop = offset >> self._cluster_bits, ceil_div(self._packed_end, self.cluster_size)
        self._file_end = max(self._file_end, stop << self._cluster_bits)
        for cluster in range(first, stop):
            self._shared[cluster] = self._shared.get(cluster, 0) + 1
        return offset

    def _settle_refcounts(self) -> bool:
        """Write the refcount blocks of clusters that the file has passed; none of these takes more compressed data.

        Return whether there was one.
        """
        entries, written = self.cluster_size // 2, len(self._refcount_blocks)
        while (stop := (len(self._refcount_blocks) + 1) * entries) <= self._file_end >> self._cluster_bits:
            block = self._refcount_block(len(self._refcount_blocks), stop)
            self._refcount_blocks.append(self._append(block))
            self._packed_end = self._file_end
            self._shared = {cluster: count for cluster, count in self._shared.items() if cluster >= stop}
        return len(self._refcount_blocks) > written

    def _map(self, clusters: range, entry: int, step: int) -> None:
        """Give the clusters the L2 entries `entry`, `entry + step`, ...: `step` is 0 for zero clusters."""
        first = clusters.start
        while first < clusters.stop:
            index, slot = divmod(first, self._table_entries)
            count = min(clusters.stop - first, self._table_entries - slot)
            self._turn_to(index)
            if step:
                self._table[slot : slot + count] = array("Q", range(entry, entry + count * step, step))
            else:
                self._table[slot : slot + count] = self._full_of_zeroes[:count]
            first, entry = first + count, entry + count * step

    def _turn_to(self, index: int) -> None:
        if index != self._table_index:
            self._flush_table()
            self._table_index = index

    def _flush_table(self) -> None:
        """Write out the current L2 table if it maps anything; one full of zeroes waits to be shared."""
        if self._table == self._full_of_zeroes:
            self._zero_tables.append(self._table_index)
        elif any(self._table):
            self._l1[self._table_index] = self._append(encode_entries(self._table)) | COPIED
        self._table = zeroed_entries(self._table_entries)

    def _write_zero_tables(self) -> None:
        """Write an L2 table of zeroes for as many stretches of the disk as may share it (invariant 3)."""
        pending = iter(self._zero_tables)
        while sharers := list(islice(pending, MAX_REFCOUNT - _ANCHORS)):
            offset = self._append(encode_entries(self._full_of_zeroes))
            if len(sharers) == 1:
                self._l1[sharers[0]] = offset | COPIED
                continue
            for index in sharers:
                self._l1[index] = offset
            self._l1.extend([offset] * _ANCHORS)
            self._shared[offset >> self._cluster_bits] = len(sharers) + _ANCHORS

    def _write_refcounts(self) -> tuple[int, int]:
        """Write blocks and table, counting themselves too; return the table's offset and its clusters."""
        used = self._file_end >> self._cluster_bits
        written = len(self._refcount_blocks)
        clusters, blocks, table_clusters = _refcount_layout(used - written, self._cluster_bits)
        for index in range(written, blocks):
            self._refcount_blocks.append(self._append(self._refcount_block(index, clusters)))
        return self._append(encode_entries(self._refcount_blocks)), table_clusters

    def _refcount_block(self, index: int, clusters: int) -> bytes:
        """Return the refcounts of the clusters that block `index` covers, in a file of `clusters`; 0 past its end."""
        entries = self.cluster_size // 2
        first = index * entries
        block = bytearray((b"\0\1" * min(entries, clusters - first)).ljust(self.cluster_size, b"\0"))
        for cluster, refcount in self._shared.items():
            if first <= cluster < first + entries:
                struct.pack_into(">H", block, 2 * (cluster - first), refcount)
        return bytes(block)

    def _write_header(self, l1_offset: int, refcount_table_offset: int, refcount_table_clusters: int) -> None:
        header = Header(
            backing_file_offset=HEADER_STRUCT.size + len(self._extensions) if self._name else 0,
            backing_file_size=len(self._name),
            cluster_bits=self._cluster_bits,
            size=self.image_size,
            l1_size=len(self._l1),
            l1_table_offset=l1_offset,
            refcount_table_offset=refcount_table_offset,
            refcount_table_clusters=refcount_table_clusters,
            incompatible_features=COMPRESSION_FEATURE if self.compression_type.number else 0,
            autoclear_features=self._autoclear_features,
            compression_type=self.compression_type.number,
        )
        first_cluster = HEADER_STRUCT.pack(*header) + self._extensions + self._name
        self._sink.pwrite(first_cluster.ljust(self.cluster_size, b"\0"), 0)


def _check_dimensions(size: int, cluster_bits: int) -> None:
    if size > _LARGEST_DISK:
        raise InvalidArgument(
            f"a disk of {size} bytes does not fit a qcow2 image, which is of one of {_LARGEST_DISK} at most",
            next_step="make several disks of it",
        )
    if not MIN_CLUSTER_BITS <= cluster_bits <= MAX_CLUSTER_BITS:
        raise InvalidArgument(
            f"cluster_bits {cluster_bits} is outside {MIN_CLUSTER_BITS}..{MAX_CLUSTER_BITS}",
            next_step=f"choose {DEFAULT_CLUSTER_BITS}",
        )
    if size < 0 or l1_entries(size, cluster_bits) > _MAX_L1_ENTRIES:
        raise InvalidArgument(
            f"a disk of {size} bytes does not fit a qcow2 image with clusters of {1 << cluster_bits} bytes",
            next_step=f"choose larger clusters, up to cluster_bits {MAX_CLUSTER_BITS}",
        )


def _refcount_layout(used_clusters: int, cluster_bits: int) -> tuple[int, int, int]:
    """Return (clusters in all, refcount blocks, clusters of the refcount table); the last two count themselves."""
    blocks = table_clusters = 1
    while True:
        clusters = used_clusters + blocks + table_clusters
        needed = ceil_div(clusters, 1 << (cluster_bits - 1)), ceil_div(8 * blocks, 1 << cluster_bits)
        if needed == (blocks, table_clusters):
            return clusters, blocks, table_clusters
        blocks, table_clusters = needed


def _encode_backing(name: str | None, cluster_size: int) -> tuple[bytes, bytes]:
    """Return the header extensions, and the backing file's name that follows them in the first cluster."""
    end = EXTENSION_STRUCT.pack(EXTENSION_END, 0)
    if name is None:
        return end, b""
    encoded_name = name.encode(errors="surrogatepass")
    padded_format = _BACKING_FORMAT.ljust(ceil_div(len(_BACKING_FORMAT), 8) * 8, b"\0")
    extensions = EXTENSION_STRUCT.pack(EXTENSION_BACKING_FORMAT, len(_BACKING_FORMAT)) + padded_format + end
    room = min(MAX_BACKING_NAME_BYTES, cluster_size - HEADER_STRUCT.size - len(extensions))
    # QEMU takes what stands before a colon in the first part of a path for a protocol.
    if not 0 < len(encoded_name) <= room or not is_text(encoded_name) or ":" in name.partition("/")[0]:
        raise InvalidArgument(
            f"{name!r} cannot be the name of a backing file",
            next_step=f"give a path of 1 to {room} bytes in UTF-8, without a colon in its first part",
        )
    return extensions, encoded_name
