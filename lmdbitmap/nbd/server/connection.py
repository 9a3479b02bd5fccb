"""The transmission phase of one client: the server's hot loop. Speed outranks beauty here and in `replies`.

One blocking socket, one lane to the disk, one thread at a time. What has arrived is served as a batch:

    receive what is there -> take every whole request out of it -> one `write_many` for all writes,
    one flush for all requests that need one, then the reads -> all replies in one send

A request costs a `struct.unpack_from`, a comparison and its own system call. Magic, flags and type of a request are
read as one 64-bit word, so that one comparison recognizes a READ or WRITE without flags. Every other request takes the
slower path, `_take_rare`. The parts:

    inbox.py          the bytes that have arrived
    batch.py          plain requests, collected to be done together
    long_writes.py    a WRITE that is done as its data arrives
    commands.py       the other commands
    replies.py        READs, and all replies
    forms.py          the layout of requests and replies

Invariants:

- Every request gets exactly one reply, DISC none. A request that fails costs an error reply. Bytes that are no request
  cost the connection (`FormatError`), and so does a long change that the server's stop cuts short.
- Any command but READ, WRITE and FLUSH first settles what came before it.
- Memory is bounded by constants.
"""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Mapping
from typing import Final

from lmdbitmap.interfaces import PatientLane, ServedDisk
from lmdbitmap.nbd import protocol as nbd
from lmdbitmap.nbd.server import commands, traffic
from lmdbitmap.nbd.server.batch import Batch
from lmdbitmap.nbd.server.complaints import Complaints
from lmdbitmap.nbd.server.contexts import StatusSource
from lmdbitmap.nbd.server.disk_operations import DiskOperations
from lmdbitmap.nbd.server.forms import EXTENDED, SIMPLE, STRUCTURED
from lmdbitmap.nbd.server.handshake import MAX_PAYLOAD
from lmdbitmap.nbd.server.inbox import Inbox
from lmdbitmap.nbd.server.long_writes import LONG_FROM, LongWrite
from lmdbitmap.nbd.server.notice import Notice, nobody
from lmdbitmap.nbd.server.replies import Replies
from lmdbitmap.nbd.server.requests import FAILURES, Negotiated, error_of, named, refusal
from lmdbitmap.nbd.server.traffic import Traffic
from lmdbitmap.work.latencies import Latencies

_UNTIMED: Final = 15
"""Batches between two that are timed."""
_RUN: Final = 112
"""About four headers: enough to look for a run of READs."""


