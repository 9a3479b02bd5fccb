"""Copies clusters of a device into a backup image. Data that reads as zeroes (loads.py finds it) is not stored."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import NamedTuple

from lmdbitmap.bits import Run
from lmdbitmap.copying.carriers import Carriers, Hashing, ImageSink, Shelf
from lmdbitmap.copying.loads import Loads
from lmdbitmap.copying.pieces import Pieces
from lmdbitmap.copying.readable import Readable, read_methods_of
from lmdbitmap.errors import os_errors_at
from lmdbitmap.geometry import Geometry
from lmdbitmap.interfaces import Buffer
from lmdbitmap.qcow2 import (
    CompressingWriter,
    Compression,
    CompressionType,
    Qcow2Writer,
    WritableFile,
)
from lmdbitmap.system.files import pwrite_whole
from lmdbitmap.work.progress import Report


class Copied(NamedTuple):
    """Bytes of the disk that were copied, how many of them are zeroes, and bytes of the image."""

    bytes_changed: int
    bytes_zero: int
    bytes_stored: int


class ImageFile:
    """An empty file to write an image into, unbuffered; its errors name the `place` where the file will be."""

    def __init__(self, fd: int, place: str) -> None:
        self._fd = fd
        self.place = place

    def pwrite(self, data: Buffer, offset: int) -> None:
        with os_errors_at(self.place):
            pwrite_whole(self._fd, data, offset)


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
    """Fill `file` with an image of ascending runs of `clusters`; what lies between is left to the backing file.

    Raises `OSError` as the device does, and our own errors as the file does. Nothing is synced.
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
    sink: WritableFile, clusters: Geometry, backing_file: str | None, compression_type: CompressionType
) -> Qcow2Writer:
    return Qcow2Writer(
        sink,
        size=clusters.size,
        cluster_bits=clusters.granularity_bits,
        backing_file=backing_file,
        compression_type=compression_type,
    )


class _Followed:
    """A file whose digests are computed behind its writer, in small pieces."""

    def __init__(self, file: ImageSink, hashing: Hashing) -> None:
        self._file = file
        self._hashing = hashing

    def pwrite(self, data: Buffer, offset: int) -> None:
        self._file.pwrite(data, offset)
        with os_errors_at(self._file.place):
            self._hashing.wrote(offset, len(data))


def _compressed(
    device: Readable,
    file: WritableFile,
    clusters: Geometry,
    runs: Iterable[Run],
    backing_file: str | None,
    report: Report,
    compression: Compression,
) -> Copied:
    """Copy with one thread reading ahead, the caller's putting the image together, and others compressing."""
    plain = _writer(file, clusters, backing_file, compression.type)
    bytes_changed = bytes_zero = 0
    with (
        CompressingWriter(plain, compression, spared=read_methods_of(device).spared) as writer,
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
