"""Computes the digests of a file's chunks while it is filled.

    who writes ── feed(offset, data), large and at the end ──▶ hashed at once, before the bytes leave the cache ──┐
         └─── otherwise ──▶ chunks that the file has gone beyond ──▶ threads read them back, and hash them ───────┤
                                                                                                                  │
    all is written ── digests() ──▶ in order, with what was written to once more ◀────────────────────────────────┘

Hashing lets go of Python's lock: what is fed may be written meanwhile by another thread (write_behind.py), and what is
small is left to threads that hash many chunks at once. A chunk that is written to after it was hashed is hashed again
in the end: so the digests are right in whatever order a file is written. Invariant: `_open` is a hasher of all bytes
from the beginning of the chunk that the file ends in to that end, or None; any write that it is not fed with drops it,
and that chunk is read back.
"""

from __future__ import annotations

import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from types import TracebackType
from typing import Final

from lmdbitmap.buffers import new_buffer
from lmdbitmap.crew import Crew, Spared, none_spared, processors
from lmdbitmap.digest_algorithms import DIGEST_BYTES, DigestAlgorithm, Hasher, new_hasher
from lmdbitmap.geometry import ceil_div

CHUNK_BYTES: Final = 1 << 20
_BATCH_CHUNKS: Final = 4
"""Hashed in one go: what a thread costs is lost in it."""
_FED_AT_LEAST: Final = 256 << 10
"""In one write: many small ones are hashed faster by many threads."""
_READ_AT_ONCE: Final = 256 << 10
_MOST_IN_MEMORY: Final = 8 << 20
"""Of digests: those of 256 GiB."""
_MOST_THREADS: Final = 8


def thread_count() -> int:
    """How many threads can compute digests at once."""
    return min(processors(), _MOST_THREADS)


