"""What is served, who is there, and who may come in: disks, and the places of clients at them.

Places are counted separately, so that a client cannot take those of an unrelated one:

- A client that has not chosen an export yet is a newcomer. Each listener has room for `max_newcomers`. One more takes
  the place of the oldest newcomer, which is cut off. So a client that never finishes its handshake cannot block a
  listener.
- An export has room for `max_connections` clients that connected by themselves, and for as many that its owner handed
  over (`Server.take_in`), such as a backup's connections. One more is refused. A client whose host vanished loses its
  place in time (keepalive.py).

Disks and clients share one lock: a disk that is removed knows all of its clients, and gets no new one.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Mapping
from typing import Final, NamedTuple

from lmdbitmap.errors import AlreadyExists, Busy
from lmdbitmap.interfaces import ServedDisk
from lmdbitmap.nbd.server.traffic import NO_TRAFFIC, Traffic, summed
from lmdbitmap.nbd.server.visit import Visit

_BESIDE: Final = ""
"""Key under which past traffic of all disks that come and go is counted; no disk has that name."""


class Counters(NamedTuple):
    """What a server did so far. `connections` were admitted, newcomers too; `connected` of them are there now."""

    connections: int
    connected: int
    turned_away: int
    requests: int
    bytes_received: int
    bytes_sent: int


class Places:
    """The disks of a server by their names, its clients, and what these did so far. For any thread."""

    def __init__(self, disks: Mapping[str, ServedDisk], max_connections: int, max_newcomers: int) -> None:
        self.residents: Final = dict.fromkeys(disks)
        """Names of the disks that are there from the start; others come and go."""
        self.closed = False
        """Whether nobody is let in any more. Set without the lock, also by signal handlers."""
        self._max_connections = max_connections
        self._max_newcomers = max_newcomers
        self._lock = threading.Lock()
        self._disks = dict(disks)
        self._private: set[str] = set()
        self._visits: dict[Visit, None] = {}
        """In order of arrival."""
        self._connections = 0
        self._turned_away = 0
        self._past_traffic = dict.fromkeys([*disks, _BESIDE], NO_TRAFFIC)

    # -- disks ---------------------------------------------------------------------------------------------

    def add(self, name: str, disk: ServedDisk, *, private: bool) -> None:
        """Raises `AlreadyExists` if the name is taken."""
        with self._lock:
            if name in self._disks:
                raise AlreadyExists(f"{name!r} is served already", next_step="choose another name")
            self._disks[name] = disk
            if private:
                self._private.add(name)

    def remove(self, name: str, disk: ServedDisk) -> None:
        """Take a disk away, and cut its clients off. Does nothing if the name belongs to another disk by now."""
        with self._lock:
            if self._disks.get(name) is not disk:
                return
            del self._disks[name]
            self._private.discard(name)
            visits = self._at(name)
        for visit in visits:
            visit.cut_off()

    def retire(self, name: str) -> None:
        """Take away a resident. Raise `Busy` while a client is connected to it."""
        with self._lock:
            clients = len(self._at(name))
            if clients:
                raise Busy(
                    f"disk {name!r} has {clients} {'client' if clients == 1 else 'clients'}",
                    next_step="shut the guest down, or disconnect who uses the disk, and try again",
                )
            self._disks.pop(name, None)

    def disks(self, *, private: bool) -> dict[str, ServedDisk]:
        """Return what is served now, with or without the private disks."""
        with self._lock:
            return {name: disk for name, disk in self._disks.items() if private or name not in self._private}

    # -- clients -------------------------------------------------------------------------------------------

    def admit(self, visit: Visit) -> bool:
        """Admit a visit as a newcomer. Those let go leave within a moment; until then twice the limit may be there."""
        with self._lock:
            if self.closed or len(self._newcomers(visit.door)) >= 2 * self._max_newcomers:
                self._turned_away += 1
                return False
            self._visits[visit] = None
            self._connections += 1
            return True

    def make_room(self, door: object) -> None:
        """Let the oldest newcomer of this door go if there are too many."""
        with self._lock:
            staying = [visit for visit in self._newcomers(door) if not visit.is_let_go]
            if len(staying) <= self._max_newcomers:
                return
            staying[0].let_go()
            self._turned_away += 1
        staying[0].has_no_room("it had not chosen a disk, and other clients needed its place")

    def enter(self, visit: Visit, name: str) -> bool:
        """Return whether a newcomer gets a place at this export."""
        with self._lock:
            if visit.is_let_go or name not in self._disks:
                return False
            alike = sum((other.door is None) == (visit.door is None) for other in self._at(name))
            if alike < self._max_connections:
                visit.export_name = name
                return True
            self._turned_away += 1
        visit.has_no_room(f"{alike} are connected already", disk=name)
        return False

    def forget(self, visit: Visit) -> None:
        with self._lock:
            self._visits.pop(visit, None)
            if visit.export_name is not None:
                name = visit.export_name if visit.export_name in self.residents else _BESIDE
                self._past_traffic[name] = summed([self._past_traffic[name], visit.traffic])

    def visits(self) -> list[Visit]:
        """Return who is there, in order of arrival."""
        with self._lock:
            return list(self._visits)

    def _newcomers(self, door: object) -> list[Visit]:
        """Visits through this door that have no place at an export, in order of arrival. Under the lock."""
        return [visit for visit in self._visits if visit.door is door and visit.export_name is None]

    def _at(self, name: str) -> list[Visit]:
        """Under the lock."""
        return [visit for visit in self._visits if visit.export_name == name]

    # -- what they did -------------------------------------------------------------------------------------

    def counters(self) -> Counters:
        with self._lock:
            carried = summed([*self._past_traffic.values(), *(visit.traffic for visit in self._visits)])
            return Counters(
                self._connections, len(self._visits), self._turned_away,
                carried.requests, carried.bytes_received, carried.bytes_sent,
            )  # fmt: skip

    def traffic(self, name: str) -> tuple[int, Traffic]:
        """Number of clients connected to a resident now, and the traffic of all it ever had."""
        with self._lock:
            present = [visit.traffic for visit in self._at(name)]
            return len(present), summed([self._past_traffic[name], *present])

    def traffic_of_all(self) -> dict[str, tuple[int, Traffic]]:
        """`traffic` of every resident, looking at each client only once."""
        present: dict[str | None, list[Traffic]] = defaultdict(list)
        with self._lock:
            for visit in self._visits:
                present[visit.export_name].append(visit.traffic)
            return {
                name: (len(present[name]), summed([self._past_traffic[name], *present[name]]))
                for name in self.residents
            }

    def requests_of_residents(self) -> int:
        """Requests of all clients that residents have and had."""
        with self._lock:
            past = sum(self._past_traffic[name].requests for name in self.residents)
            return past + sum(visit.requests for visit in self._visits if visit.export_name in self.residents)

    def forsake(self) -> None:
        """Close the clients' sockets in a forked child. The lock is made anew: its holder's thread is not here."""
        visits, self._visits = self._visits, {}
        for visit in visits:
            visit.forsake()
        self._lock, self.closed = threading.Lock(), True
