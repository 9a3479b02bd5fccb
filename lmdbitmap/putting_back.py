"""Puts a disk back onto something: run by run of a backup's chain, in one of two ways. One thread writes.

- `Overwriting` looks at nothing: data is written, and what reads as zeroes is zeroed, unless all of the target is
  zeroes yet. The kernel copies from file to file where it can, so that no byte passes through this program.
- `Comparing` reads the target first, and writes the pages that differ and no other (differences.py).
"""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Protocol

from lmdbitmap.backup_chain import BackupChain
from lmdbitmap.buffers import new_buffer
from lmdbitmap.copier import Report
from lmdbitmap.differences import CHUNK_BYTES, Mender, allocated, chunks
from lmdbitmap.qcow2 import Kind, Run
from lmdbitmap.target import Target


class PuttingBack(Protocol):
    """`bytes_read` are the target's; `bytes_written` were data and `bytes_zeroed` zeroes that it did not have."""

    bytes_written: int
    bytes_zeroed: int

    @property
    def bytes_read(self) -> int: ...

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
        self._buffer = memoryview(new_buffer(CHUNK_BYTES))
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
        for offset, part in allocated(self._target, run.offset, run.length):
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


class Comparing(Mender):
    """Writes what differs."""

    def __init__(self, chain: BackupChain, target: Target, report: Report) -> None:
        super().__init__(target, report.advance)
        self._chain = chain
        self._wanted = new_buffer(CHUNK_BYTES)

    reads: Collection[Kind] = (Kind.DATA, Kind.COMPRESSED)

    @property
    def bytes_read(self) -> int:
        return self.bytes_compared

    def put(self, run: Run, data: bytearray | None) -> None:
        if run.kind is Kind.ZERO:
            self.mend_zeroes(run.offset, run.length)
            return
        for offset, length in chunks(run.offset, run.end):
            self._fill_wanted(run.part(offset, offset + length), data, offset - run.offset)
            self.mend_data(offset, self._wanted, length)

    def _fill_wanted(self, part: Run, data: bytearray | None, start: int) -> None:
        """With a part of a run, of whose data it begins at byte `start`."""
        wanted = memoryview(self._wanted)[: part.length]
        if data is None:
            self._chain.fill(wanted, part)
        else:
            wanted[:] = memoryview(data)[start : start + part.length]
