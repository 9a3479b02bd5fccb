"""Copies clusters of a device into a backup image. What reads as zeroes is found out, and not stored as data.

Holes are not even read, unless they cover a cluster in part only.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeAlias

from lmdbitmap.bits import Run
from lmdbitmap.errors import os_errors_at
from lmdbitmap.geometry import Geometry
from lmdbitmap.interfaces import BlockDevice, Buffer
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

CHUNK_BYTES = 1 << 20
"""Read at once, unless a cluster is larger: what stays in the processor's cache is copied fastest."""
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
            if self._progress is not None:
                self._progress(self._done, self._total)


class ImageFile:
    """An empty file to write an image into; its refusals name the `place` where it will be."""

    def __init__(self, fd: int, place: str) -> None:
        self._fd = fd
        self._place = place

    def pwrite(self, data: Buffer, offset: int) -> None:
        rest = memoryview(data)
        with os_errors_at(self._place):
            while rest:
                count = os.pwrite(self._fd, rest, offset)
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
    device: BlockDevice,
    file: Sink,
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
    writer = Qcow2Writer(
        file,
        size=clusters.size,
        cluster_bits=clusters.granularity_bits,
        backing_file=backing_file,
        compression_type=CompressionType.ZLIB if compression is None else compression.type,
    )
    with _compressing(writer, compression) as target:
        copier = _Copier(device, target, clusters, report)
        for run in runs:
            copier.copy(run)
        return Copied(copier.bytes_changed, copier.bytes_zero, target.finish())


def _compressing(
    writer: Qcow2Writer, compression: Compression | None
) -> contextlib.AbstractContextManager[Qcow2Writer | CompressingWriter]:
    return contextlib.nullcontext(writer) if compression is None else CompressingWriter(writer, compression)


class _Copier:
    def __init__(
        self,
        device: BlockDevice,
        writer: Qcow2Writer | CompressingWriter,
        clusters: Geometry,
        report: Report,
    ) -> None:
        self._device = device
        self._writer = writer
        self._clusters = clusters
        self._report = report
        self._chunk_bytes = max(CHUNK_BYTES, clusters.granularity)
        self._buffer = bytearray(min(self._chunk_bytes, clusters.size))
        self._zeroes = bytes(clusters.granularity)
        self.bytes_changed = 0
        self.bytes_zero = 0

    def copy(self, run: Run) -> None:
        for start, stop, zero in self._parts(run):
            offset, length = self._clusters.bytes_of(start, stop)
            if zero:
                self._put_zeroes(offset, length)
            else:
                for position in range(offset, offset + length, self._chunk_bytes):
                    self._copy_chunk(position, min(self._chunk_bytes, offset + length - position))

    def _parts(self, run: Run) -> Iterator[tuple[int, int, bool]]:
        """The run in parts (first cluster, stop, whether the device knows that all of it is zero)."""
        position, stop = run
        offset, length = self._clusters.bytes_of(position, stop)
        for part in self._device.allocation(offset, length):
            zero = self._clusters.blocks_inward(offset, part.length) if part.zero else range(0)
            if zero:
                if position < zero.start:
                    yield position, zero.start, False
                yield zero.start, zero.stop, True
                position = zero.stop
            offset += part.length
        if position < stop:
            yield position, stop, False

    def _copy_chunk(self, offset: int, length: int) -> None:
        chunk = memoryview(self._buffer)[:length]
        self._device.pread_into(chunk, offset)
        for start, stop, zero in self._stretches(length):
            if zero:
                self._put_zeroes(offset + start, stop - start)
            else:
                self._writer.write(offset + start, chunk[start:stop])
                self._count(stop - start)

    def _stretches(self, length: int) -> Iterator[tuple[int, int, bool]]:
        """Stretches (start, stop, zero) of the buffer's first `length` bytes in clusters, neighbours differing."""
        start, was_zero = 0, self._is_zero(0, length)
        for position in range(len(self._zeroes), length, len(self._zeroes)):
            zero = self._is_zero(position, length)
            if zero is not was_zero:
                yield start, position, was_zero
                start, was_zero = position, zero
        yield start, length, was_zero

    def _is_zero(self, start: int, length: int) -> bool:
        """`startswith` is a memcmp: data that is not zero mostly differs early, and costs next to nothing."""
        stop = start + len(self._zeroes)
        if stop <= length:
            return self._buffer.startswith(self._zeroes, start, stop)
        return self._buffer.startswith(self._zeroes[: length - start], start, length)

    def _put_zeroes(self, offset: int, length: int) -> None:
        self._writer.write_zeroes(offset, length)
        self.bytes_zero += length
        self._count(length)

    def _count(self, length: int) -> None:
        self.bytes_changed += length
        self._report.advance(length)
