"""Tallies: the number of records in each group of the store, and a checksum of them, so that a lost or stale record is
found.

A record's CRC-32 proves that its bytes are what was written, but not that the record is there. Damage to one of LMDB's
own pages can hide records, or bring back an old page whose records were right once. So every group has a tally in a
separate database, changed in the same transaction by the difference that a record makes. A tally is never recomputed:
after a record is lost, its group stays wrong until it is dropped as a whole.

    group                                              key
    `meta`                                             m
    one disk's description                             d, disk uuid
    one disk's checkpoints                             c, disk uuid
    one bitmap's description                           b, bitmap id
    1024 region records of one bitmap                  r, bitmap id, region number / 1024

    offset  size   value, little-endian
    0       8      number of records
    8       8      sum of their weights, modulo 2**64; a record weighs the CRC-32 of its key * 2**32, and the CRC-32
                   that it ends in
    16      4      CRC-32 of the tally's key and the 16 bytes before

The stamp is the tally of the store itself, under the key NUL: the number of the transaction that wrote it, and 0.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import NamedTuple
from zlib import crc32

GROUP_REGIONS = 1024
STAMP_KEY = b"\0"
_TALLY = struct.Struct("<QQI")
_ALL_BITS = (1 << 64) - 1
_LETTERS = {"meta": b"m", "disks": b"d", "checkpoints": b"c", "bitmaps": b"b", "regions": b"r"}
_UUID_BYTES = 16
_ID_BYTES = 8


class Tally(NamedTuple):
    """The tally of a group, or the difference that a change makes to it."""

    records: int = 0
    total: int = 0

    def plus(self, other: Tally) -> Tally:
        return Tally((self.records + other.records) & _ALL_BITS, (self.total + other.total) & _ALL_BITS)

    def minus(self, other: Tally) -> Tally:
        return Tally((self.records - other.records) & _ALL_BITS, (self.total - other.total) & _ALL_BITS)


NOTHING = Tally()


def of(records: Iterable[tuple[bytes, bytes]]) -> Tally:
    """Return the tally of these (key, value) records."""
    count = total = 0
    for key, value in records:
        count += 1
        total += (crc32(key) << 32) + int.from_bytes(value[-4:], "little")
    return Tally(count, total & _ALL_BITS)


def group_key(database: str, key: bytes) -> bytes:
    """Return the key of the record's tally. A damaged page may have keys of any length."""
    if database == "regions":
        group = int.from_bytes(key[_ID_BYTES : 2 * _ID_BYTES], "big") // GROUP_REGIONS
        return region_group_key(key[:_ID_BYTES], group)
    letter = _LETTERS[database]
    return letter if database == "meta" else letter + key[:_UUID_BYTES]


def region_group_key(bitmap_key: bytes, group: int) -> bytes:
    return b"r" + bitmap_key + group.to_bytes(_ID_BYTES, "big")


def groups_of(database: str) -> bytes:
    """Return the prefix of the keys of all tallies of a database."""
    return _LETTERS[database]


def encode(key: bytes, tally: Tally) -> bytes:
    body = _TALLY.pack(*tally, 0)[:-4]
    return body + crc32(body, crc32(key)).to_bytes(4, "little")


def decode(key: bytes, value: bytes) -> Tally | None:
    """Decode a tally; None if its bytes are not what was written."""
    if len(value) != _TALLY.size:
        return None
    count, total, checksum = _TALLY.unpack(value)
    return Tally(count, total) if crc32(value[:-4], crc32(key)) == checksum else None
