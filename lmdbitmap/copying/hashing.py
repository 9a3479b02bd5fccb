"""Computes the digests of a file's chunks while it is filled, in one of two ways.

    feed(offset, data) ───▶ by the thread that has the bytes, while they are in its processor's cache ─▶ digests
    wrote(offset, length) ──▶ of chunks that the file has gone beyond, by threads that read them back ─▶ digests

    all is written ── digests() ──▶ in order; chunks that were written to again are hashed again

Hashing releases Python's lock. Fed data comes in the order of the file, and may be hashed in any order; only the
beginning of a chunk that ends in the next fed data is hashed at once. Data that comes in small pieces is left to
threads that hash many chunks in one go. A chunk that is written to after it was hashed, or that was not fed completely,
is hashed in the end: so the digests are right in whatever order a file is written. Invariant: `_open` is a hasher of
all bytes from the beginning of the chunk that the file ends in to that end, or None.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from functools import partial
from types import TracebackType
from typing import Final

from lmdbitmap.copying.digest_algorithms import DIGEST_BYTES, DigestAlgorithm, Hasher, new_hasher
from lmdbitmap.geometry import ceil_div
from lmdbitmap.work.buffers import new_buffer
from lmdbitmap.work.crew import Crew, Spared, none_spared, processors

CHUNK_BYTES: Final = 1 << 20
_BATCH_CHUNKS: Final = 4
"""Chunks hashed in one go, so that the cost of a thread does not matter."""
_READ_AT_ONCE: Final = 256 << 10
_MOST_IN_MEMORY: Final = 8 << 20
"""Bytes of digests kept in memory: those of 256 GiB."""
MOST_THREADS: Final = 8


def thread_count() -> int:
    """Return how many threads can compute digests at once."""
    return min(processors(), MOST_THREADS)


class ChunkHasher:
    """The digests of the file `fd`; a context that owns its threads.

    Digests beyond some megabytes are in an unnamed file in `folder`, so that memory is bounded. Only a file that is
    written to where it was hashed before takes more: a byte for each chunk, 1 MiB for a TiB. `spared` processors are
    left to other work (crew.py): the threads that put the image together, read ahead and compress have one each.

    For one thread at a time; the functions that `feed` returns are for any thread. With chunks of 4 bytes:

        feed(0, 6 bytes)    chunk 0 is hashed when the answer is called, and what there is of chunk 1 at once
        wrote(6, 4)         of chunks 1 and 2 not all is at hand any more
        feed(10, 6 bytes)   chunk 3 is hashed when the answer is called; 1 and 2 are stale from now on, until `digests`
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
        self._digests = tempfile.SpooledTemporaryFile(_MOST_IN_MEMORY, dir=folder)  # noqa: SIM115 - see __exit__
        """The digest of each chunk at its place, once it is computed."""
        self._putting = threading.Lock()
        self._most_under_way = 2 * thread_count()
        self._threads = Crew(thread_count(), spared=spared, busy=3)
        self._under_way: deque[Future[None]] = deque()
        self._open: Hasher | None = None
        self._end = 0
        self._chunks_seen_to = 0
        """Number of chunks, from the first on, that are hashed, or will be soon, or are stale."""
        self._stale = bytearray()
        """1 for each chunk that has to be hashed in the end; no longer than up to the last of them."""

    def __enter__(self) -> ChunkHasher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._digests.close()

    def feed(self, offset: int, data: memoryview) -> Callable[[], None]:
        """Announce bytes that the file will have before it is `wrote` to and before `digests`.

        Call the function returned, in any thread, while `data` is unchanged.
        """
        if offset != self._end:
            self._leave_open(offset, len(data))
            return _nothing
        works = []
        for chunk, start, part in self._parts(offset, data):
            if start == 0:
                self._open = new_hasher(self.algorithm)
            if self._open is None:
                continue
            if start + len(part) < self.chunk_size:
                self._open.update(part)  # what is fed next goes on from here
            else:
                self._call_stale(self._chunks_seen_to, chunk)
                self._chunks_seen_to = chunk + 1
                works.append(partial(self._finish, chunk, self._open, part))
        self._end += len(data)
        return partial(_all_of, works)

    def _parts(self, offset: int, data: memoryview) -> Iterator[tuple[int, int, memoryview]]:
        """Yield (chunk, first byte in it, bytes)."""
        while data:
            chunk, start = divmod(offset, self.chunk_size)
            part = data[: self.chunk_size - start]
            yield chunk, start, part
            offset, data = offset + len(part), data[len(part) :]

    def _finish(self, chunk: int, hasher: Hasher, data: memoryview) -> None:
        hasher.update(data)
        self._put(chunk, hasher.digest())

    def wrote(self, offset: int, length: int) -> None:
        """Note that the file has these bytes, and all that were fed."""
        self._leave_open(offset, length)
        while (self._chunks_seen_to + _BATCH_CHUNKS) * self.chunk_size <= self._end:
            self._hash_next(_BATCH_CHUNKS)

    def _leave_open(self, offset: int, length: int) -> None:
        """Mark chunks touched by this range: they can no longer be hashed from memory."""
        self._open = None
        end = offset + length
        if offset < self._chunks_seen_to * self.chunk_size:
            self._call_stale(
                offset // self.chunk_size, min(ceil_div(end, self.chunk_size), self._chunks_seen_to)
            )
        self._end = max(self._end, end)

    def _call_stale(self, first: int, stop: int) -> None:
        if first < stop:
            self._stale.extend(bytes(max(stop - len(self._stale), 0)))
            self._stale[first:stop] = b"\1" * (stop - first)

    def digests(self) -> Iterator[bytes]:
        """Yield all digests in order, once the file is written completely; the last chunk may be short."""
        chunks = ceil_div(os.fstat(self._fd).st_size, self.chunk_size)
        while self._chunks_seen_to < chunks:
            self._hash_next(min(_BATCH_CHUNKS, chunks - self._chunks_seen_to))
        while self._under_way:
            self._under_way.popleft().result()
        self._digests.seek(0)
        for chunk in range(chunks):
            digest = self._digests.read(DIGEST_BYTES)
            is_stale = chunk < len(self._stale) and self._stale[chunk]
            yield self._digest_anew(chunk) if is_stale else digest

    def _digest_anew(self, chunk: int) -> bytes:
        return _digests_of(self._fd, self.algorithm, self.chunk_size, chunk, 1)

    def _hash_next(self, count: int) -> None:
        """Have threads read back the next chunks and hash them. Wait if too many are under way."""
        self._under_way.append(self._threads.submit(self._read_back, self._chunks_seen_to, count))
        self._chunks_seen_to += count
        if len(self._under_way) > self._most_under_way:
            self._under_way.popleft().result()

    def _read_back(self, first: int, count: int) -> None:
        self._put(first, _digests_of(self._fd, self.algorithm, self.chunk_size, first, count))

    def _put(self, first: int, digests: bytes) -> None:
        with self._putting:
            self._digests.seek(first * DIGEST_BYTES)
            self._digests.write(digests)


