"""Many threads' requests to one far server, and what happens to them when it goes away.

**Which thread receives.** There is no thread of our own. Of the threads that wait for an answer one *leads*: it
receives for all, wakes those whose answers are complete, and hands the lead on when its own is. So a lonely request
costs no thread switch. A thread that still sends does not lead: the server may wait for us to receive.

**When the connection breaks**, the leader dials again and sends once more what was in flight: reads, writes at an
offset, zeroes, trims and flushes may all be done twice. A request that was in trouble for `reconnect_s` fails with
ETIMEDOUT. After that each new request tries once, and fails at once while the server is away.

**A flush does not lie.** A server that dies may lose writes that it had acknowledged and not flushed, and a later
flush, on a new connection, knows nothing of them. So every acknowledged change is kept until a flush sent after it has
succeeded. On a new connection the kept changes are written again, in their order, before anything else. At most about
`keep_bytes` are kept: half of that starts a flush of our own, and all of it makes writers wait for one. A flush that
failed is final (flushes.py). A server that cannot flush but can write through (FUA) is asked to write through; then
nothing needs to be kept.

**A silent server**, which is connected but sends nothing, is waited for without limit: a far disk may hang, and its
guest must see no error. Over TCP that ends when its host has accepted nothing for 20 s, since it may have vanished
(dial.py). Only with `silence_s` a request is `Busy` once no byte came for that long, and so are all that follow.

A new connection is taken only if the server still offers what it did: size, block sizes, transmission flags, and the
disk, which a server of ours names. If it then refuses to write again what it had acknowledged (it may be full by now),
that counts as a failed flush: acknowledged data is lost. The connection is used all the same, so that the image can be
read.

One thing cannot be known: whether a server that lost us is still busy with a request of the old connection. Such a
write may come after a later one to the same place. A server that died has no such ghosts. Where we break off ourselves,
we wait a moment for the old connection's end. `doubts` has the ranges that may have a ghost, whether their request
was done again or failed (doubts.py).
"""

from __future__ import annotations

import errno
import itertools
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from lmdbitmap.errors import Busy, LmdbitmapError
from lmdbitmap.nbd import protocol as nbd
from lmdbitmap.nbd.client.doubts import Doubts
from lmdbitmap.nbd.client.errors import failure, refusal, require_answer, words
from lmdbitmap.nbd.client.flushes import Flushes
from lmdbitmap.nbd.client.handshake import require_same
from lmdbitmap.nbd.client.link import AWAY, SILENT, Call, Link, Request
from lmdbitmap.nbd.client.unflushed import CHANGES, Unflushed
from lmdbitmap.nbd.client.windows import apart, of_a_kind
from lmdbitmap.work import forks

log = logging.getLogger(__name__)

_FIRST_PAUSE_S: Final = 0.02
_LONGEST_PAUSE_S: Final = 1.0


