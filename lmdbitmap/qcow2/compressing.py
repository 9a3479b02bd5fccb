"""Compresses the data written to an image, in threads beside the writing one.

                      write(offset, data)
                             │ pieces, copied
         ┌───────────────────┼───────────────────┐
      worker              worker              worker        compress, in whatever order
         └───────────────────┼───────────────────┘
                      oldest piece first                    placed by the caller's thread
                             ▼
                        Qcow2Writer

Invariants:

1. Pieces and zeroes are placed in the order in which they came, as `Qcow2Writer` wants it.
2. At most `PIECES_PER_WORKER` of them for each worker are under way: a caller faster than the workers waits.
3. A cluster is stored compressed only if that saves at least a sector; else it is stored as it is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from itertools import groupby
from typing import Final, TypeAlias

from lmdbitmap.interfaces import Buffer
from lmdbitmap.qcow2.compression import Compression, compressor
from lmdbitmap.qcow2.layout import SECTOR
from lmdbitmap.qcow2.writer import Qcow2Writer
from lmdbitmap.work.crew import Crew, Spared, none_spared, processors

PIECE_BYTES: Final = 1 << 18
"""Bytes a worker gets at once, unless a cluster is larger: enough to be worth the handing over."""
PIECES_PER_WORKER: Final = 4
_MAX_WORKERS: Final = 16

_Packed: TypeAlias = "list[bytes | None]"
"""The clusters of a piece, compressed; None for one that is stored as it is."""


class CompressingWriter:
    """Like a `Qcow2Writer`, but compresses data on the way to `writer`, which has to be of that compression type.

    A block of `with` ends its threads. An error in a range, or of the sink, is raised by a later call, at the latest by
    `finish`.
    """

    def __init__(
        self,
        writer: Qcow2Writer,
        compression: Compression,
        *,
        workers: int | None = None,
        spared: Spared = none_spared,
    ) -> None:
        assert writer.compression_type is compression.type
        self._writer = writer
        self._compress = compressor(compression)
        workers = workers or min(processors(), _MAX_WORKERS)
        self._most_under_way = PIECES_PER_WORKER * workers
        self._workers = Crew(workers, spared=spared, busy=3)
        self._under_way: deque[Callable[[], None]] = deque()
        self._piece_bytes = max(PIECE_BYTES, writer.cluster_size)

    def __enter__(self) -> CompressingWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._workers.shutdown(cancel_futures=True)

    def write(self, offset: int, data: Buffer) -> None:
        """Store a copy of `data`, whose buffer can be used again at once."""
        view = memoryview(data)
        for start in range(0, len(view), self._piece_bytes):
            piece = bytes(view[start : start + self._piece_bytes])
            self._queue(self._placing(offset + start, piece, self._workers.submit(self._packed, piece)))

    def write_zeroes(self, offset: int, length: int) -> None:
        self._queue(lambda: self._writer.write_zeroes(offset, length))

    def finish(self) -> int:
        self._place_down_to(0)
        return self._writer.finish()

    def _queue(self, place: Callable[[], None]) -> None:
        self._under_way.append(place)
        self._place_down_to(self._most_under_way)

    def _place_down_to(self, most: int) -> None:
        while len(self._under_way) > most:
            self._under_way.popleft()()

    def _packed(self, piece: bytes) -> _Packed:
        size = self._writer.cluster_size
        clusters = (piece[start : start + size] for start in range(0, len(piece), size))
        return [self._smaller(cluster.ljust(size, b"\0")) for cluster in clusters]

    def _smaller(self, cluster: bytes) -> bytes | None:
        packed = self._compress(cluster)
        return packed if len(packed) <= len(cluster) - SECTOR else None

    def _placing(self, offset: int, piece: bytes, packed: Future[_Packed]) -> Callable[[], None]:
        return lambda: self._place(offset, memoryview(piece), packed.result())

    def _place(self, offset: int, piece: memoryview, packed: Sequence[bytes | None]) -> None:
        """Store a piece. Uncompressed neighbours go with one write."""
        size, start = self._writer.cluster_size, 0
        for is_plain, group in groupby(packed, lambda cluster: cluster is None):
            clusters = list(group)
            stop = min(start + len(clusters) * size, len(piece))
            if is_plain or not self._writer.can_point_to_compressed:
                self._writer.write(offset + start, piece[start:stop])
            else:
                for number, cluster in enumerate(clusters):
                    assert cluster is not None
                    self._writer.write_compressed(offset + start + number * size, cluster)
            start = stop
