"""The transmission phase of one client: the server's hot loop. Speed outranks beauty here and in `replies`.

One blocking socket, one lane to the disk, one thread at a time. What has arrived is served as a batch:

    receive what is there -> take every whole request out of it -> one `write_many` for all writes,
    one flush for all requests that need one, then the reads -> all replies in one send

A request costs a `struct.unpack_from`, a comparison and its own system call. Magic, flags and type of a request are
read as one 64-bit word, so that one comparison recognizes a READ or WRITE without flags. Every other request takes the
slower path, `_take_rare`. A form (forms.py) knows the layout of requests and replies.

Invariants:

- Every request gets exactly one reply, DISC none. A request that fails costs an error reply. Bytes that are no request
  cost the connection (`FormatError`).
- A batch does writes before reads. Both were in flight together, so either order is right, and a read behind an
  overlapping write sees it. FLUSH and FUA are answered after a flush that came after the batch's writes. Any other
  command first settles what came before it.
- Memory is bounded by constants. A WRITE longer than `_STREAM_FROM` is done in pieces as its data arrives: the first
  pieces are written while the client sends the rest. Pieces end on multiples of `_PIECE`, so that no page and hardly a
  block is written in two halves.
- If the disk has a descriptor, such a WRITE goes from the socket into the image by reference (splicing.py), which saves
  a copy. Its data must then not be in the buffer already when the WRITE is recognized. So behind such a write the next
  header is received by itself, until a request of another kind comes. Replies that wait then are sent before the thread
  sleeps, and after `_MOST_UNSENT` at the latest.
"""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Mapping
from typing import Final

from lmdbitmap.errors import LmdbitmapError
from lmdbitmap.interfaces import PatientLane, ServedDisk, SplicingLane
from lmdbitmap.nbd import protocol as nbd
from lmdbitmap.nbd.server import commands, traffic
from lmdbitmap.nbd.server.complaints import Complaints
from lmdbitmap.nbd.server.contexts import StatusSource
from lmdbitmap.nbd.server.disk_operations import DiskOperations
from lmdbitmap.nbd.server.forms import EXTENDED, SIMPLE, STRUCTURED
from lmdbitmap.nbd.server.handshake import MAX_PAYLOAD
from lmdbitmap.nbd.server.notice import Notice, nobody
from lmdbitmap.nbd.server.receiving import Receiver
from lmdbitmap.nbd.server.replies import Read, Replies
from lmdbitmap.nbd.server.requests import Negotiated, error_of, named, refusal
from lmdbitmap.nbd.server.splicing import SplicePipe
from lmdbitmap.nbd.server.traffic import Traffic
from lmdbitmap.work.buffers import new_buffer
from lmdbitmap.work.latencies import Latencies

