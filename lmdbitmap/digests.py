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
from lmdbitmap.errors import FormatError, os_errors_at
from lmdbitmap.geometry import ceil_div
from lmdbitmap.manifest import ChunkDigests
from lmdbitmap.repository import BackupFolder, digests_name, sha256_of

CHUNK_BYTES = 1 << 20
DIGEST_BYTES = 32
_READ_AT_ONCE = 1 << 20


class Proof(NamedTuple):
    """What a manifest says of an image: its SHA-256, and where those of its chunks are."""

    sha256: str
    chunks: ChunkDigests


def synced_proof(folder: BackupFolder, file: str, fd: int) -> Proof:
    """Sync the image `file`, which is in `fd`, and make its digests durable in the folder.

    Both digests are computed while the system is busy bringing the image to the disk, each in a thread of its own:
    the image is read from memory, and hashing lets go of Python's lock. The digests get
    their name when the image is synced.
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
            sha256 = whole.result()
        return Proof(sha256, ChunkDigests(name, CHUNK_BYTES, own_digest.hexdigest()))


def chunk_digests(fd: int, chunk_size: int = CHUNK_BYTES) -> Iterator[bytes]:
    """The SHA-256 of each chunk of a file; the last chunk may be short."""
    size = os.fstat(fd).st_size
    for offset in range(0, size, chunk_size):
        yield digest_at(fd, offset, min(chunk_size, size - offset))


def digest_at(fd: int, offset: int, length: int) -> bytes:
    """The SHA-256 of a range of a file; of less, where the file has become shorter."""
    digest, end = hashlib.sha256(), offset + length
    while offset < end and (data := os.pread(fd, min(_READ_AT_ONCE, end - offset), offset)):
        digest.update(data)
        offset += len(data)
    return digest.digest()


def read_digests(folder: BackupFolder, image_length: int, chunks: ChunkDigests) -> bytes:
    """The file with the digests of an image, if it is the one that the manifest vouches for.

    Else `NotFound`, or `FormatError`. It is no longer in memory than the image's length on the disk allows.
    """
    path = folder.path_of(chunks.file)
    expected = digests_length(image_length, chunks.chunk_size)
    found = files.read_bounded(path, expected)
    sha256 = hashlib.sha256(found).hexdigest()
    if (len(found), sha256) != (expected, chunks.sha256):
        raise FormatError(
            path,
            expected=f"{expected} bytes with SHA-256 {chunks.sha256}",
            found=f"{len(found)} bytes with {sha256}",
            next_step="get the file from a copy of the repository",
        )
    return found


def digests_length(image_length: int, chunk_size: int) -> int:
    """How long the file with the digests of an image is."""
    return DIGEST_BYTES * ceil_div(image_length, chunk_size)
