"""Many threads in conversation with one far server: requests in flight, and what happens when it goes away.

**Who receives.** There is no thread of our own. Of the threads that wait for an answer one *leads*: it receives
for all, wakes those whose answers are whole, and hands the lead on when its own is. A lonely request costs no
change of threads that way. A thread that still sends does not lead: the server may wait for us to receive.

**When the connection breaks**, the leader dials again, and what was in flight is sent once more: reads, writes
at an offset, zeroes, trims and flushes may all be done twice. A request that was in trouble for `reconnect_s`
fails with ETIMEDOUT; after that each new one tries once, and fails at once while the server has not come back.

**A flush does not lie.** A server's death may take writes with it that it had acknowledged and not flushed, and
the flush that comes later, on a new connection, knows nothing of them. So what was acknowledged is kept until
a flush that was sent after it has succeeded, and on a new connection it is written again, in its order, before
anything else is. At most about `keep_bytes` are kept: half of that starts a flush of our own, and all of it
makes writers wait for one. That one failed is final (flushes.py). A server that cannot flush but write
through (FUA) is asked for that; then nothing needs to be kept.

**A server that is silent**, though it is there, is waited for as long as it likes: a far disk may hang, and its guest
is to see no error. Over TCP that ends when its host accepted nothing for 20 s (dial.py): it may have vanished. Only
with `silence_s` a request is `Busy` once no byte came for so long, and so are all that follow.

A new connection is taken only if the server still offers what it did: size, block sizes, transmission flags. Where it
then refuses to write again what it had acknowledged (it is full by now), that is a flush that failed: what was
promised is lost. The connection is used all the same, so that the image can be read.

What this cannot know: whether a server that lost us is still busy with a request of the old connection. Its
write may then come after a later one to the same place. A server that died has no such ghosts; where we break
off ourselves we wait a moment for the old connection's end. What may have such a ghost is told by `in_doubt`, whether
it was done again or failed (doubts.py).
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

from lmdbitmap.bits import Run
from lmdbitmap.errors import Busy, LmdbitmapError
from lmdbitmap.nbd import protocol as nbd
from lmdbitmap.nbd.client.doubts import Doubts
from lmdbitmap.nbd.client.errors import failure, refusal, require_answer, words
from lmdbitmap.nbd.client.flushes import Flushes
from lmdbitmap.nbd.client.handshake import require_same
from lmdbitmap.nbd.client.link import AWAY, SILENT, Call, Link, Request
from lmdbitmap.nbd.client.unflushed import CHANGES, Unflushed
from lmdbitmap.nbd.client.windows import apart, of_a_kind

log = logging.getLogger(__name__)

_FIRST_PAUSE_S: Final = 0.02
_LONGEST_PAUSE_S: Final = 1.0


class Conversation:
    """Requests to one export, by any thread. `connect` makes a connection, now and whenever one has broken.

    What is the leader's, only the thread that leads looks at or changes. It hands on the lead under `_state`, so that
    the next one finds what it did.
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
        """Once it is, for good. The leader's."""
        self._state = threading.Lock()
        self._cookies = itertools.count(1)
        """Under `_state`."""
        self._waiting: dict[int, Request] = {}
        """What is not answered, by its cookie. Changed under `_state`; the leader looks answers up in it without."""
        self._leader: Call | None = None
        """The one whose thread receives for all. Under `_state`."""
        self._closing = threading.Event()
        self._outage_since = math.inf
        """When the trouble began, or infinity while there is none. Under `_state`: each new request takes it over."""
        self._pause_s = 0.0
        """Between the next trouble and the dial after it. The leader's."""
        self._next_dial = 0.0
        """When, at the earliest. The leader's."""
        self._kept = Unflushed()
        """Changed by the leader, under `_state`; it reads without, and so does whoever asks roughly how much it is."""
        self._making_room = threading.Lock()
        """Held by the writer that flushes because too much is kept: the others wait, and find room afterwards."""
        self._flushes = Flushes(self, name)
        """With a lock of their own."""
        self._doubts = Doubts()
        """Added to under `_state`; whoever asks needs no lock."""
        self._link: Link | None = connect()
        """None while there is none. Changed under `_state`, by the leader, who reads it without; at the end by `close`,
        when nobody leads."""
        self._next_link: Link | None = None
        """One that is being taken on: what was in flight is done on it before others send. Changed by the leader."""
        self.export = self._link.export
        self._keeps = self.export.has(nbd.NBD_FLAG_SEND_FLUSH)
        """Whether what was acknowledged is kept until a flush."""

    # -- the caller's thread -------------------------------------------------------------------------------

    def do(self, requests: Sequence[Request]) -> None:
        """Return when all are answered; each one's `error` says how. At most `WINDOW`, all of one kind.

        None of them is a flush: for that see there.
        """
        if self._kept.byte_count > self._keep_bytes // 2 and requests[0].command in CHANGES:
            self._make_room()
        self.ask(requests)

    def flush(self) -> None:
        """Return after everything acknowledged before is on stable storage. Raises `OSError`.

        That is final, unless it is `FarAway`.
        """
        flush = self._flushes.flush()
        if flush.error:
            raise self.failure(flush)

    def require_sound(self) -> None:
        """Raise as a flush that failed for good did, if one did."""
        self._flushes.require_sound()

    def tell_of_loss(self, tell: Callable[[OSError], None]) -> None:
        """Have `tell` called, once, when a flush failed for good, by whichever thread hears of it first."""
        self._flushes.tell_of_loss = tell

    def failure(self, request: Request) -> OSError | Busy:
        """What the caller is told."""
        return failure(request.error, self._name, self._silence_s)

    def close(self) -> None:
        """Say goodbye. Nothing may be in flight; what was not flushed may be lost."""
        self._closing.set()
        with self._state:
            link, self._link = self._link, None
        if link is not None:
            link.say_goodbye()

    def interrupt(self) -> None:
        """Have whatever is in flight fail, and all that follows: whoever waits for it is to wait no more.

        A dial that is under way ends by itself, in seconds. No lock is needed: a connection is noted before it is asked
        whether all is over.
        """
        self._closing.set()
        for link in (self._next_link, self._link):
            if link is not None:
                link.hang_up()

    def in_doubt(self) -> Sequence[Run]:
        """Bytes, as (start, stop), that may change yet because of a connection that was lost."""
        return self._doubts.runs

    # -- what flushes.py uses too -------------------------------------------------------------------

    def ask(self, requests: Sequence[Request]) -> None:
        """As `do`, of anything, and whatever is kept."""
        call = Call(len(requests))
        try:
            self.post(call, requests)
        except BaseException:
            self._abandon(call, requests)
            raise
        self.wait_for(call, requests)

    def wait_for(self, call: Call, requests: Sequence[Request]) -> None:
        """Return when all that were posted as this call are answered. For one thread."""
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
        """Have them sent, if not now then on the next connection."""
        with self._state:
            if self._closing.is_set():
                raise OSError(errno.EBADF, "the image is closed")
            link = self._link
            for request in requests:
                request.cookie = next(self._cookies)
                request.call = call
                request.link = link
                request.since = self._outage_since
                request.mark = self._kept.mark
                self._waiting[request.cookie] = request
        if link is not None:
            link.post(requests)

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
        """The caller was interrupted: a late answer to it must not be taken for anything else."""
        with self._state:
            left = [self._waiting.pop(request.cookie, None) for request in requests]
            self._doubt(request for request in left if request is not None and request.link is not None)
            link = self._link
            if self._leader is call:
                self._hand_on()
        if link is not None and any(left):
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
        """Called with `_state` held. Whoever still sends will ask for the lead when it has done."""
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
        """It is answered. For the leader."""
        require_answer(request)
        if request.command == nbd.NBD_CMD_FLUSH:
            self._flushes.judge(request)
        elif request.error and request.command in CHANGES and not self._keeps:
            self._flushes.judge_written_through(request)
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
        """Start a flush, or wait for one. Raises `OSError` when it fails: more cannot be promised then."""
        if self._kept.byte_count <= self._keep_bytes:
            self._flushes.begin_one()
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
        """Called with `_state` held, before any of them ends: whoever was told of its end finds it in doubt."""
        self._doubts.add(
            (request.offset, request.offset + request.length)
            for request in sent
            if request.command in CHANGES
        )

    def _note_trouble(self, why: BaseException) -> None:
        """Fail what was in trouble for too long; the rest is tried again, a little later each time. For the leader."""
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
        if lost and self._reconnect_s:  # else whoever asked is told, at once
            log.error("%s: %d requests failed: %s", self._name, len(lost), words(why))

    def _reconnect(self) -> None:
        """Try once more, when it is time for it. What cannot wait for that fails."""
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
        """Have a new connection, or part from it, whatever ended it."""
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
        """Write again what was kept, do what is in flight, and only then let others send."""
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

    def _give_up(self, refused: Sequence[Request]) -> None:
        """They may have been done, undone, or half done, and are kept: another connection may take them. A discard was
        only advice."""
        why = words(refusal(refused[0].error, self._name))
        log.error("%s: %d writes that were acknowledged are refused now: %s", self._name, len(refused), why)
        with self._state:
            self._doubt(refused)
        for change in refused:
            if change.command != nbd.NBD_CMD_TRIM:
                self._flushes.lose(change.error)

    def _not_sent(self, link: Link) -> list[Request]:
        """What waits and is not yet sent on `link`; where nothing is, `link` is from now on the connection."""
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
                    waiting.pop(answered.cookie, None)  # from `_waiting` it is gone by now
                    left -= 1
        finally:
            if left:
                with self._state:
                    self._doubt(window)
