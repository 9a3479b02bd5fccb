"""Puts a disk back onto something: run by run of a backup's chain, in one of two ways. One thread writes.

- `Overwriting` looks at nothing: data is written, and what reads as zeroes is zeroed, unless all of the target is
  zeroes yet. The kernel copies from file to file where it can, so that no byte passes through this program.
- `Comparing` reads the target first, and writes the pages that differ and no other. So a target that is nearly right
  is hardly written, a tracked one has no more dirt than need be, and a restore that was killed goes on where it was.
  Zeroes that the target knows of are not even read.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from typing import Protocol

from lmdbitmap.backup_chain import BackupChain
from lmdbitmap.copier import Report
from lmdbitmap.device import PAGE_BYTES
from lmdbitmap.interfaces import Allocation
from lmdbitmap.qcow2 import Kind, Run
from lmdbitmap.target import Target

_CHUNK_BYTES = 1 << 20
"""In our memory at once."""
_COARSE_BYTES = 1 << 16
_ZEROES = bytes(_CHUNK_BYTES)


class PuttingBack(Protocol):
    """`bytes_read` are the target's; `bytes_written` were data and `bytes_zeroed` zeroes that it did not have."""

    bytes_read: int
    bytes_written: int
    bytes_zeroed: int

    @property
    def reads(self) -> Collection[Kind]:
        """The kinds of runs whose data is asked for."""

    def put(self, run: Run, data: bytearray | None) -> None:
        """Put a run back, the next one of the disk, with its data or without."""


class Overwriting:
    """Writes all of the target; what it held before does not matter."""

    def __init__(self, chain: BackupChain, target: Target, report: Report) -> None:
        self._chain = chain
        self._target = target
        self._report = report
        self._buffer = memoryview(bytearray(_CHUNK_BYTES))
        self._kernel_can = target.fd is not None
        self.bytes_read = self.bytes_written = self.bytes_zeroed = 0

    @property
    def reads(self) -> Collection[Kind]:
        return (Kind.COMPRESSED,) if self._kernel_can else (Kind.DATA, Kind.COMPRESSED)

    def put(self, run: Run, data: bytearray | None) -> None:
        if run.kind is Kind.ZERO:
            if not self._target.is_fresh:
                self._zero(run)
        elif data is not None:
            self._target.write_many([(run.offset, memoryview(data))])
            self.bytes_written += run.length
        else:
            self._copy(run)
            self.bytes_written += run.length
        self._report.advance(run.length)

    def _zero(self, run: Run) -> None:
        for offset, part in _allocation(self._target, run):
            if not part.zero:
                self._target.write_zeroes(offset, part.length)
                self.bytes_zeroed += part.length

    def _copy(self, run: Run) -> None:
        offset = run.offset
        while offset < run.end:
            rest = run.part(offset, run.end)
            offset += self._copy_in_kernel(rest) or self._copy_by_hand(rest)

    def _copy_in_kernel(self, run: Run) -> int:
        """How many bytes the kernel copied: 0 where it cannot, or where copying by hand will tell why not."""
        if not self._kernel_can or run.kind is not Kind.DATA:
            return 0
        target = self._target.fd
        assert target is not None
        with self._chain.images[run.layer].file.reading() as source:
            assert source.fd is not None
            try:
                return os.copy_file_range(source.fd, target, run.length, run.host_offset, run.offset)
            except OSError:
                self._kernel_can = False
                return 0

    def _copy_by_hand(self, run: Run) -> int:
        piece = self._buffer[: run.length]
        self._chain.fill(piece, run)
        self._target.write_many([(run.offset, piece)])
        return len(piece)


class Comparing:
    """Writes what differs."""

    def __init__(self, chain: BackupChain, target: Target, report: Report) -> None:
        self._chain = chain
        self._target = target
        self._report = report
        self._wanted, self._present = bytearray(_CHUNK_BYTES), bytearray(_CHUNK_BYTES)
        self.bytes_read = self.bytes_written = self.bytes_zeroed = 0

    reads: Collection[Kind] = (Kind.DATA, Kind.COMPRESSED)

    def put(self, run: Run, data: bytearray | None) -> None:
        if run.kind is not Kind.ZERO:
            for offset, length in _pieces(run.offset, run.end, _CHUNK_BYTES):
                self._fill_wanted(run.part(offset, offset + length), data, offset - run.offset)
                self._mend_data(offset, length)
            return
        for offset, part in _allocation(self._target, run):
            if part.zero:
                self._report.advance(part.length)
            else:
                self._mend_zeroes(offset, offset + part.length)

    def _fill_wanted(self, part: Run, data: bytearray | None, start: int) -> None:
        """With a part of a run, of whose data it begins at byte `start`."""
        wanted = memoryview(self._wanted)[: part.length]
        if data is None:
            self._chain.fill(wanted, part)
        else:
            wanted[:] = memoryview(data)[start : start + part.length]

    def _mend_data(self, offset: int, length: int) -> None:
        wanted = memoryview(self._wanted)[:length]
        self._read(offset, length)
        writes = [
            (offset + start, wanted[start:stop])
            for start, stop in differences(self._wanted, self._present, length)
        ]
        if writes:
            self._target.write_many(writes)
        self.bytes_written += sum(len(data) for _, data in writes)
        self._report.advance(length)

    def _mend_zeroes(self, offset: int, end: int) -> None:
        for start, length in _pieces(offset, end, _CHUNK_BYTES):
            self._read(start, length)
            for first, stop in differences(_ZEROES, self._present, length):
                self._target.write_zeroes(start + first, stop - first)
                self.bytes_zeroed += stop - first
            self._report.advance(length)

    def _read(self, offset: int, length: int) -> None:
        self._target.pread_into(memoryview(self._present)[:length], offset)
        self.bytes_read += length


def _allocation(target: Target, run: Run) -> Iterator[tuple[int, Allocation]]:
    """(offset, part) of all of a run. What is changed meanwhile is behind it."""
    offset = run.offset
    for part in target.allocation(offset, run.length):
        yield offset, part
        offset += part.length


def _pieces(offset: int, end: int, most: int) -> Iterator[tuple[int, int]]:
    """[offset, end) as (offset, length) of pieces that end on multiples of `most`."""
    while offset < end:
        stop = min(end, offset - offset % most + most)
        yield offset, stop - offset
        offset = stop


def differences(one: bytes | bytearray, other: bytes | bytearray, length: int) -> Iterator[tuple[int, int]]:
    """Ranges (start, stop) of the first `length` bytes, in whole pages but for the last, that differ; none touch."""
    if one == other or not length:
        return
    begun = None
    for coarse in range(0, length, _COARSE_BYTES):
        end = min(coarse + _COARSE_BYTES, length)
        alike = one[coarse:end] == other[coarse:end]
        for page in range(coarse, end, end - coarse if alike else PAGE_BYTES):
            stop = min(page + PAGE_BYTES, end)
            if alike or one[page:stop] == other[page:stop]:
                if begun is not None:
                    yield begun, page
                    begun = None
            elif begun is None:
                begun = page
    if begun is not None:
        yield begun, length
