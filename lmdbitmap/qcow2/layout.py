"""The structures and constants of the format, under the specification's own names; all numbers are big-endian."""

from __future__ import annotations

import enum
import struct
import sys
from array import array
from typing import Final, NamedTuple

from lmdbitmap.geometry import Geometry, ceil_div

MAGIC: Final = b"QFI\xfb"
VERSION: Final = 3
SECTOR: Final = 512
MIN_CLUSTER_BITS, MAX_CLUSTER_BITS, DEFAULT_CLUSTER_BITS = 9, 21, 16
SMALLEST_WANTED_CLUSTER_BITS: Final = 12
"""A page. Smaller clusters save nothing on file systems that store pages, and cost tables."""
MIN_HEADER_BYTES: Final = 104
MAX_BACKING_NAME_BYTES: Final = 1023
MAX_L1_ENTRIES: Final = (32 << 20) // 8
"""QEMU opens no image with more."""

EXTENSION_END: Final = 0
EXTENSION_BACKING_FORMAT: Final = 0xE2792ACA
EXTENSION_BITMAPS: Final = 0x23852875
BITMAPS_CONSISTENT: Final = 1
"""Autoclear feature: no program that does not know of bitmaps has written to the image since they were stored."""

COPIED: Final = 1 << 63
COMPRESSED: Final = 1 << 62
ZERO: Final = 1
COMPRESSION_FEATURE: Final = 1 << 3
OFFSET_MASK: Final = 0x00FFFFFFFFFFFE00
L1_RESERVED: Final = 0x7F000000000001FF
L2_RESERVED: Final = 0x3F000000000001FE
REFCOUNT_ORDER: Final = 4
MAX_REFCOUNT: Final = 0xFFFF

HEADER_STRUCT = struct.Struct(">4sIQIIQIIQQIIQQQQIIB7x")
EXTENSION_STRUCT = struct.Struct(">II")


class CompressionType(enum.Enum):
    """The compression of clusters, in the order of the header's numbers."""

    ZLIB = "zlib"
    ZSTD = "zstd"

    @property
    def number(self) -> int:
        return list(CompressionType).index(self)


class Header(NamedTuple):
    """The first 112 bytes, big-endian, under the specification's names."""

    magic: bytes = MAGIC
    version: int = VERSION
    backing_file_offset: int = 0
    backing_file_size: int = 0
    cluster_bits: int = DEFAULT_CLUSTER_BITS
    size: int = 0
    crypt_method: int = 0
    l1_size: int = 0
    l1_table_offset: int = 0
    refcount_table_offset: int = 0
    refcount_table_clusters: int = 0
    nb_snapshots: int = 0
    snapshots_offset: int = 0
    incompatible_features: int = 0
    compatible_features: int = 0
    autoclear_features: int = 0
    refcount_order: int = REFCOUNT_ORDER
    header_length: int = HEADER_STRUCT.size
    compression_type: int = 0


def l1_entries(size: int, cluster_bits: int) -> int:
    """Return how many L2 tables map a disk of `size` bytes: each is a cluster of 8-byte entries, one for a cluster."""
    return ceil_div(size, 1 << (2 * cluster_bits - 3))


def cluster_bits_like(granularity_bits: int) -> int:
    """Return the cluster bits for a bitmap: a cluster is a block of the bitmap if that is 4 KiB to 64 KiB.

    A smaller cluster would store no less, as a whole block is dirty. A larger one would store more, by rounding
    outward. Above 64 KiB, QEMU's own default, larger clusters would only cost a guest that writes to the image more
    copying.
    """
    return min(max(granularity_bits, SMALLEST_WANTED_CLUSTER_BITS), DEFAULT_CLUSTER_BITS)


def cluster_bits_for(disk: Geometry) -> int:
    """Return `cluster_bits_like` of the disk's granularity, or more bits if the disk needs them."""
    return at_least(cluster_bits_like(disk.granularity_bits), disk.size)


def at_least(cluster_bits: int, size: int) -> int:
    """Return `cluster_bits`, or as many more as a disk of `size` bytes needs."""
    while l1_entries(size, cluster_bits) > MAX_L1_ENTRIES // 2:
        cluster_bits += 1
    return cluster_bits


def compressed_entry(offset: int, length: int, cluster_bits: int) -> int:
    """Return the L2 entry of a cluster whose compressed bytes are there; it counts the sectors after their first."""
    more_sectors = (offset + length - 1) // SECTOR - offset // SECTOR
    return COMPRESSED | more_sectors << compressed_offset_bits(cluster_bits) | offset


def compressed_place(entry: int, cluster_bits: int) -> tuple[int, int]:
    """Return where such an entry's compressed bytes begin, and how many there can be: to their last sector's end."""
    bits = compressed_offset_bits(cluster_bits)
    offset = entry & ((1 << bits) - 1)
    sectors = 1 + (entry >> bits & ((1 << cluster_bits - 8) - 1))
    return offset, sectors * SECTOR - offset % SECTOR


def compressed_offset_bits(cluster_bits: int) -> int:
    """Return how many of the lower bits of such an entry are its offset: 61 to 49."""
    return 70 - cluster_bits


def zeroed_entries(count: int) -> array[int]:
    """Return a table of `count` entries that map nothing."""
    return array("Q", bytes(8 * count))


def encode_entries(entries: array[int]) -> bytes:
    """Return a table as it stands in the file."""
    return _swapped(entries[:]).tobytes()


def decode_entries(raw: bytes) -> array[int]:
    return _swapped(array("Q", raw))


def _swapped(entries: array[int]) -> array[int]:
    """Convert the entries in place from this machine's byte order to the file's, or back, and return them."""
    if sys.byteorder == "little":
        entries.byteswap()
    return entries


def is_text(data: bytes) -> bool:
    """Return whether `data` is UTF-8 without a zero byte."""
    try:
        return "\0" not in data.decode()
    except UnicodeDecodeError:
        return False
