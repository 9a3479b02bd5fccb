"""Puts a disk back onto something: run by run of a backup's chain, in one of two ways. One thread writes.

- `Overwriting` looks at nothing: data is written, and what reads as zeroes is zeroed, unless all of the target is
  zeroes yet. Onto what has a descriptor parallel_restore.py does that with many threads.
- `Comparing` reads the target first, and writes the pages that differ and no other (differences.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Protocol

from lmdbitmap.qcow2 import Kind, MappedRun
from lmdbitmap.repository.backup_chain import BackupChain
from lmdbitmap.restoring.prefetching import made_ready
from lmdbitmap.targets.differences import CHUNK_BYTES, Mender, allocated, chunks
from lmdbitmap.targets.target import Target
from lmdbitmap.work.buffers import new_buffer
from lmdbitmap.work.progress import Report

_STORED = (Kind.DATA, Kind.COMPRESSED)


class PuttingBack(Protocol):
    """`bytes_read` are the target's; `bytes_written` were data and `bytes_zeroed` zeroes that it did not have."""

    @property
    def bytes_written(self) -> int: ...
    @property
    def bytes_zeroed(self) -> int: ...
    @property
    def bytes_read(self) -> int: ...

    def put_all(self, runs: Iterable[MappedRun]) -> None:
        """Put all of the runs back, which are the disk; nothing is synced. Raises `FormatError` for what is damaged."""


class Overwriting:
    """Writes all of the target; what it held before does not matter."""

    def __init__(self, chain: BackupChain, target: Target, report: Report) -> None:
        self._chain = chain
        self._target = target
        self._report = report
        self.bytes_read = self.bytes_written = self.bytes_zeroed = 0

    def put_all(self, runs: Iterable[MappedRun]) -> None:
        with contextlib.closing(made_ready(self._chain, runs, _STORED)) as ready:
            for run, data in ready:
                if data is not None:
                    self._target.write_many([(run.offset, memoryview(data))])
                    self.bytes_written += run.length
                elif not self._target.is_fresh:
                    self.bytes_zeroed += zeroed(self._target, run)
                self._report.advance(run.length)


def zeroed(target: Target, run: MappedRun) -> int:
    """Make zeroes of a run where they are not known to be; answer how many."""
    done = 0
    for offset, part in allocated(target, run.offset, run.length):
        if not part.zero:
            target.write_zeroes(offset, part.length)
            done += part.length
    return done


class Comparing(Mender):
    """Writes what differs."""

    def __init__(self, chain: BackupChain, target: Target, report: Report) -> None:
        super().__init__(target, report.advance)
        self._chain = chain
        self._wanted = new_buffer(CHUNK_BYTES)

    @property
    def bytes_read(self) -> int:
        return self.bytes_compared

    def put_all(self, runs: Iterable[MappedRun]) -> None:
        with contextlib.closing(made_ready(self._chain, runs, _STORED)) as ready:
            for run, data in ready:
                if data is None:
                    self.mend_zeroes(run.offset, run.length)
                else:
                    self._mend(run, memoryview(data))

    def _mend(self, run: MappedRun, data: memoryview) -> None:
        for offset, length in chunks(run.offset, run.end):
            start = offset - run.offset
            memoryview(self._wanted)[:length] = data[start : start + length]
            self.mend_data(offset, self._wanted, length)
