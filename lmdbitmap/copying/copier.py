"""Copies clusters of a device into a backup image. What reads as zeroes (loads.py finds out) is not stored as data."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeAlias

from lmdbitmap.bits import Run
from lmdbitmap.copying.carriers import Carriers, Hashing, ImageSink, Shelf
from lmdbitmap.copying.loads import Loads
from lmdbitmap.copying.pieces import Pieces
from lmdbitmap.copying.readable import Readable, ways_of
from lmdbitmap.errors import os_errors_at
from lmdbitmap.geometry import Geometry
from lmdbitmap.interfaces import Buffer
from lmdbitmap.qcow2 import (
    DEFAULT_CLUSTER_BITS,
    CompressingWriter,
    Compression,
    CompressionType,
    Qcow2Writer,
    Sink,
)
from lmdbitmap.qcow2.layout import MAX_L1_ENTRIES, l1_entries

Progress: TypeAlias = Callable[[int, int], None]
"""Called with (bytes done, bytes in all), in the thread that works; what it raises ends the work."""

_BYTES_BETWEEN_REPORTS = 4 << 20


SMALLEST_CLUSTER_BITS = 12
"""A page. Smaller clusters save nothing on file systems that store pages, and cost tables."""


class Copied(NamedTuple):
    """Bytes of the disk that were copied, and how many of them are zeroes; bytes of the image."""

    bytes_changed: int
    bytes_zero: int
    bytes_stored: int


class Report:
    """Tells of progress every few megabytes, over all the images of a run."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0
        self._told = 0

    def advance(self, length: int) -> None:
        # Rounding outward to clusters may copy more than was dirty.
        self._done = min(self._done + length, self._total)
        news = self._done - self._told
        if news >= _BYTES_BETWEEN_REPORTS or (news and self._done == self._total):
            self._told = self._done
            self.repeat()

    def repeat(self) -> None:
        """Tell how far it is, also where it is no further: whoever listens may want to cancel."""
        if self._progress is not None:
            self._progress(self._done, self._total)

    def reach(self, done: int) -> None:
        """At least so many bytes are done."""
        self.advance(max(done - self._done, 0))

    def reach_all_but(self, rest: int) -> None:
        """No more than so many bytes are to be done yet."""
        self.reach(self._total - rest)

    def expect(self, length: int) -> None:
        """So many bytes more will be done than was said in the beginning."""
        self._total += length


class ImageFile:
    """An empty file to write an image into, at once; its refusals name the `place` where it will be."""

    def __init__(self, fd: int, place: str) -> None:
        self._fd = fd
        self.place = place

    def pwrite(self, data: Buffer, offset: int) -> None:
        rest = memoryview(data)
        with os_errors_at(self.place):
            while rest:
                count = os.pwrite(self._fd, rest, offset)
                if count == 0:
                    raise OSError(errno.EIO, "it takes no more bytes")
                rest, offset = rest[count:], offset + count


def cluster_bits_for(disk: Geometry) -> int:
    """A cluster is a block of the bitmap where that is 4 KiB to 64 KiB, and more if the disk needs it.

    A smaller cluster would store no less, as a whole block is dirty; a larger one would, by rounding outward.
    From 64 KiB on, QEMU's own default, larger ones would only cost a guest that writes to the image more copying.
    """
    cluster_bits = min(max(disk.granularity_bits, SMALLEST_CLUSTER_BITS), DEFAULT_CLUSTER_BITS)
    while l1_entries(disk.size, cluster_bits) > MAX_L1_ENTRIES // 2:
        cluster_bits += 1
    return cluster_bits


def copy_clusters(
    device: Readable,
    file: ImageSink,
    hashing: Hashing,
    clusters: Geometry,
    runs: Iterable[Run],
    *,
    backing_file: str | None,
    report: Report,
    compression: Compression | None = None,
) -> Copied:
    """Fill `file` with an image of runs of `clusters`, ascending; what is between is left to the backing file.

    Raises `OSError` as the device does, and errors of ours as the file does. Nothing is synced.
    """
    if compression is not None:
        return _compressed(
            device, _Followed(file, hashing), clusters, runs, backing_file, report, compression
        )
    shelf = Shelf()
    writer = _writer(shelf, clusters, backing_file, CompressionType.ZLIB)
    carriers = Carriers(Loads(device, clusters), writer, shelf, file, hashing)
    carriers.carry(runs, report.advance)
    return Copied(carriers.bytes_changed, carriers.bytes_zero, carriers.finish())


def _writer(
    sink: Sink, clusters: Geometry, backing_file: str | None, compression_type: CompressionType
) -> Qcow2Writer:
    return Qcow2Writer(
        sink,
        size=clusters.size,
        cluster_bits=clusters.granularity_bits,
        backing_file=backing_file,
        compression_type=compression_type,
    )


class _Followed:
    """A file whose digests are computed behind whoever writes it, in small pieces."""

    def __init__(self, file: ImageSink, hashing: Hashing) -> None:
        self._file = file
        self._hashing = hashing

    def pwrite(self, data: Buffer, offset: int) -> None:
        self._file.pwrite(data, offset)
        with os_errors_at(self._file.place):
            self._hashing.wrote(offset, len(data))


def _compressed(
    device: Readable,
    file: Sink,
    clusters: Geometry,
    runs: Iterable[Run],
    backing_file: str | None,
    report: Report,
    compression: Compression,
) -> Copied:
    """One thread reads ahead, the caller's puts the image together, others compress."""
    plain = _writer(file, clusters, backing_file, compression.type)
    bytes_changed = bytes_zero = 0
    with (
        CompressingWriter(plain, compression, spared=ways_of(device).spared) as writer,
        contextlib.closing(Pieces(device, clusters).of_all(runs)) as pieces,
    ):
        for offset, length, data in pieces:
            if data is None:
                writer.write_zeroes(offset, length)
                bytes_zero += length
            else:
                writer.write(offset, data)
            bytes_changed += length
            report.advance(length)
        return Copied(bytes_changed, bytes_zero, writer.finish())