class Connection:
    """Serves `disk` to the client behind `sock` until the client leaves or breaks the protocol, or `stopping` is set.

    `received` is what came behind the handshake. `contexts` are those the client selected, by the ids it was given.
    This connection's thread writes the counters; any thread may read them.
    """

    def __init__(
        self,
        sock: socket.socket,
        disk: ServedDisk,
        *,
        structured: bool,
        contexts: Mapping[int, StatusSource],
        received: bytes = b"",
        encrypted: bool = False,
        extended: bool = False,
        complaints: Complaints | None = None,
    ) -> None:
        self.stopping = False
        self.notice = Notice()
        """Given before the connection waits for anything but more requests."""
        self.counts = [0] * len(traffic.KINDS)
        self._latencies = Latencies()
        self._untimed_turns = 0
        self._disk = disk
        self._lane = disk.lane()
        if isinstance(self._lane, PatientLane):
            self._lane.has_waited = self.notice.give
        self._complaints = complaints or Complaints()
        self._operations = DiskOperations(self._lane, self.notice, self._complaints)
        self._form = EXTENDED if extended else STRUCTURED if structured else SIMPLE
        self._layout, self._header_size = self._form.layout, self._form.header.size
        self._plain_write = self._form.plain_writes[0]
        self._contexts = contexts
        self._terms = Negotiated(self._form.in_chunks, bool(contexts), extended)
        self._inbox = Inbox(sock, received=received, encrypted=encrypted)
        self._replies = Replies(
            sock, self._lane, disk.fd, self.notice, self._complaints, form=self._form, encrypted=encrypted
        )
        self._batch = Batch(self._operations, self._replies, self._form, self.counts)
        self._long_write: LongWrite | None = None
        """The one under way: what arrives is its data."""

    @property
    def traffic(self) -> Traffic:
        received, sent = self._inbox.bytes_received, self._replies.bytes_sent
        return Traffic(1, tuple(self.counts), received, sent, self._latencies, self._operations.flushes)

    def run(self) -> None:
        """Serve until the client is gone. Raise `FormatError` if it breaks the protocol, `OSError` on socket errors."""
        try:
            while self.serve_some():
                pass
        finally:
            self.close()

    def serve_some(self, *, polls: bool = True) -> bool:
        """Serve the requests at hand, then wait for some batches more and serve them. False when the client is gone.

        `polls` says whether polling before it sleeps is worth the processor (receiving.py).
        """
        self._inbox.lookout.polls = polls
        self._replies.hurry(False)
        goes_on = self._serve_batch() and self._receive() and self._serve_timed_batch()
        left = _UNTIMED
        while goes_on and left:
            goes_on = self._receive() and self._serve_batch()
            left -= 1
        return goes_on

    def turn(self) -> bool:
        """Receive what is there and serve it, like `serve_some`, but never wait without giving notice."""
        self._replies.hurry(True)
        came = self._inbox.receive_at_once()
        if not came:
            return came is None or self._is_gone()
        if self._untimed_turns:
            self._untimed_turns -= 1
            return self._serve_batch()
        self._untimed_turns = _UNTIMED
        return self._serve_timed_batch()

    def close(self) -> None:
        self.notice.to = nobody
        self._replies.close()
        self._lane.close()

    # -- requests in ---------------------------------------------------------------------------------------

    def _receive(self) -> bool:
        """Wait for more bytes; all replies are sent by now. Return False when the client is gone."""
        return self._inbox.receive() or self._is_gone()

    def _is_gone(self) -> bool:
        """Return False: the client goes on no more. It must not leave in the middle of a long WRITE."""
        if self._long_write is not None:
            raise ConnectionResetError(errno.ECONNRESET, "the client left in the middle of a WRITE")
        return False

    def _serve_timed_batch(self) -> bool:
        """Run `_serve_batch` and time it. Timing every batch would cost a client of small requests a tenth."""
        begun_ns = time.perf_counter_ns()
        goes_on = self._serve_batch()
        self._latencies.count(time.perf_counter_ns() - begun_ns)
        return goes_on

    def _serve_batch(self) -> bool:
        """Do and answer every whole request at hand. Return False when the client said goodbye."""
        if self._long_write is not None and self._long_write_goes_on(self._long_write):
            return True
        inbox, batch, size = self._inbox, self._batch, self._disk.size
        buffer, view, position, end = inbox.buffer, inbox.view, inbox.start, inbox.end
        writes, cookies, reads = batch.writes, batch.write_cookies, batch.reads
        (unpack, header_size, plain_read), plain_write = self._layout, self._plain_write
        writable = -1 if self._disk.read_only else size
        leaving = False
        while end - position >= header_size:
            fields = unpack(buffer, position)
            head, cookie, offset, length = fields
            data = position + header_size
            stop = data + length
            if head == plain_write and data < stop <= end and offset + length <= writable:
                writes.append((offset, view[data:stop]))
                cookies.append(cookie)
                position = stop
            elif head == plain_read and 0 < length <= MAX_PAYLOAD and offset + length <= size:
                reads.append(fields)
                position = data
                if end - position >= _RUN:
                    position = self._take_run_of_reads(position)
            else:
                request = self._form.parse(view[position:data])
                stop = data + request.payload
                leaving = request.type == nbd.NBD_CMD_DISC
                if leaving or stop > end:
                    break
                self._take_rare(request, cookie, data)
                position = stop
                if head in self._form.plain_writes:  # as this client says it: the next one is known at once
                    plain_write = self._plain_write = head
        batch.settle()
        if position > inbox.start or leaving:
            self._replies.send()
        inbox.start = position
        if leaving or self.stopping:
            return False
        self._keep_rest()
        return True

    def _take_run_of_reads(self, position: int) -> int:
        """Collect the plain READs that follow each other from `position` on: in a long run each costs less."""
        reads, size, end = self._batch.reads, self._disk.size, self._inbox.end
        header, header_size, plain_read = self._form.header, self._header_size, self._form.plain_read
        for fields in header.iter_unpack(self._inbox.view[position : end - (end - position) % header_size]):
            head, _, offset, length = fields
            if head != plain_read or not 0 < length <= MAX_PAYLOAD or offset + length > size:
                break
            reads.append(fields)
            position += header_size
        return position

    def _keep_rest(self) -> None:
        """Make room for the rest of an unfinished request, or do it as its data comes, if that is long."""
        inbox, needed = self._inbox, self._header_size
        if inbox.at_hand >= needed:
            request = self._form.parse(inbox.view[inbox.start : inbox.start + needed])
            needed += request.payload
            if request.payload > LONG_FROM:
                self._begin_long_write(request)
                return
        inbox.make_room_for(needed)

    def _begin_long_write(self, request: nbd.Request) -> None:
        refused = self._refusal(request)
        self._inbox.take(self._header_size)
        write = self._long_write = LongWrite(request, self._inbox, self._operations, error=refused)
        self._long_write_goes_on(write)

    def _long_write_goes_on(self, write: LongWrite) -> bool:
        """Write what has come of it. Once that is all, answer it, and return False."""
        self.notice.give()
        if write.goes_on():
            self._inbox.move_to_front()
            return True
        self._long_write = None
        self._answer(write.request, write.error)
        self._replies.send()
        return False

    def _take_rare(self, request: nbd.Request, cookie: bytes, data: int) -> None:
        """Take a request that has flags, is not allowed, or is neither READ nor WRITE."""
        error = self._refusal(request)
        if error:
            self._answer(request, error)
        elif request.type == nbd.NBD_CMD_FLUSH:
            self._batch.add_flush(self._form.label(cookie, request.offset))
        elif request.type == nbd.NBD_CMD_WRITE and request.length:
            fua = bool(request.flags & nbd.NBD_CMD_FLAG_FUA)
            payload = self._inbox.view[data : data + request.length]
            self._batch.add_write(request.offset, payload, cookie, fua=fua)
        elif request.type == nbd.NBD_CMD_READ and request.length:
            self._batch.settle()
            self.counts[traffic.READS] += 1
            self._replies.add_whole_read(self._form.label_of(request), request.offset, request.length)
        else:
            self._batch.settle()
            self._perform(request)

    def _perform(self, request: nbd.Request) -> None:
        self.notice.give()
        if commands.is_long(request):
            self._replies.send()
        try:
            reply = commands.perform(request, self._lane, self._contexts, self._form, lambda: self.stopping)
        except commands.CutShortError:
            self._replies.send()  # to what came before it
            raise
        except FAILURES as failure:
            self._complaints.failed(*named(request), failure)
            self._answer(request, error_of(failure))
        else:
            self._count(request)
            self._replies.add(reply)

    def _refusal(self, request: nbd.Request) -> int:
        refused = refusal(request, self._terms, self._disk.size, read_only=self._disk.read_only)
        if refused is None:
            return 0
        self._complaints.refused(*named(request), expected=refused.expected, found=refused.found)
        return refused.error

    def _answer(self, request: nbd.Request, error: int) -> None:
        self._count(request)
        self._replies.add(self._form.outcome(request.type, self._form.label_of(request), error))

    def _count(self, request: nbd.Request) -> None:
        self.counts[traffic.kind_of(request.type)] += 1