_BATCH: Final = 512 << 10
"""Bytes received before they are served: few enough to stay in a core's cache until they are written."""
_STREAM_FROM: Final = 128 << 10
_PIECE: Final = 64 << 10
_PAGE: Final = 4096
_MOST_UNSENT: Final = 8
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
        self.bytes_received = len(received)
        self._batches = Latencies()
        self._untimed_turns = 0
        self._receiver = Receiver(sock, encrypted=encrypted)
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
        self._replies = Replies(
            sock, self._lane, disk.fd, self.notice, self._complaints, form=self._form, encrypted=encrypted
        )
        self._pipe: SplicePipe | None = None
        if disk.fd is not None and not encrypted and isinstance(self._lane, SplicingLane):
            self._pipe = SplicePipe(sock, self._lane)
        self._appetite = _BATCH
        """Most bytes to have at hand: the next header behind a WRITE that went by reference, else a batch."""
        self._unsent = 0
        """Replies to long WRITEs that are not sent yet."""
        self._buffer = new_buffer(_BATCH)
        self._view = memoryview(self._buffer)
        self._buffer[: len(received)] = received
        self._start, self._end = 0, len(received)
        self._writes: list[tuple[int, memoryview]] = []
        self._write_cookies: list[bytes] = []
        self._fua_writes: list[int] = []
        self._flush_labels: list[bytes] = []
        self._reads: list[Read] = []

    @property
    def traffic(self) -> Traffic:
        counts, sent = tuple(self.counts), self._replies.bytes_sent
        return Traffic(1, counts, self.bytes_received, sent, self._batches, self._operations.flushes)

    def run(self) -> None:
        """Serve until the client is gone. Raise `FormatError` if it breaks the protocol, `OSError` on socket errors."""
        try:
            while self.serve_some():
                pass
        finally:
            self.close()

    def serve_some(self) -> bool:
        """Serve the requests at hand, then wait for some batches more and serve them. False when the client is gone."""
        self._replies.hurry(False)
        goes_on = self._serve_batch() and self._receive() and self._serve_timed_batch()
        left = _UNTIMED
        while goes_on and left:
            goes_on = self._receive() and self._serve_batch()
            left -= 1
        if self._unsent:
            self._send()
        return goes_on

    def turn(self) -> bool:
        """Receive what is there and serve it, like `serve_some`, but never wait without giving notice."""
        self._replies.hurry(True)
        room = self._view[self._end : min(self._start + self._appetite, _BATCH)]
        count = self._receiver.receive_at_once(room)
        if not count:
            return count is None
        self._end += count
        self.bytes_received += count
        if self._untimed_turns:
            self._untimed_turns -= 1
            return self._serve_batch()
        self._untimed_turns = _UNTIMED
        return self._serve_timed_batch()

    def close(self) -> None:
        self.notice.to = nobody
        self._replies.close()
        if self._pipe is not None:
            self._pipe.close()
        self._lane.close()

    # -- requests in ---------------------------------------------------------------------------------------

    def _receive(self) -> bool:
        """Wait for more bytes, and put them behind an unfinished request. Return False when the client is gone."""
        room = self._view[self._end : min(self._start + self._appetite, _BATCH)]
        count = self._receiver.receive_at_once(room) if self._unsent else None
        if not count:
            self._send()
        if count is None:
            count = self._receiver.receive(room)
        self._end += count
        self.bytes_received += count
        return count > 0

    def _serve_timed_batch(self) -> bool:
        """Run `_serve_batch` and time it. Timing every batch would cost a client of small requests a tenth."""
        begun_ns = time.perf_counter_ns()
        goes_on = self._serve_batch()
        self._batches.count(time.perf_counter_ns() - begun_ns)
        return goes_on

    def _serve_batch(self) -> bool:
        """Do and answer every whole request at hand. Return False when the client said goodbye."""
        buffer, view, position, end = self._buffer, self._view, self._start, self._end
        writes, cookies, reads, size = self._writes, self._write_cookies, self._reads, self._disk.size
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
        self._settle()
        # Replies to long WRITEs leave with those to other requests, or before the thread sleeps (`_receive`).
        if self._unsent == 0 or position > self._start or leaving:
            self._send()
        self._start = position
        if leaving or self.stopping:
            return False
        self._keep_rest()
        return True

    def _take_run_of_reads(self, position: int) -> int:
        """Collect the plain READs that follow each other from `position` on: in a long run each costs less."""
        reads, size, end = self._reads, self._disk.size, self._end
        header, header_size, plain_read = self._form.header, self._header_size, self._form.plain_read
        for fields in header.iter_unpack(self._view[position : end - (end - position) % header_size]):
            head, _, offset, length = fields
            if head != plain_read or not 0 < length <= MAX_PAYLOAD or offset + length > size:
                break
            reads.append(fields)
            position += header_size
        return position

    def _send(self) -> None:
        self._replies.send()
        self._unsent = 0

    def _keep_rest(self) -> None:
        """Make room for the rest of an unfinished request; if its data is long, do the request as the data comes."""
        at_hand = self._end - self._start
        needed = self._header_size
        if at_hand >= needed:
            request = self._form.parse(self._view[self._start : self._start + needed])
            needed += request.payload
            if request.payload > _STREAM_FROM:
                self._stream_write(request)
                return
        if at_hand == 0 or at_hand >= self._header_size:
            self._appetite = _BATCH
        if at_hand == 0 or self._start + needed > _BATCH:
            self._view[:at_hand] = self._view[self._start : self._end]
            self._start, self._end = 0, at_hand

    def _stream_write(self, request: nbd.Request) -> None:
        """Do a WRITE whose data is still arriving, piece by piece. Drain the data of a WRITE that is refused."""
        self.notice.give()
        error = self._refusal(request)
        offset, left, start = request.offset, request.payload, self._start + self._header_size
        if self._pipe is not None and not error and self._pipe.opens():
            error, offset, left = self._splice_write(self._pipe, offset, left, start)
            start = self._end = 0
        while left:
            at_hand = self._end - start
            ready = left if at_hand == left else at_hand - (offset + at_hand) % _PIECE
            if ready > 0:
                error = error or self._operations.write(offset, self._view[start : start + ready])
                offset, left, start = offset + ready, left - ready, start + ready
            else:
                self._receive_of_write(start, left)
                start = 0
        self._start = self._end = 0
        if request.flags & nbd.NBD_CMD_FLAG_FUA:
            error = error or self._operations.flush()
        self._answer(request, error)
        self._unsent += 1
        if self._pipe is None or self._unsent >= _MOST_UNSENT:
            self._send()

    def _splice_write(self, pipe: SplicePipe, offset: int, left: int, start: int) -> tuple[int, int, int]:
        """Write the bytes at hand from `start` on, and the rest by reference.

        Pieces end where pages do: a death between two of them must not tear a sector. Returns the error or 0, and the
        offset and number of bytes that are left to drain after an error.
        """
        self._appetite = self._header_size
        at_hand = self._end - start
        whole = max(at_hand - (offset + at_hand) % _PAGE, 0)
        error = self._operations.write(offset, self._view[start : start + whole]) if whole else 0
        if not error:
            pipe.put(self._view[start + whole : self._end])
        offset, missing = offset + whole, left - at_hand
        while missing and not error:
            missing -= self._fill(pipe, missing)
            ready = pipe.held
            if missing:
                ready -= (offset + ready) % _PAGE
            if ready > 0:
                error = self._operations.write_held(pipe, ready, offset)
                offset += ready
        return error, offset, missing

    def _fill(self, pipe: SplicePipe, limit: int) -> int:
        """Receive some of the WRITE's data. A client that waits for replies before it sends more gets them first."""
        count = pipe.fill(limit, wait=not self._unsent)
        if count < 0:
            self._send()
            count = pipe.fill(limit)
        self.bytes_received += count
        return count

    def _receive_of_write(self, start: int, left: int) -> None:
        """Move the bytes at hand from `start` to the front, and put more of the `left` bytes behind them."""
        at_hand = self._end - start
        if start:
            self._view[:at_hand] = self._view[start : self._end]
        count = self._receiver.receive(self._view[at_hand : min(left, _BATCH)])
        if count == 0:
            raise ConnectionResetError(errno.ECONNRESET, "the client left in the middle of a WRITE")
        self._end = at_hand + count
        self.bytes_received += count

    def _take_rare(self, request: nbd.Request, cookie: bytes, data: int) -> None:
        """Take a request that has flags, is not allowed, or is neither READ nor WRITE."""
        error = self._refusal(request)
        if error:
            self._answer(request, error)
        elif request.type == nbd.NBD_CMD_FLUSH:
            self._flush_labels.append(self._form.label(cookie, request.offset))
        elif request.type == nbd.NBD_CMD_WRITE and request.length:
            if request.flags & nbd.NBD_CMD_FLAG_FUA:
                self._fua_writes.append(len(self._writes))
            self._writes.append((request.offset, self._view[data : data + request.length]))
            self._write_cookies.append(cookie)
        elif request.type == nbd.NBD_CMD_READ and request.length:
            self._settle()
            self.counts[traffic.READS] += 1
            self._replies.add_whole_read(self._form.label_of(request), request.offset, request.length)
        else:
            self._settle()
            self._perform(request)

    def _refusal(self, request: nbd.Request) -> int:
        refused = refusal(request, self._terms, self._disk.size, read_only=self._disk.read_only)
        if refused is None:
            return 0
        self._complaints.refused(*named(request), expected=refused.expected, found=refused.found)
        return refused.error

    # -- doing what they ask -------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Do and answer the collected requests: the writes in one call, one flush for all, then the reads."""
        if self._write_cookies or self._flush_labels:
            self.counts[traffic.WRITES] += len(self._write_cookies)
            self.counts[traffic.FLUSHES] += len(self._flush_labels)
            self._settle_writes()
        if self._reads:
            self.counts[traffic.READS] += len(self._reads)
            self._replies.add_reads(self._reads)
            self._reads.clear()

    def _settle_writes(self) -> None:
        failed = self._operations.write_many(self._writes) if self._writes else {}
        flush_error = self._operations.flush() if self._fua_writes or self._flush_labels else 0
        if failed or flush_error:
            self._answer_one_by_one(failed, flush_error)
        else:
            self._replies.add(self._form.successes(self._write_cookies, self._writes, self._flush_labels))
        for collected in (self._writes, self._write_cookies, self._fua_writes, self._flush_labels):
            collected.clear()

    def _answer_one_by_one(self, failed: Mapping[int, int], flush_error: int) -> None:
        errors = {**dict.fromkeys(self._fua_writes, flush_error), **failed}
        form = self._form
        for index, (cookie, (offset, _)) in enumerate(zip(self._write_cookies, self._writes, strict=True)):
            label = form.label(cookie, offset)
            self._replies.add(form.outcome(nbd.NBD_CMD_WRITE, label, errors.get(index, 0)))
        for label in self._flush_labels:
            self._replies.add(form.outcome(nbd.NBD_CMD_FLUSH, label, flush_error))

    def _perform(self, request: nbd.Request) -> None:
        self.notice.give()
        if commands.is_long(request):
            self._send()
        try:
            reply = commands.perform(request, self._lane, self._contexts, self._form, lambda: self.stopping)
        except (OSError, LmdbitmapError) as failure:
            self._complaints.failed(*named(request), failure)
            self._answer(request, error_of(failure))
        else:
            self._count(request)
            self._replies.add(reply)

    def _answer(self, request: nbd.Request, error: int) -> None:
        self._count(request)
        self._replies.add(self._form.outcome(request.type, self._form.label_of(request), error))

    def _count(self, request: nbd.Request) -> None:
        self.counts[traffic.kind_of(request.type)] += 1