class ChunkHasher:
    """The digests of the file `fd`, for one thread that writes it; a context, which owns its threads.

    Digests beyond some megabytes are in a file without a name in `folder`, so that memory is bounded: what is left is a
    byte for each chunk, 1 MiB for a TiB, of a file that is written to where it was hashed before. Of the processors,
    `spared` are left to others (crew.py); who hashes, who reads ahead and who writes behind have one each.
    """

    def __init__(
        self,
        fd: int,
        folder: str,
        algorithm: DigestAlgorithm,
        chunk_size: int = CHUNK_BYTES,
        *,
        spared: Spared = none_spared,
    ) -> None:
        self._fd = fd
        self.algorithm = algorithm
        self.chunk_size = chunk_size
        self.before_reading: Callable[[], None] = _nothing
        """Called before what the file has is looked at."""
        self._digests = tempfile.SpooledTemporaryFile(_MOST_IN_MEMORY, dir=folder)  # noqa: SIM115 - see __exit__
        """Of the first chunks, one behind the other."""
        self._most_under_way = 2 * thread_count()
        self._threads = Crew(thread_count(), spared=spared, busy=3)
        self._under_way: deque[Callable[[], bytes]] = deque()
        self._open: Hasher | None = None
        self._end = 0
        self._hashed_chunks = 0
        self._stale = bytearray()
        """1 for each chunk that was written to after it was hashed; no longer than up to the last of them."""

    def __enter__(self) -> ChunkHasher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._digests.close()

    def feed(self, offset: int, data: memoryview) -> None:
        """The file has these bytes, or will when `before_reading` returns."""
        if len(data) < _FED_AT_LEAST or offset != self._end:
            self.wrote(offset, len(data))
            return
        end = offset + len(data)
        while data:
            chunk, start = divmod(offset, self.chunk_size)
            part = data[: self.chunk_size - start]
            self._feed_chunk(chunk, start, part)
            offset, data = offset + len(part), data[len(part) :]
        self._grow(end)

    def _feed_chunk(self, chunk: int, start: int, data: memoryview) -> None:
        if start == 0:
            self._open = new_hasher(self.algorithm)
        if self._open is None:
            return
        self._open.update(data)
        if start + len(data) == self.chunk_size:
            while self._hashed_chunks < chunk:
                self._hash_next(min(_BATCH_CHUNKS, chunk - self._hashed_chunks))
            self._add(partial(bytes, self._open.digest()), 1)

    def wrote(self, offset: int, length: int) -> None:
        """The file has these bytes, or will when `before_reading` returns, and they are not at hand."""
        self._open = None
        end = offset + length
        if offset < self._hashed_chunks * self.chunk_size:
            self._call_stale(
                offset // self.chunk_size, min(ceil_div(end, self.chunk_size), self._hashed_chunks)
            )
        self._grow(max(self._end, end))

    def _call_stale(self, first: int, stop: int) -> None:
        self._stale.extend(bytes(max(stop - len(self._stale), 0)))
        self._stale[first:stop] = b"\1" * (stop - first)

    def _grow(self, end: int) -> None:
        self._end = end
        while (self._hashed_chunks + _BATCH_CHUNKS) * self.chunk_size <= self._end:
            self._hash_next(_BATCH_CHUNKS)

    def digests(self) -> Iterator[bytes]:
        """All of them in order, once nothing is written any more; the last chunk may be short."""
        self.before_reading()
        chunks = ceil_div(os.fstat(self._fd).st_size, self.chunk_size)
        while self._hashed_chunks < chunks:
            self._hash_next(min(_BATCH_CHUNKS, chunks - self._hashed_chunks))
        while self._under_way:
            self._take_next()
        self._digests.seek(0)
        for chunk in range(chunks):
            digest = self._digests.read(DIGEST_BYTES)
            is_stale = chunk < len(self._stale) and self._stale[chunk]
            yield self._digest_anew(chunk) if is_stale else digest

    def _digest_anew(self, chunk: int) -> bytes:
        return _digests_of(self._fd, self.algorithm, self.chunk_size, chunk, 1)

    def _hash_next(self, count: int) -> None:
        """Hand over the next chunks, to be read back."""
        self.before_reading()
        batch = self._threads.submit(
            _digests_of, self._fd, self.algorithm, self.chunk_size, self._hashed_chunks, count
        )
        self._add(batch.result, count)

    def _add(self, digests: Callable[[], bytes], count: int) -> None:
        """The digests of the next chunks; who is far ahead of the threads that compute some waits."""
        self._under_way.append(digests)
        self._hashed_chunks += count
        if len(self._under_way) > self._most_under_way:
            self._take_next()

    def _take_next(self) -> None:
        self._digests.write(self._under_way.popleft()())


def _nothing() -> None:
    """What there is to do before reading where nobody writes behind."""


def chunk_digests(fd: int, algorithm: DigestAlgorithm, chunk_size: int = CHUNK_BYTES) -> Iterator[bytes]:
    """The digest of each chunk of a file; the last chunk may be short."""
    for chunk in range(ceil_div(os.fstat(fd).st_size, chunk_size)):
        yield _digests_of(fd, algorithm, chunk_size, chunk, 1)


def _digests_of(fd: int, algorithm: DigestAlgorithm, chunk_size: int, first: int, count: int) -> bytes:
    """One behind the other."""
    buffer = memoryview(new_buffer(min(_READ_AT_ONCE, chunk_size)))
    return b"".join(
        _digest_at(fd, algorithm, chunk * chunk_size, chunk_size, buffer)
        for chunk in range(first, first + count)
    )


def digest_at(fd: int, algorithm: DigestAlgorithm, offset: int, length: int) -> bytes:
    """The digest of a range of a file; of less, where the file has become shorter."""
    return _digest_at(fd, algorithm, offset, length, memoryview(new_buffer(min(_READ_AT_ONCE, length))))


def _digest_at(fd: int, algorithm: DigestAlgorithm, offset: int, length: int, buffer: memoryview) -> bytes:
    digest, end = new_hasher(algorithm), offset + length
    while offset < end and (count := os.preadv(fd, [buffer[: end - offset]], offset)):
        digest.update(buffer[:count])
        offset += count
    return digest.digest()
