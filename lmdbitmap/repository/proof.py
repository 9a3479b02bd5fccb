"""Proves images by their digests: chunk by chunk as they are read, or as a whole beside other work.

A chunk whose digest fits is to the bit what it was when the backup was made. It is proven once, before the first of its
bytes is used, by the first thread that needs it; what is not read is not proven. An image whose digests by chunks are
missing or damaged is proven by its digest as a whole, for which all of it is read, on one processor.

A proof holds as long as nobody writes to the image. While the image is open it has its locks; an image that is opened
again must be the file that it was (file_pool.py).
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from typing import NamedTuple

from lmdbitmap.copying.digest_algorithms import DIGEST_BYTES, new_hasher
from lmdbitmap.copying.hashing import digest_at
from lmdbitmap.errors import FormatError, LmdbitmapError, os_errors_at
from lmdbitmap.geometry import ceil_div
from lmdbitmap.images.file_pool import PooledFile
from lmdbitmap.repository.backup_folder import BackupFolder
from lmdbitmap.repository.digests import found_digest, is_damage, read_digests, require_algorithms
from lmdbitmap.repository.manifest import BackupEntry, ChunkDigests
from lmdbitmap.work.crew import Threads

log = logging.getLogger(__name__)

_STRIPES = 64


class ChunkProof:
    """Which chunks of an image are proven by their digests. Safe for many threads."""

    def __init__(
        self, file: PooledFile, chunks: ChunkDigests, digests: bytes, next_step: Callable[[], str]
    ) -> None:
        """`next_step` returns what to do if a chunk is damaged."""
        self._file = file
        self._next_step = next_step
        self._algorithm = chunks.algorithm
        self._chunk_size = chunks.chunk_size
        self._digests = digests
        self._is_proven = bytearray(ceil_div(file.size, chunks.chunk_size))
        self._is_claimed = bytearray(len(self._is_proven))
        self._locks = [threading.Lock() for _ in range(min(_STRIPES, len(self._is_proven)))]

    def require(self, offset: int, length: int) -> None:
        """Return once all chunks of the range are proven; raise `FormatError` for one that is not what it was."""
        for chunk in self._chunks(offset, length):
            if not self._is_proven[chunk]:
                with self._locks[chunk % len(self._locks)]:  # a second thread finds it proven
                    if not self._is_proven[chunk]:
                        self._prove(chunk)

    def fill(self, buffer: memoryview, offset: int) -> None:
        """Fill the buffer with bytes of proven chunks.

        A chunk that lies whole in the buffer and is not proven yet is proven from the buffer, and so is read once.
        """
        self._file.pread_into(buffer, offset)
        for chunk in self._chunks(offset, len(buffer)):
            start, end = self._bounds(chunk)
            if self._is_proven[chunk]:
                continue
            if offset <= start and end <= offset + len(buffer):
                hasher = new_hasher(self._algorithm)
                hasher.update(buffer[start - offset : end - offset])
                self._judge(chunk, hasher.digest())
            else:
                self.require(start, end - start)

    def claim(self, offset: int, length: int) -> bool:
        """Claim the range. Return False if all its chunks were claimed already, so that work is handed out once."""
        chunks = self._chunks(offset, length)
        if self._is_claimed.find(0, chunks.start, chunks.stop) < 0:
            return False
        self._is_claimed[chunks.start : chunks.stop] = b"\1" * len(chunks)
        return True

    def _chunks(self, offset: int, length: int) -> range:
        stop = min(ceil_div(offset + length, self._chunk_size), len(self._is_proven))
        return range(offset // self._chunk_size, stop)

    def _bounds(self, chunk: int) -> tuple[int, int]:
        start = chunk * self._chunk_size
        return start, min(start + self._chunk_size, self._file.size)

    def _prove(self, chunk: int) -> None:
        start, end = self._bounds(chunk)
        with os_errors_at(self._file.path), self._file.reading() as device:
            assert device.fd is not None
            self._judge(chunk, digest_at(device.fd, self._algorithm, start, end - start))

    def _judge(self, chunk: int, found: bytes) -> None:
        expected = self._digests[DIGEST_BYTES * chunk : DIGEST_BYTES * (chunk + 1)]
        if found != expected:
            start, end = self._bounds(chunk)
            raise FormatError(
                f"{self._file.path}: bytes {start}..{end}",
                expected=f"{self._algorithm.title} {expected.hex()}",
                found=found.hex(),
                next_step=self._next_step(),
            )
        self._is_proven[chunk] = 1


def chunk_proof(folder: BackupFolder, entry: BackupEntry, file: PooledFile) -> ChunkProof | None:
    """Return the proof; None without usable digests by chunks. Raise `NotFound` if they cannot be computed here."""
    if entry.chunks is None:
        return None
    require_algorithms(folder, [entry])
    try:
        digests = read_digests(folder, file.size, entry.chunks)
    except LmdbitmapError as unusable:
        if not is_damage(unusable):
            raise
        log.warning("%s: the image can be proven as a whole only, which takes longer", unusable.problem)
        return None
    return ChunkProof(file, entry.chunks, digests, partial(folder.step_without, entry))


class Whole(NamedTuple):
    """An image to be proven as a whole."""

    folder: BackupFolder
    entry: BackupEntry
    file: PooledFile

    def prove(self, stopped: Callable[[], bool] = lambda: False) -> None:
        """Raise `FormatError` unless the image has its digest to the bit; give up once `stopped` returns True."""
        with os_errors_at(self.file.path), self.file.reading() as device:
            assert device.fd is not None
            found = found_digest(self.entry, device.fd, stopped)
        if found != self.entry.digest and not stopped():
            raise FormatError(
                self.file.path,
                expected=f"SHA-256 {self.entry.digest}",
                found=found,
                next_step=self.folder.step_without(self.entry),
            )


def prove(images: Sequence[Whole], stopped: Callable[[], bool] = lambda: False) -> None:
    """Prove all of these images as a whole; give up once `stopped` returns True."""
    for image in images:
        if not stopped():
            image.prove(stopped)


@contextlib.contextmanager
def proven_beside(images: Sequence[Whole]) -> Iterator[Future[None]]:
    """Prove these images in another thread until the block ends. The future's result raises what is wrong."""
    stop = threading.Event()
    with Threads(max_workers=1) as beside:
        try:
            yield beside.submit(prove, images, stop.is_set)
        finally:
            stop.set()