class Conversation:
    """Requests to one export, from any thread. `connect` makes a connection, now and whenever one has broken.

    Only the leading thread reads or changes what is marked as the leader's. It hands the lead on under `_state`, so
    that the next leader sees its changes.
    """

    def __init__(
        self,
        connect: Callable[[], Link],
        name: str,
        *,
        reconnect_s: float,
        keep_bytes: int,
        silence_s: float | None = None,
    ) -> None:
        self._connect = connect
        self._name = name
        self._reconnect_s = reconnect_s
        self._keep_bytes = keep_bytes
        self._silence_s = silence_s
        self._is_silent = False
        """Once set, it stays set. The leader's."""
        self._state = threading.Lock()
        self._cookies = itertools.count(1)
        """Under `_state`."""
        self._waiting: dict[int, Request] = {}
        """Unanswered requests by cookie. Changed under `_state`; the leader reads it without, to look up answers."""
        self._leader: Call | None = None
        """The call whose thread receives for all. Under `_state`."""
        self._closing = threading.Event()
        self._outage_since = math.inf
        """When the trouble began; infinity while there is none. Under `_state`. Each new request copies it."""
        self._pause_s = 0.0
        """Seconds between the next trouble and the dial after it. The leader's."""
        self._next_dial = 0.0
        """Earliest time of the next dial. The leader's."""
        self._kept = Unflushed()
        """Changed by the leader, under `_state`. The leader, and a check that needs a rough size, read it without."""
        self._making_room = threading.Lock()
        """Held by the writer that flushes because too much is kept; the others wait, and find room afterwards."""
        self.flushes = Flushes(self, name)
        """It has a lock of its own."""
        self.doubts = Doubts()
        """What may change yet because of a connection that was lost. Added to under `_state`; read without a lock."""
        self._link: Link | None = connect()
        """None while there is none. The leader changes it under `_state` and reads it without; at the end `close` does,
        without a leader.
        """
        self._next_link: Link | None = None
        """A new connection on which requests in flight are done before others may send. Changed by the leader."""
        self.export = self._link.export
        self._keeps = self.export.has(nbd.NBD_FLAG_SEND_FLUSH)
        """Whether acknowledged changes are kept until a flush."""
        forks.is_not_for_children(self)

    # -- the caller's thread -------------------------------------------------------------------------------

    def do(self, requests: Sequence[Request]) -> None:
        """Send the requests, and return when all are answered; each one's `error` says how.

        At most `WINDOW`, all of one kind, none of them a flush (see `flush`).
        """
        if self._kept.byte_count > self._keep_bytes // 2 and requests[0].command in CHANGES:
            self._make_room()
        self.ask(requests)

    def flush(self) -> None:
        """Return after everything acknowledged before is on stable storage. Raises `OSError`.

        The failure is final, unless it is `FarAway`.
        """
        flush = self.flushes.flush()
        if flush.error:
            raise self.failure(flush)

    def failure(self, request: Request) -> OSError | Busy:
        """The exception that the caller gets for a failed request."""
        return failure(request.error, self._name, self._silence_s)

    def close(self) -> None:
        """Say goodbye to the server. Nothing may be in flight; what was not flushed may be lost."""
        self._closing.set()
        with self._state:
            link, self._link = self._link, None
        if link is not None:
            link.say_goodbye()

    def interrupt(self) -> None:
        """Fail all requests in flight, and all that follow, so that no thread waits any more.

        A dial that is under way ends by itself, in seconds. No lock is needed: a new connection is stored before
        `_closing` is checked.
        """
        self._closing.set()
        for link in (self._next_link, self._link):
            if link is not None:
                link.hang_up()

    def forsake(self) -> None:
        """Give up the connection in a forked child, which would take the parent's answers. Locks are made anew."""
        self._state, self._making_room, self._closing = threading.Lock(), threading.Lock(), threading.Event()
        self.flushes = Flushes(self, self._name)
        self._closing.set()
        for link in (self._next_link, self._link):
            if link is not None:
                link.forsake()
        self._link = None

    # -- what flushes.py uses too -------------------------------------------------------------------

    def ask(self, requests: Sequence[Request]) -> None:
        """Like `do`, but for any request, and however much is kept."""
        call = Call(len(requests))
        try:
            self.post(call, requests)
            self.wait_for(call, requests)
        except BaseException:  # also between the two
            self._abandon(call, requests)
            raise

    def wait_for(self, call: Call, requests: Sequence[Request]) -> None:
        """Return when all requests posted as this call are answered. For one thread."""
        try:
            while call.left:
                self._lead_or_wait(call)
        except BaseException:
            self._abandon(call, requests)
            raise

    def is_unanswered(self, request: Request) -> bool:
        with self._state:
            return request.cookie in self._waiting

    def post(self, call: Call, requests: Sequence[Request]) -> None:
        """Send the requests, if not now then on the next connection. Interrupted, it forgets them: see `_abandon`."""
        try:
            link = self._put_in_flight(call, requests)
            if link is not None:
                link.post(requests)
        except BaseException:
            self._abandon(call, requests)
            raise

    def _put_in_flight(self, call: Call, requests: Sequence[Request]) -> Link | None:
        """Note what is about to be sent; return the connection to send it on, if there is one."""
        with self._state:
            if self._closing.is_set():
                raise OSError(errno.EBADF, "the image is closed")
            for request in requests:
                request.cookie = next(self._cookies)
                request.call = call
                request.link = self._link
                request.since = self._outage_since
                request.mark = self._kept.mark
                self._waiting[request.cookie] = request
            return self._link

    def _lead_or_wait(self, call: Call) -> None:
        with self._state:
            call.listens = True
            if self._leader is None and call.left:
                self._leader = call
            leads = self._leader is call
        if leads:
            self._lead(call)
        elif call.left:
            call.turn.acquire()

    def _abandon(self, call: Call, requests: Sequence[Request]) -> None:
        """Forget the requests of an interrupted caller: a late answer must not be taken for that of another request.

        What was not sent is in doubt too: a thread that connects again may be about to send it.
        """
        with self._state:
            left = [request for request in requests if request.cookie in self._waiting]
            self._doubt(left)  # first: `ask` calls this again if it is interrupted
            for request in left:
                del self._waiting[request.cookie]
            link = self._link
            if self._leader is call:
                self._hand_on()
        if link is not None and left:
            link.hang_up()

    # -- the leader ----------------------------------------------------------------------------------------

    def _lead(self, call: Call) -> None:
        try:
            while call.left:
                link = self._link
                if link is None:
                    self._reconnect()
                else:
                    self._receive(link)
        except BaseException as interruption:
            if (link := self._link) is not None:
                self._lose(link, interruption)
            raise
        with self._state:
            self._hand_on()

    def _hand_on(self) -> None:
        """Hand on the lead, with `_state` held. A thread that still sends will ask for the lead when it is done."""
        calls = (request.call for request in self._waiting.values())
        self._leader = next((call for call in calls if call is not None and call.listens), None)
        if self._leader is not None:
            self._leader.turn.release()

    def _receive(self, link: Link) -> None:
        try:
            request = link.receive(self._waiting)
            if request is not None:
                self._finish(request)
        except (OSError, LmdbitmapError) as broken:
            self._lose(link, broken)

    def _finish(self, request: Request) -> None:
        """Take note of an answer. For the leader."""
        require_answer(request)
        if request.command == nbd.NBD_CMD_FLUSH:
            self.flushes.judge(request)
        elif request.error and request.command in CHANGES and not self._keeps:
            self.flushes.judge_written_through(request)
        self._pause_s = 0.0
        with self._state:
            self._outage_since = math.inf
            if request.error == 0 and self._keeps:
                self._kept.note(request)
            self._conclude(request)

    def _conclude(self, request: Request) -> None:
        """Called with `_state` held."""
        if self._waiting.pop(request.cookie, None) is None or request.call is None:
            return
        call = request.call
        call.left -= 1
        if call.left == 0 and call is not self._leader:
            call.turn.release()

    def _make_room(self) -> None:
        """Start a flush, or wait for one. Raise `OSError` if it fails: then no more data may be acknowledged."""
        if self._kept.byte_count <= self._keep_bytes:
            self.flushes.begin_one()
            return
        with self._making_room:
            if self._kept.byte_count > self._keep_bytes:
                self.flush()

    # -- when the connection breaks ------------------------------------------------------------------------

    def _lose(self, link: Link, why: BaseException) -> None:
        if self._silence_s is not None and isinstance(why, TimeoutError):
            self._is_silent = True
        with self._state:
            self._link = None
            self._doubt(request for request in self._waiting.values() if request.link is link)
        link.part()
        self._note_trouble(why)

    def _doubt(self, sent: Iterable[Request]) -> None:
        """Add their ranges to the doubts before any of them ends, so that its caller finds it there. Under `_state`."""
        self.doubts.add(
            (request.offset, request.offset + request.length)
            for request in sent
            if request.command in CHANGES
        )

    def _note_trouble(self, why: BaseException) -> None:
        """Fail requests in trouble for too long; the rest are tried again, a little later each time. For the leader."""
        now = time.monotonic()
        self._next_dial = now + self._pause_s
        self._pause_s = min(max(2 * self._pause_s, _FIRST_PAUSE_S), _LONGEST_PAUSE_S)
        with self._state:
            if self._outage_since == math.inf:
                self._outage_since = now
                if self._reconnect_s:
                    log.warning("%s: %s; trying again for %g s", self._name, words(why), self._reconnect_s)
            for request in self._waiting.values():
                request.since = min(request.since, now)
        self._fail_those_since(time.monotonic() - self._reconnect_s, why)

    def _fail_those_since(self, last_start: float, why: object) -> None:
        with self._state:
            lost = [request for request in self._waiting.values() if request.since <= last_start]
            for request in lost:
                request.error = SILENT if self._is_silent else AWAY
                self._conclude(request)
        if lost and self._reconnect_s:  # else the caller gets the error at once
            log.error("%s: %d requests failed: %s", self._name, len(lost), words(why))

    def _reconnect(self) -> None:
        """Dial once more when it is time. Fail the requests that cannot wait until then."""
        if self._is_silent:
            self._fail_those_since(math.inf, "the server is silent")
            return
        self._closing.wait(max(0.0, min(self._next_dial, self._patience_ends()) - time.monotonic()))
        now = time.monotonic()
        if self._closing.is_set():
            self._fail_those_since(math.inf, "the image was closed")
            return
        if now < self._next_dial:
            self._fail_those_since(now - self._reconnect_s, "the server has not come back")
            return
        try:
            self._take_on()
        except (OSError, LmdbitmapError) as why:
            self._note_trouble(why)

    def _take_on(self) -> None:
        """Make a new connection and take it on; part from it on any error."""
        try:
            self._next_link = self._connect()
            require_same(self.export, self._next_link.export)
            self._catch_up(self._next_link)
        finally:
            link, self._next_link = self._next_link, None
            if link is not None and link is not self._link:
                link.part()

    def _patience_ends(self) -> float:
        with self._state:
            since = min((request.since for request in self._waiting.values()), default=math.inf)
        return since + self._reconnect_s

    def _catch_up(self, link: Link) -> None:
        """Write the kept changes again, do the requests in flight, and only then let other threads send."""
        if self._closing.is_set():
            raise OSError(errno.EBADF, "the image is closed")
        self._write_again(link, self._kept.changes())
        while todo := self._not_sent(link):
            for window in of_a_kind(todo):
                self._exchange(link, window, self._waiting, self._finish)

    def _write_again(self, link: Link, kept: Sequence[Request]) -> None:
        waiting = {change.cookie: change for change in kept}
        for window in apart(kept):
            self._exchange(link, window, waiting, require_answer)
        refused = [change for change in kept if change.error]
        done = len(kept) - len(refused)
        log.warning("%s: connected again; %d writes were written again", self._name, done)
        if refused:
            self._give_up(refused)
        with self._state:  # one is in flight still, if the leader was interrupted when it took note of it
            for change in kept:
                self._conclude(change)

    def _give_up(self, refused: Sequence[Request]) -> None:
        """Note that the server refuses these changes; a discard was only advice.

        They may be done, undone, or half done, and stay kept: another connection may accept them.
        """
        why = words(refusal(refused[0].error, self._name))
        log.error("%s: %d writes that were acknowledged are refused now: %s", self._name, len(refused), why)
        with self._state:
            self._doubt(refused)
        for change in refused:
            if change.command != nbd.NBD_CMD_TRIM:
                self.flushes.lose(change.error)

    def _not_sent(self, link: Link) -> list[Request]:
        """Requests not yet sent on `link`. If there are none, `link` becomes the connection."""
        with self._state:
            todo = [request for request in self._waiting.values() if request.link is not link]
            if not todo:
                self._link = link
        return todo

    def _exchange(
        self,
        link: Link,
        window: Sequence[Request],
        waiting: dict[int, Request],
        finish: Callable[[Request], None],
    ) -> None:
        """Send requests and receive their answers, alone on a new connection."""
        for request in window:
            request.link = link
        left = len(window)
        try:
            link.post(window)
            while left:
                answered = link.receive(waiting)
                if answered is not None:
                    finish(answered)
                    waiting.pop(answered.cookie, None)  # `finish` removed it from `_waiting` already
                    left -= 1
        finally:
            if left:
                with self._state:
                    self._doubt(window)
