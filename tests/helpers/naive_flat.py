"""A second implementation of the flat bitmap file, written from docs/format.md alone, in the plainest way.

It checks nothing. Tests hold it beside the real one: what one writes the other must read.
"""

from __future__ import annotations

import zlib
from typing import NamedTuple


class Row(NamedTuple):
    offset: int
    size: int


TABLE = {
    "magic": Row(0, 8),
    "major_version": Row(8, 2),
    "minor_version": Row(10, 2),
    "header_size": Row(12, 4),
    "incompatible_features": Row(16, 8),
    "compatible_features": Row(24, 8),
    "flags": Row(32, 8),
    "disk_size": Row(40, 8),
    "granularity_bits": Row(48, 4),
    "reserved": Row(52, 4),
    "bit_count": Row(56, 8),
    "bits_size": Row(64, 8),
    "dirty_count": Row(72, 8),
    "bitmap_uuid": Row(80, 16),
    "disk_uuid": Row(96, 16),
    "epoch_uuid": Row(112, 16),
    "since_uuid": Row(128, 16),
    "until_uuid": Row(144, 16),
    "since_time_ns": Row(160, 8),
    "metadata_length": Row(168, 4),
    "bits_checksum": Row(172, 4),
    "reserved_space": Row(176, 76),
    "header_checksum": Row(252, 4),
}


def write(
    blocks: set[int], disk_size: int, granularity_bits: int, packed: bytes = b"\x80", **fields: int
) -> bytes:
    """A file with these dirty blocks; `packed` is the metadata, `fields` overrule what is worked out here."""
    bit_count = -(-disk_size // 2**granularity_bits)
    bits = bytearray(-(-bit_count // 64) * 8)
    for block in blocks:
        bits[block // 8] |= 1 << block % 8
    header_size = -(-(256 + len(packed)) // 4096) * 4096
    numbers = {
        "magic": int.from_bytes(b"\x89LDBM\r\n\x1a", "little"),
        "major_version": 1,
        "header_size": header_size,
        "flags": 1,
        "disk_size": disk_size,
        "granularity_bits": granularity_bits,
        "bit_count": bit_count,
        "bits_size": len(bits),
        "dirty_count": len(blocks),
        "metadata_length": len(packed),
        "bits_checksum": zlib.crc32(bits),
        **fields,
    }
    header = bytearray(header_size)
    header[256 : 256 + len(packed)] = packed
    for name, number in numbers.items():
        put(header, name, number)
    return bytes(seal(header) + bits)


def put(header: bytearray, name: str, number: int) -> None:
    offset, size = TABLE[name]
    header[offset : offset + size] = number.to_bytes(size, "little")


def get(data: bytes | bytearray, name: str) -> int:
    offset, size = TABLE[name]
    return int.from_bytes(data[offset : offset + size], "little")


def seal(header: bytearray) -> bytearray:
    """Make the header's checksum right again, whatever else is wrong with it."""
    put(header, "header_checksum", 0)
    put(header, "header_checksum", zlib.crc32(header))
    return header


def dirty_blocks(data: bytes) -> set[int]:
    bits = data[get(data, "header_size") :]
    return {bit for bit in range(8 * len(bits)) if bits[bit // 8] >> bit % 8 & 1}
