"""Writes a backup's chain to a file or a block device, batch by batch, in any order.

One thread of a gang (gang.py) reads, proves and writes a batch. Mostly the very bytes that were proven are written,
while they are in the processor's cache. If the file system can share what files hold (reflinks), proven data is shared
and not written, and takes no space.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from functools import partial

from lmdbitmap.copying.hashing import MOST_THREADS
from lmdbitmap.images.device import PAGE_BYTES
from lmdbitmap.qcow2 import Kind, MappedRun
from lmdbitmap.repository.backup_chain import BackupChain
from lmdbitmap.restoring.prefetching import BATCH_BYTES, batches
from lmdbitmap.restoring.writers import zeroed
from lmdbitmap.system import linux
from lmdbitmap.targets.target import Target
from lmdbitmap.work.buffers import new_buffer
from lmdbitmap.work.gang import Gang, Work
from lmdbitmap.work.progress import Report


class CarryingBack:
    """Writes all of a target that has a descriptor; the target's old content does not matter."""

    bytes_read = 0
    """Bytes read of the target."""

    def __init__(self, chain: BackupChain, target: Target, report: Report) -> None:
        assert target.fd is not None
        self._chain = chain
        self._target = target
        self._target_fd = target.fd
        self._report = report
        self._can_share = True
        self._counting = threading.Lock()
        self._done = self._told = 0
        self.bytes_written = self.bytes_zeroed = 0

    def put_all(self, runs: Iterable[MappedRun]) -> None:
        """Write all runs; nothing is synced. Raises `FormatError` for damaged data."""
        Gang(self._new_carrier, most=MOST_THREADS).do(self._announced(runs), self._tell)

    def _announced(self, runs: Iterable[MappedRun]) -> Iterator[list[MappedRun]]:
        for batch in batches(runs):
            for run in batch:
                self._chain.announce(run)
            yield batch

    def _tell(self) -> None:
        self._told, before = self._done, self._told
        self._report.advance(self._told - before)

    def _new_carrier(self) -> Work[list[MappedRun]]:
        return partial(self._carry, memoryview(new_buffer(BATCH_BYTES)))

    def _carry(self, buffer: memoryview, number: int, batch: list[MappedRun]) -> None:
        written = zeroes = 0
        for group in _groups(run for run in batch if run.is_stored):
            length = sum(run.length for run in group)
            self._put(group, buffer[:length])
            written += length
        if not self._target.is_fresh:
            zeroes = sum(zeroed(self._target, run) for run in batch if not run.is_stored)
        with self._counting:
            self._done += sum(run.length for run in batch)
            self.bytes_written += written
            self.bytes_zeroed += zeroes

    def _put(self, group: list[MappedRun], data: memoryview) -> None:
        if self._chain.images[group[0].layer].proof is None and self._share(group):
            return
        self._chain.fill(data, group[0]._replace(length=len(data)))
        if self._share(group):
            return
        start = 0
        for run in group:
            self._target.write_many([(run.offset, data[start : start + run.length])])
            start += run.length

    def _share(self, group: list[MappedRun]) -> bool:
        """Share the images' data with the target. Return whether the target has it as its own now."""
        return self._can_share and all(run.kind is Kind.DATA and self._is_shared(run) for run in group)

    def _is_shared(self, run: MappedRun) -> bool:
        """Share one run. A refusal means that no later run is tried, unless it is at the disk's end within a block."""
        with self._chain.images[run.layer].file.reading() as source:
            assert source.fd is not None
            is_shared = linux.clone_range(source.fd, run.host_offset, run.length, self._target_fd, run.offset)
        if not is_shared and run.length % PAGE_BYTES == 0:
            self._can_share = False  # other threads clear it too, so it is not this thread's answer
        return is_shared


def _groups(stored: Iterable[MappedRun]) -> Iterator[list[MappedRun]]:
    """Yield runs of data that lie together in one file, as much as a buffer holds. Compressed runs come alone."""
    group: list[MappedRun] = []
    length = 0
    for run in stored:
        if group and (not _adjoins(run, group[-1]) or length + run.length > BATCH_BYTES):
            yield group
            group, length = [], 0
        group.append(run)
        length += run.length
    if group:
        yield group


def _adjoins(run: MappedRun, before: MappedRun) -> bool:
    is_data = run.kind is Kind.DATA and before.kind is Kind.DATA and run.layer == before.layer
    return is_data and run.host_offset == before.host_offset + before.length
