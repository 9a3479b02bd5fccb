"""Which thread serves which connection: one thread serves all quick ones in turns, each other one has its own.

Every system call releases the interpreter's lock, and threads that fight for the lock lose more than they gain: four
busy connections in four threads got half as much done as one. So one thread, the driver, goes round: it waits for all
quick connections at once, and gives a turn to each that has sent something. In a turn it receives what is there, does
it, sends the replies, and waits for nothing.

There are as many threads as connections, and any of them may serve any connection:

    serve ──▶ alone ──▶ parked ──▶ next ──▶ driver ─┐
                ▲                                   │ a turn that waits,
                └───────────────────────────────────┘ or takes too long

Invariants:

- A connection is either in the rounds, or served by one thread alone. One thread at a time serves it.
- A turn never enters a wait that is known in advance. Before a connection waits for its client to read, for a flush, a
  long request or data that is not in memory, and after it waited for a commit, it gives notice. The driver then leaves
  the rounds to the next thread, and serves this connection alone from then on.
- Any other wait in a turn (a slow write, a gate that a checkpoint closed) holds up the others for at most `_PATIENCE_S`
  and a tick. The next thread watches the driver, and takes the rounds from one that makes no progress. A connection
  that was slow stays out of the rounds; the sooner it is slow again, the longer it stays out.
- While a connection is in the rounds, some thread is free to drive: each thread that is away serves exactly one
  connection alone.
- Of connections that are served alone at the same time none polls: long requests are mostly copied, which several
  threads can do at once if they leave the lock to each other.
- A disk without a descriptor may be slow at any time, and an encrypted socket cannot be polled for requests. Their
  connections never go round, nor does a connection that is the only one.
"""

from __future__ import annotations

import functools
import select
import threading
import time
from collections.abc import Callable
from typing import Final, TypeAlias

from lmdbitmap.nbd.server.connection import Connection
from lmdbitmap.nbd.server.receiving import Lookout

_PATIENCE_S: Final = 0.01
_TICK_S: Final = 0.005
_DOZE_AFTER_S: Final = 0.1
"""The next thread need not watch a driver that sleeps this long, until the driver wakes up."""
_FIRST_LEAVE_S: Final = 0.05
_LONGEST_LEAVE_S: Final = 1.6

Ended: TypeAlias = Callable[[Exception | None], None]
"""Called once a connection has ended, with the exception that ended it, or None after a goodbye."""


class _Rider:
    """A connection, and its state in the rounds."""

    __slots__ = ("alone", "connection", "ended", "failure", "fd", "leave_s", "returns_s", "waited")

    def __init__(self, connection: Connection, fd: int, ended: Ended, alone: bool) -> None:
        self.connection = connection
        self.fd = fd
        self.ended = ended
        self.alone = alone
        self.failure: Exception | None = None
        self.waited = False
        self.leave_s = _FIRST_LEAVE_S
        self.returns_s = -_LONGEST_LEAVE_S

    def take_leave(self, now_s: float) -> None:
        """Keep a slow connection out: the sooner after the last time it was slow, the longer."""
        again = now_s - self.returns_s < _LONGEST_LEAVE_S
        self.leave_s = min(2 * self.leave_s, _LONGEST_LEAVE_S) if again else _FIRST_LEAVE_S
        self.returns_s = now_s + self.leave_s


