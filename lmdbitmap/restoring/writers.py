"""Writes a disk to a target, run by run of a backup's chain, in one of two ways. One thread writes.

- `Overwriting` compares nothing: data is written, and zeroes are zeroed unless the whole target is still zero. For
  targets with a descriptor parallel_restore.py does the same with many threads.
- `Comparing` reads the target first, and writes only the pages that differ (differences.py).
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
    """Bytes read of the target; bytes written as data, and as zeroes that the target did not have."""

    @property
    def bytes_written(self) -> int: ...
    @property
    def bytes_zeroed(self) -> int: ...
    @property
    def bytes_read(self) -> int: ...

    def put_all(self, runs: Iterable[MappedRun]) -> None:
        """Write all of the runs, which are the disk; nothing is synced. Raises `FormatError` for damaged data."""


class Overwriting:
    """Writes all of the target; its old content does not matter."""

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
    """Zero a run where it is not known to be zero; return how many bytes were zeroed."""
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