def _nothing() -> None:
    """Do nothing: there is nothing to hash."""


def _all_of(works: Iterable[Callable[[], None]]) -> None:
    for work in works:
        work()


def chunk_digests(fd: int, algorithm: DigestAlgorithm, chunk_size: int = CHUNK_BYTES) -> Iterator[bytes]:
    """Yield the digest of each chunk of a file; the last chunk may be short."""
    for chunk in range(ceil_div(os.fstat(fd).st_size, chunk_size)):
        yield _digests_of(fd, algorithm, chunk_size, chunk, 1)


def _digests_of(fd: int, algorithm: DigestAlgorithm, chunk_size: int, first: int, count: int) -> bytes:
    """Return the digests of `count` chunks, concatenated."""
    buffer = memoryview(new_buffer(min(_READ_AT_ONCE, chunk_size)))
    return b"".join(
        _digest_at(fd, algorithm, chunk * chunk_size, chunk_size, buffer)
        for chunk in range(first, first + count)
    )


def digest_at(fd: int, algorithm: DigestAlgorithm, offset: int, length: int) -> bytes:
    """Return the digest of a range of a file; of less, if the file has become shorter."""
    return _digest_at(fd, algorithm, offset, length, memoryview(new_buffer(min(_READ_AT_ONCE, length))))


def _digest_at(fd: int, algorithm: DigestAlgorithm, offset: int, length: int, buffer: memoryview) -> bytes:
    digest, end = new_hasher(algorithm), offset + length
    while offset < end and (count := os.preadv(fd, [buffer[: end - offset]], offset)):
        digest.update(buffer[:count])
        offset += count
    return digest.digest()
