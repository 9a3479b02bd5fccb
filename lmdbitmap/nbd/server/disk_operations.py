"""Writes and flushes for a client, with the result as an NBD error number: 0 for success."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence

from lmdbitmap.interfaces import Lane
from lmdbitmap.nbd import protocol as nbd
from lmdbitmap.nbd.server.complaints import Complaints
from lmdbitmap.nbd.server.notice import Notice
from lmdbitmap.nbd.server.requests import FAILURES, error_of, place
from lmdbitmap.work.latencies import Latencies


class DiskOperations:
    """Operations of `lane`. `flushes` are the times they took."""

    def __init__(self, lane: Lane, notice: Notice, complaints: Complaints) -> None:
        self.flushes = Latencies()
        self._lane = lane
        self._notice = notice
        self._complaints = complaints

    def write_many(self, writes: Sequence[tuple[int, memoryview]]) -> Mapping[int, int]:
        """Return {index: error} of the writes that failed: all of them if the lane refuses as a whole."""
        try:
            failed = self._lane.write_many(writes)
        except FAILURES as refused:
            offset, data = writes[0]
            self._complaints.failed("WRITE", place(offset, len(data)), refused, times=len(writes))
            return dict.fromkeys(range(len(writes)), error_of(refused))
        if not failed:
            return failed
        for index, number in failed.items():
            offset, data = writes[index]
            failure = OSError(number, os.strerror(number))
            self._complaints.failed("WRITE", place(offset, len(data)), failure)
        return {index: nbd.nbd_error(number) for index, number in failed.items()}

    def write(self, offset: int, data: memoryview) -> int:
        return self.write_many([(offset, data)]).get(0, 0)

    def flush(self) -> int:
        self._notice.give()
        begun_ns = time.perf_counter_ns()
        try:
            self._lane.flush()
        except FAILURES as failure:
            self._complaints.failed("FLUSH", "the image", failure)
            return error_of(failure)
        finally:
            self.flushes.count(time.perf_counter_ns() - begun_ns)
        return 0
