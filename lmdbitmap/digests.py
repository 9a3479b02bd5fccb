"""Digests of an image by chunks, in a file beside it: they say where it is damaged, and can be checked in parallel.

The file is the SHA-256 of each chunk, 32 bytes each, in order, and nothing else; the manifest has its own SHA-256,
and so vouches for all of them. A chunk is 1 MiB: a finding names a place that small, a call of the hash function is
lost in it, and the file is 32 KiB for a GiB.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from lmdbitmap import files
from lmdbitmap.errors import os_errors_at
from lmdbitmap.manifest import ChunkDigests
from lmdbitmap.repository import BackupFolder, digests_name, sha256_of

CHUNK_BYTES = 1 << 20
DIGEST_BYTES = 32


class Proof(NamedTuple):
    """What a manifest says of an image: its SHA-256, and where those of its chunks are."""

    sha256: str
    chunks: ChunkDigests


def synced_proof(folder: BackupFolder, file: str, fd: int) -> Proof:
    """Sync the image `file`, which is in `fd`, and make its digests durable in the folder.

    Both digests are computed while the system is busy bringing the image to the disk, each in a thread of its own:
    the image is read from memory, and hashing leaves Python's lock alone.
    """
    name = digests_name(file)
    with ThreadPoolExecutor(max_workers=2) as beside, os_errors_at(folder.path_of(file)):
        synced, whole = beside.submit(os.fsync, fd), beside.submit(sha256_of, fd)
        own_digest = hashlib.sha256()
        with files.replacing(folder.path_of(name)) as made:
            for digest in chunk_digests(fd):
                made.write(digest)
                own_digest.update(digest)
        synced.result()
        return Proof(whole.result(), ChunkDigests(name, CHUNK_BYTES, own_digest.hexdigest()))


def chunk_digests(fd: int, chunk_size: int = CHUNK_BYTES) -> Iterator[bytes]:
    """The SHA-256 of each chunk of a file; the last chunk may be short."""
    buffer, offset = bytearray(chunk_size), 0
    while length := read_chunk(fd, buffer, offset):
        yield hashlib.sha256(memoryview(buffer)[:length]).digest()
        offset += length


def read_chunk(fd: int, buffer: bytearray, offset: int) -> int:
    """Fill the buffer from the file, or as far as that goes; answers how many bytes there were."""
    view, length = memoryview(buffer), 0
    while length < len(buffer) and (count := os.preadv(fd, [view[length:]], offset + length)):
        length += count
    return length
