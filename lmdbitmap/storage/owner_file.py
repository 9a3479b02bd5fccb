"""The owner's file of one disk: its records, how they are sealed, and how they are read.

    offset  what                    written
    0       beat, 512 bytes         every half second while attached. The first of a session is synced, so that a
                                    power cut does not find the last session's; the others must survive `kill -9`
                                    only, and continuity.py allows for what the disk had not got yet
    4096    distrust, 512 bytes     when tracking failed; synced before the write that was not tracked
    8192    the disk, 8192 bytes    when it is added, and at an attach if it is another: what salvage.py makes
                                    it again from, where the store is damaged. Magic, length, description, CRC-32

The file is written in full when a disk is added, so that saying "untrusted" needs no space on a full disk.
Each record carries a CRC-32; a record that fails it is read in the safe direction: no beat, distrust, no description.
"""

from __future__ import annotations

import os
import struct
from typing import NamedTuple
from uuid import UUID
from zlib import crc32

from lmdbitmap.errors import os_errors_at
from lmdbitmap.interfaces import StoreMark
from lmdbitmap.system import atomic_files, files


class Part(NamedTuple):
    """Where in the file a record is."""

    offset: int
    size: int


_PAGE_BYTES = 4096
BEAT = Part(0, 512)
TRUST = Part(_PAGE_BYTES, 512)
DISK = Part(2 * _PAGE_BYTES, 2 * _PAGE_BYTES)
FILE_BYTES = DISK.offset + DISK.size
_CRC_BYTES = 4
_DISK = struct.Struct("<8sI")
_DISK_MAGIC = b"LDBMdisk"
_BEAT = struct.Struct("<8s36sqqQQQQQ16s")
_BEAT_MAGIC = b"LDBMlife"
_DISTRUST = struct.Struct("<8sqH")
_TRUST_MAGIC = b"LDBMgood"
_DISTRUST_MAGIC = b"LDBMlost"
UNMARKED = StoreMark(0, 0)


class Beat(NamedTuple):
    """A sign of life: the image's mtime as the owner saw it at `time_ns`, in Unix nanoseconds, and the store's mark.

    A block device has no mtime; the kernel counts the sectors written to it.
    """

    boot_id: str
    time_ns: int
    mtime_ns: int
    sectors_written: int = 0
    store: StoreMark = UNMARKED
    awake_ns: int = 0
    """Nanoseconds since the boot, which no change of the clock touches; 0 if an older version left the sign."""
    session: UUID | None = None
    """The owner's session; None if an older version left the sign."""


class Distrust(NamedTuple):
    """Since when, and why, the disk's bitmaps cannot be trusted."""

    since_ns: int
    reason: str


# --- the file, by its path ---


def create(path: str, why: Distrust | None = None, description: bytes = b"") -> None:
    """Create the file of a disk, whole or not at all; durable on return."""
    beat, trust = _sealed(b"", BEAT).ljust(_PAGE_BYTES, b"\0"), sealed_trust(why).ljust(_PAGE_BYTES, b"\0")
    atomic_files.replace(path, beat + trust + sealed_disk(description), like_folder=True)


def last_beat(path: str) -> Beat | None:
    """Return the last sign of life; None if none can be read."""
    return beat_of(_read_at(path, BEAT))


def distrust(path: str) -> Distrust | None:
    """Return why the disk cannot be trusted; None only if this file says that it can."""
    return distrust_of(_read_at(path, TRUST))


def description(path: str) -> bytes | None:
    """Return the disk's description that was last kept; None if there is none, or it is damaged."""
    return description_of(_read_at(path, DISK))


def _read_at(path: str, part: Part) -> bytes | None:
    if not os.path.exists(path):
        return None
    with os_errors_at(path), open(path, "rb", buffering=0) as source:
        return read(source.fileno(), part)


# --- an open file ---


def read(fd: int, part: Part) -> bytes | None:
    """Return a record, or None if it is missing or damaged. Raises `OSError`."""
    record = files.pread_whole(fd, part.size, part.offset)
    whole = len(record) == part.size and crc32(record[:-_CRC_BYTES]) == int.from_bytes(
        record[-_CRC_BYTES:], "little"
    )
    return record if whole else None


def put(fd: int, record: bytes, part: Part, *, durable: bool) -> None:
    """Write a sealed record. Raises `OSError`."""
    os.pwrite(fd, record, part.offset)
    if durable:
        os.fdatasync(fd)


# --- records; None is one that is missing or damaged ---


def beat_of(record: bytes | None) -> Beat | None:
    if record is None:
        return None
    magic, boot, time_ns, mtime_ns, sectors, *rest = _BEAT.unpack_from(record)
    if magic != _BEAT_MAGIC:
        return None
    inode, transaction, awake_ns, born_ns, session = rest
    return Beat(
        boot.decode("ascii", "replace"),
        *(time_ns, mtime_ns, sectors, StoreMark(inode, transaction, born_ns), awake_ns),
        UUID(bytes=session) if any(session) else None,
    )


def sealed_beat(beat: Beat) -> bytes:
    store = beat.store
    fields = (
        *(beat.boot_id.encode("ascii"), beat.time_ns, beat.mtime_ns, beat.sectors_written),
        *(store.inode, store.transaction, beat.awake_ns, store.born_ns),
        beat.session.bytes if beat.session else b"",
    )
    return _sealed(_BEAT.pack(_BEAT_MAGIC, *fields), BEAT)


def distrust_of(record: bytes | None) -> Distrust | None:
    if record is None:
        return Distrust(0, "the owner's file of this disk is missing or damaged")
    magic, since_ns, length = _DISTRUST.unpack_from(record)
    if magic == _TRUST_MAGIC:
        return None
    reason = record[_DISTRUST.size : _DISTRUST.size + length].decode("utf-8", "replace")
    return Distrust(since_ns, reason or "tracking failed")


def sealed_trust(why: Distrust | None) -> bytes:
    if why is None:
        return _sealed(_DISTRUST.pack(_TRUST_MAGIC, 0, 0), TRUST)
    reason = why.reason.encode(errors="backslashreplace")[: TRUST.size - _DISTRUST.size - _CRC_BYTES]
    return _sealed(_DISTRUST.pack(_DISTRUST_MAGIC, why.since_ns, len(reason)) + reason, TRUST)


def description_of(record: bytes | None) -> bytes | None:
    if record is None:
        return None
    magic, length = _DISK.unpack_from(record)
    return record[_DISK.size : _DISK.size + length] if magic == _DISK_MAGIC and length else None


def sealed_disk(kept: bytes) -> bytes:
    """Seal a description; one that is too long, as only an endless URI could make it, is not kept."""
    kept = kept if len(kept) <= DISK.size - _DISK.size - _CRC_BYTES else b""
    return _sealed(_DISK.pack(_DISK_MAGIC, len(kept)) + kept, DISK)


def _sealed(record: bytes, part: Part) -> bytes:
    body = record.ljust(part.size - _CRC_BYTES, b"\0")
    return body + crc32(body).to_bytes(_CRC_BYTES, "little")