class Rounds:
    """Serves connections; each connection's thread calls `serve` once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._parked = threading.Condition(self._lock)
        self._next = threading.Condition(self._lock)
        self._has_next = False
        """Whether a thread is next and watches the driver; all other idle threads are parked. Under the lock."""
        self._next_dozes = False
        """See `_look_after_driver`."""
        self._poll = select.epoll()
        self._lookout = Lookout(self._look, self._poll.poll)
        self._riders: dict[int, _Rider] = {}
        self._connections = 0
        self._alone = 0
        """How many connections are served by a thread of their own. Changes under the lock."""
        self._driven = False
        """Whether a thread drives. Under the lock."""
        self._term = 0
        """How many terms have ended; a driver whose own term ended finds another number.

        It changes under the lock, and only while a turn is under way: between two turns the driver reads it without the
        lock.
        """
        self._at: _Rider | None = None
        """The connection whose turn it is; None between two turns, and once the driver's term has ended.

        The driver sets it without the lock. A thread that takes it away holds the lock.
        """
        self._since_s = 0.0
        """When that turn, or the last one, began. Set before `_at`: a new turn is never taken for a slow one."""

    def serve(self, connection: Connection, fd: int, ended: Ended, *, alone: bool = False) -> None:
        """Serve `connection`, which is heard at `fd`, until it or another one has ended.

        `ended` is called once `connection` has ended, perhaps in another thread. An `alone` connection never goes
        round.
        """
        mine = _Rider(connection, fd, ended, alone)
        connection.notice.to = functools.partial(self._step_aside, mine)
        with self._lock:
            self._connections += 1
        rider: _Rider | None = mine
        while rider is not None and self._serve_alone(rider):
            if self._join(rider):
                rider = self._drive(self._await_duty())
        with self._lock:
            self._connections -= 1

    # -- a connection for itself ---------------------------------------------------------------------------

    def _serve_alone(self, rider: _Rider) -> bool:
        """Serve a connection until it may go round. Return False when it has ended."""
        with self._lock:
            self._alone += 1
        try:
            while rider.connection.serve_some(polls=self._alone == 1):
                if self._may_join(rider):
                    return True
        except Exception as failure:
            rider.failure = failure
        finally:
            with self._lock:
                self._alone -= 1
        self._end(rider)
        return False

    def _may_join(self, rider: _Rider) -> bool:
        waited, rider.waited = rider.waited, False
        others = self._connections > 1
        return others and not waited and not rider.alone and time.monotonic() >= rider.returns_s

    def _join(self, rider: _Rider) -> bool:
        """Have a connection go round. Return False if the kernel has no room for that (its max_user_watches)."""
        with self._lock:
            self._riders[rider.fd] = rider  # first: the driver may hear it at once
            try:
                self._poll.register(rider.fd, select.EPOLLIN)
            except OSError:
                del self._riders[rider.fd]
                return False
        return True

    def _end(self, rider: _Rider) -> None:
        rider.connection.close()
        failure, rider.failure = rider.failure, None  # whose traceback leads to the rider, and to all it has
        rider.ended(failure)

    # -- driving -------------------------------------------------------------------------------------------

    def _drive(self, term: int) -> _Rider | None:
        """Go round until a turn ends this term. Return the connection of that turn, or None if it has ended."""
        while True:
            try:
                heard = self._lookout.wait()
            except MemoryError:  # nobody would drive in place of a thread that ended here
                time.sleep(_TICK_S)
                continue
            for fd, _ in heard:
                rider = self._riders[fd]
                if not self._give_turn(rider, term):
                    self._end(rider)
                    return None
                if self._term != term:
                    return rider

    def _give_turn(self, rider: _Rider, term: int) -> bool:
        """Give one turn; return whether its connection goes on."""
        goes_on = False
        self._since_s = time.monotonic()
        self._at = rider
        if self._next_dozes:
            self._wake_next()
        try:
            goes_on = rider.connection.turn()
        except Exception as failure:
            rider.failure = failure
        with self._lock:
            if self._term == term:
                self._at = None
                if not goes_on or self._connections == 1:
                    self._hand_over(rider)
        return goes_on

    def _look(self) -> list[tuple[int, int]] | None:
        return self._poll.poll(0) or None

    def _wake_next(self) -> None:
        with self._lock:
            self._next.notify()

    def _step_aside(self, rider: _Rider) -> None:
        """Let another thread drive if this one drives: the connection's next step may take long."""
        rider.waited = True
        if self._at is rider:  # a no without the lock is final: only this thread makes it a yes
            with self._lock:
                if self._at is rider:  # the next thread may have taken the rounds just now
                    self._hand_over(rider)

    def _hand_over(self, rider: _Rider) -> None:
        """End the driver's term; the connection belongs to that thread alone. Under the lock."""
        self._poll.unregister(rider.fd)
        del self._riders[rider.fd]
        self._at = None
        self._driven = False
        self._term += 1
        self._next.notify()

    # -- waiting for it ------------------------------------------------------------------------------------

    def _await_duty(self) -> int:
        """Wait until this thread has to drive; return its term."""
        with self._lock:
            while self._has_next:
                self._parked.wait()
            self._has_next = True
            while self._driven:
                self._look_after_driver()
            self._has_next = False
            self._parked.notify()
            self._driven = True
            return self._term

    def _look_after_driver(self) -> None:
        """Wait a tick, and take the rounds from a driver that makes no progress. Under the lock.

        A sleeping driver needs no watching. The driver announces a turn before it reads `_next_dozes`; the next thread
        sets `_next_dozes` before it looks for a turn. So at least one of the two notices the other.
        """
        self._next_dozes = True
        dozes = self._at is None and time.monotonic() - self._since_s > _DOZE_AFTER_S
        self._next_dozes = dozes
        self._next.wait(None if dozes else _TICK_S)
        self._next_dozes = False
        now_s = time.monotonic()
        if self._at is not None and now_s - self._since_s > _PATIENCE_S:
            self._at.take_leave(now_s)
            self._hand_over(self._at)
