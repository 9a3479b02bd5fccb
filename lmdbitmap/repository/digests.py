"""Digests of an image by chunks, in a file beside it: they locate damage, and can be checked in parallel.

The file is the digest of each chunk, 32 bytes each, in order, and nothing else. The manifest names their algorithm
(digest_algorithms.py) and has the file's own SHA-256, and so vouches for all of them, and for the image. A chunk is 1
MiB: damage is located that closely, the cost of a call of the hash function does not matter, and the file is 32 KiB for
a GiB.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterable

from lmdbitmap.copying import digest_algorithms
from lmdbitmap.copying.digest_algorithms import DIGEST_BYTES
from lmdbitmap.copying.hashing import ChunkHasher, chunk_digests
from lmdbitmap.errors import FormatError, LmdbitmapError, NotFound, StorageError, os_errors_at
from lmdbitmap.geometry import ceil_div
from lmdbitmap.images.device import FileDevice
from lmdbitmap.repository.backup_files import digests_name, sha256_of
from lmdbitmap.repository.backup_folder import BackupFolder
from lmdbitmap.repository.manifest import BackupEntry, ChunkDigests
from lmdbitmap.system import atomic_files, files
from lmdbitmap.work.crew import Threads

log = logging.getLogger(__name__)


def synced_digests(folder: BackupFolder, file: str, fd: int, hasher: ChunkHasher) -> ChunkDigests:
    """Sync the image `file`, which is open as `fd`, and make its digests durable in the folder.

    What is not hashed yet is hashed while the system writes the image to the disk. The digests get their name once the
    image is synced.
    """
    name = digests_name(file)
    with Threads(max_workers=1) as beside, os_errors_at(folder.path_of(file)):
        synced = beside.submit(os.fsync, fd)
        own_digest = hashlib.sha256()
        with atomic_files.replacing(folder.path_of(name), follow=False) as made:
            for digest in hasher.digests():
                made.write(digest)
                own_digest.update(digest)
            synced.result()
        return ChunkDigests(name, hasher.chunk_size, own_digest.hexdigest(), hasher.algorithm)


def found_digest(entry: BackupEntry, fd: int, stopped: Callable[[], bool] = lambda: False) -> str:
    """Compute `entry.digest` of the image in `fd`; of its beginning only, if `stopped` returns True meanwhile."""
    if entry.sha256 is not None:
        return sha256_of(fd, stopped)
    assert entry.chunks is not None
    own_digest = hashlib.sha256()
    for digest in chunk_digests(fd, entry.chunks.algorithm, entry.chunks.chunk_size):
        own_digest.update(digest)
        if stopped():
            break
    return own_digest.hexdigest()


def require_algorithms(folder: BackupFolder, entries: Iterable[BackupEntry], *, instead: str = "") -> None:
    """Raise `NotFound` if this Python lacks the package for the digests of one of these images."""
    for entry in entries:
        digest_algorithms.require(entry.digest_algorithm, folder.path_of(entry.file), instead=instead)


def read_digests(folder: BackupFolder, image_length: int, chunks: ChunkDigests) -> bytes:
    """Read the file with the digests of an image, if it is the one that the manifest vouches for.

    Else raise `NotFound` or `FormatError`. At most as many bytes are read as the image's length on the disk allows.
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


def digests_of(folder: BackupFolder, entry: BackupEntry, chunks: ChunkDigests) -> bytes:
    """Read the digests of an image; compute them if their file is lost or damaged. Same errors as `read_digests`.

    The manifest vouches for them in both cases.
    """
    try:
        return read_digests(folder, entry.bytes_stored, chunks)
    except LmdbitmapError as unusable:
        if not is_damage(unusable):
            raise
        path = folder.image_path(entry.file)
        with FileDevice.open(path, read_only=True) as device, os_errors_at(path):
            assert device.fd is not None
            computed = b"".join(chunk_digests(device.fd, chunks.algorithm, chunks.chunk_size))
        if hashlib.sha256(computed).hexdigest() != chunks.sha256:
            raise
        log.warning("%s; the digests were computed from the image", unusable.problem)
        return computed


def is_damage(error: LmdbitmapError) -> bool:
    """Return whether the error tells of other data, or none, or of a disk that cannot read it, and not of a refusal."""
    is_bad_disk = isinstance(error, StorageError) and error.is_of_bad_disk
    return is_bad_disk or isinstance(error, (FormatError, NotFound))


def digests_length(image_length: int, chunk_size: int) -> int:
    """Return the length in bytes of the file with the digests of an image."""
    return DIGEST_BYTES * ceil_div(image_length, chunk_size)
