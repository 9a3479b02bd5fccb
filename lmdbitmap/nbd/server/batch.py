"""Requests that are done together: a batch's WRITEs in one call, one flush for all that need it, then its READs.

A batch does WRITEs before READs. Both were in flight together, so either order is right, and a READ behind an
overlapping WRITE sees it. FLUSH and FUA are answered after a flush that came after the batch's WRITEs.
"""

from __future__ import annotations

from collections.abc import Mapping

from lmdbitmap.nbd import protocol as nbd
from lmdbitmap.nbd.server import traffic
from lmdbitmap.nbd.server.disk_operations import DiskOperations
from lmdbitmap.nbd.server.forms import Form
from lmdbitmap.nbd.server.replies import Read, Replies


class Batch:
    """The requests collected and not done yet. The hot loop appends plain READs and WRITEs to the lists itself."""

    def __init__(self, operations: DiskOperations, replies: Replies, form: Form, counts: list[int]) -> None:
        self.writes: list[tuple[int, memoryview]] = []
        self.write_cookies: list[bytes] = []
        self.reads: list[Read] = []
        self._fua_writes: list[int] = []
        self._flush_labels: list[bytes] = []
        self._operations = operations
        self._replies = replies
        self._form = form
        self._counts = counts

    def add_write(self, offset: int, data: memoryview, cookie: bytes, *, fua: bool) -> None:
        if fua:
            self._fua_writes.append(len(self.writes))
        self.writes.append((offset, data))
        self.write_cookies.append(cookie)

    def add_flush(self, label: bytes) -> None:
        self._flush_labels.append(label)

    def settle(self) -> None:
        """Do and answer what is collected."""
        if self.write_cookies or self._flush_labels:
            self._counts[traffic.WRITES] += len(self.write_cookies)
            self._counts[traffic.FLUSHES] += len(self._flush_labels)
            self._settle_writes()
        if self.reads:
            self._counts[traffic.READS] += len(self.reads)
            self._replies.add_reads(self.reads)
            self.reads.clear()

    def _settle_writes(self) -> None:
        failed = self._operations.write_many(self.writes) if self.writes else {}
        flush_error = self._operations.flush() if self._fua_writes or self._flush_labels else 0
        if failed or flush_error:
            self._answer_one_by_one(failed, flush_error)
        else:
            self._replies.add(self._form.successes(self.write_cookies, self.writes, self._flush_labels))
        for collected in (self.writes, self.write_cookies, self._fua_writes, self._flush_labels):
            collected.clear()

    def _answer_one_by_one(self, failed: Mapping[int, int], flush_error: int) -> None:
        errors = {**dict.fromkeys(self._fua_writes, flush_error), **failed}
        form = self._form
        for index, (cookie, (offset, _)) in enumerate(zip(self.write_cookies, self.writes, strict=True)):
            label = form.label(cookie, offset)
            self._replies.add(form.outcome(nbd.NBD_CMD_WRITE, label, errors.get(index, 0)))
        for label in self._flush_labels:
            self._replies.add(form.outcome(nbd.NBD_CMD_FLUSH, label, flush_error))
