"""Flat bitmap files: written whole or not at all, and proven before they are trusted.

`format.py` handles the bytes, this module the files. No field of a file decides how much memory reading it takes. The
time depends on the file's real size on disk: holes are skipped and their checksum is calculated, so a sparse file that
claims terabytes costs no more than the data in it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import replace
from typing import BinaryIO

from lmdbitmap import format as flat
from lmdbitmap.errors import FormatError, os_errors_at
from lmdbitmap.format import BitsTally, Chunk, Flags, FlatHeader, Metadata, Zeroes
from lmdbitmap.interfaces import Buffer
from lmdbitmap.system import atomic_files, files

PAGE_BYTES = 4096
"""The bits begin on a multiple of this. Every chunk that is read is a multiple of it long, except the last: whoever
gets the chunks counts on it."""
_CHUNK_BYTES = 1 << 20

_BEGINNING = flat.MAGIC + flat.MAJOR_VERSION.to_bytes(2, "little")


class FlatFile:
    """An open file whose header is proven. Its bits are proven each time they are read."""

    def __init__(self, path: str, fd: int) -> None:
        with os_errors_at(path):
            status = os.fstat(fd)
            prefix = files.pread_whole(fd, flat.MAX_HEADER_SIZE, 0) if stat.S_ISREG(status.st_mode) else None
        if prefix is None:
            raise FormatError(
                path, expected="a regular file", found="something else", next_step="name a .dbm file"
            )
        self.header, self.metadata = flat.decode_header(prefix, file_size=status.st_size, place=path)
        self.path = path
        self.fd = fd
        self._header_area = prefix[: self.header.header_size]

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, writable: bool = False) -> FlatFile:
        """Open a file and prove its header. Raises `NotFound`, `StorageError`, or `FormatError` for a bad header."""
        place = os.fspath(path)
        access = os.O_RDWR if writable else os.O_RDONLY
        with os_errors_at(place):
            # O_NONBLOCK: do not wait for the writer of a fifo
            fd = os.open(place, access | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        try:
            return cls(place, fd)
        except BaseException:
            os.close(fd)
            raise

    def chunks(self) -> Iterator[Chunk]:
        """Yield the bits; do not act on any of them before the last chunk: see `format.trusted_bits`."""
        return flat.trusted_bits(self.header, self._unproven_chunks(), place=self.path)

    def prove(self) -> None:
        """Read all bits once. Raises `Untrusted` if the file is not CLEAN, `FormatError` if they are wrong."""
        for _ in self.chunks():
            pass

    def proven_copy(self, folder: str) -> FlatFile:
        """Return a private copy in a file of `folder` that has no name. Raises as `prove` does.

        Whatever happens to the file, or to the file system it is on, reading the copy does not wait for it.
        """
        with os_errors_at(folder):
            fd = files.open_nameless(folder)
            try:
                self._copy_to(fd)
                return FlatFile(self.path, fd)
            except BaseException:
                os.close(fd)
                raise

    def _copy_to(self, fd: int) -> None:
        files.pwrite_whole(fd, self._header_area, 0)
        position = self.header.header_size
        for chunk in self.chunks():
            if isinstance(chunk, Zeroes):
                position += chunk.length
            else:
                files.pwrite_whole(fd, chunk, position)
                position += len(chunk)
        os.ftruncate(fd, position)

    def clear_clean(self) -> None:
        """Clear CLEAN durably: the disk may change after this returns (docs/format.md, in place, step 1)."""
        with os_errors_at(self.path):
            files.pwrite_whole(self.fd, flat.without_clean(self._header_area)[: flat.FIXED_SIZE], 0)
            os.fsync(self.fd)

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> FlatFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _unproven_chunks(self) -> Iterator[Chunk]:
        position = self.header.header_size
        end = position + self.header.bits_size
        while position < end:
            data_start, data_end = self._next_data(position, end)
            if position < data_start:
                yield Zeroes(data_start - position)
            position = data_start
            while position < data_end:
                chunk = self._read(min(_CHUNK_BYTES, data_end - position), position)
                if not chunk:
                    return  # the file was truncated meanwhile: the proof notices
                yield chunk
                position += len(chunk)

    def _read(self, length: int, position: int) -> bytes:
        with os_errors_at(self.path):
            return files.pread_whole(self.fd, length, position)

    def _next_data(self, position: int, end: int) -> tuple[int, int]:
        """Return the next data (not a hole) between `position` and `end`, rounded outward to whole pages."""
        try:
            start = os.lseek(self.fd, position, os.SEEK_DATA)
            stop = os.lseek(self.fd, start, os.SEEK_HOLE)
        except OSError as refusal:
            if refusal.errno == errno.ENXIO:  # holes all the way
                return end, end
            return position, end  # the file system does not report holes: all of it is data
        first_page = start - start % PAGE_BYTES
        return min(max(first_page, position), end), min(stop + -stop % PAGE_BYTES, end)


class NewFlatFile:
    """A flat file being written. `put` the dirty ranges in ascending order; everything else is clean."""

    def __init__(self, file: BinaryIO, header: FlatHeader, metadata: Metadata) -> None:
        self.header = header.unsealed()
        self._file = file
        self._metadata = metadata
        self._tally = BitsTally(header.bit_count)
        self._bits_start = file.write(flat.encode_header(self.header, metadata))

    def put(self, offset: int, dirty: Buffer) -> None:
        """Write `dirty` at byte `offset` of the bits. No bit past the end of the disk may be set."""
        self._tally.add(Zeroes(offset - self._tally.size))
        self._tally.add(dirty)
        self._file.seek(self._bits_start + offset)
        self._file.write(dirty)

    def note_superset(self) -> None:
        """Set SUPERSET: the bits may name clean blocks as dirty."""
        self.header = replace(self.header, flags=self.header.flags | Flags.SUPERSET)

    def seal(self) -> None:
        """Write the CLEAN header, after all bits."""
        self._tally.add(Zeroes(self.header.bits_size - self._tally.size))
        self.header = self.header.sealed(self._tally)
        self._file.truncate(self._bits_start + self.header.bits_size)
        self._file.seek(0)
        self._file.write(flat.encode_header(self.header, self._metadata))


@contextlib.contextmanager
def writing(path: str | os.PathLike[str], header: FlatHeader, metadata: Metadata) -> Iterator[NewFlatFile]:
    """Yield a new file for `path`, CLEAN and durable if the block does not raise; if it raises, nothing has changed.

    Raises `FormatError` if `path` has a file that is neither empty nor a flat file of this version.
    """
    place = os.fspath(path)
    _refuse_foreign(place)
    with atomic_files.replacing(place) as file:
        new = NewFlatFile(file, header, metadata)
        yield new
        with os_errors_at(place):
            new.seal()


def begins_like_ours(path: str) -> bool:
    """Return whether the first bytes are those of a flat file of this version, whatever follows them."""
    return files.first_bytes(path, len(_BEGINNING)) == _BEGINNING


def _refuse_foreign(place: str) -> None:
    """Raise `FormatError` for a foreign file. Replacing it would lose its content, and programs that have it open would
    go on with a file that has no name any more.
    """
    if files.first_bytes(place, len(_BEGINNING)) in (b"", _BEGINNING):
        return
    raise FormatError(
        place,
        expected="a flat bitmap file of this version, an empty file or none",
        found="a file with something else in it",
        next_step="name a new file: nothing was written",
    )
