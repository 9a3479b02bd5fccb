"""Status of the served disks: traffic, rates over the last seconds, and how long commits took.

The serving threads do nothing for this. A thread that is awake anyway calls `tick` every `TICK_S`. A rate is the
difference between now and the oldest tick kept.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from typing import Final, NamedTuple, TypeAlias

from lmdbitmap.filter import Filter
from lmdbitmap.nbd.server.server import Server
from lmdbitmap.nbd.server.traffic import KINDS, Traffic
from lmdbitmap.storage.measured import MeasuredStore
from lmdbitmap.work.latencies import Latencies

TICK_S: Final = 1.0
_TICKS: Final = 10

Facts: TypeAlias = dict[str, object]


class _Sample(NamedTuple):
    time_s: float
    traffic: Traffic
    commits: int


class Watch:
    """Watches the disks that `server` serves. `commits` are the latencies of each one's store, where measured."""

    def __init__(self, server: Server, commits: Mapping[str, Latencies]) -> None:
        self._server = server
        self._commits = commits
        self._ticks: dict[str, deque[_Sample]] = {name: deque(maxlen=_TICKS) for name in commits}
        self.tick()

    @classmethod
    def of(cls, server: Server, filters: Mapping[str, Filter]) -> Watch:
        """Watch those of the filters that the server serves."""
        served = server.traffic_of_all()
        return cls(server, {name: _commits(each) for name, each in filters.items() if name in served})

    def tick(self) -> None:
        self._server.quiet.look()
        traffic = self._server.traffic_of_all()
        for name, ticks in self._ticks.items():
            ticks.append(self._sample(name, traffic[name][1]))

    def facts(self, name: str) -> Facts | None:
        """The facts about a disk that docs/control.md lists; None if the disk is not watched."""
        if name not in self._ticks:
            return None
        connected, traffic = self._server.traffic(name)
        now = self._sample(name, traffic)
        return {
            "connections": {"now": connected, "ever": traffic.connections},
            "requests": dict(zip(KINDS, traffic.counts, strict=True)),
            "bytes": {"received": traffic.bytes_received, "sent": traffic.bytes_sent},
            "rates": _rates(self._ticks[name][0], now),
            "latencies": {
                "commit": self._commits[name].facts(),
                "flush": traffic.flushes.facts(),
                "batch": traffic.batches.facts(),
            },
        }

    def _sample(self, name: str, traffic: Traffic) -> _Sample:
        return _Sample(time.monotonic(), traffic, sum(self._commits[name].counts))


def _commits(attached: Filter) -> Latencies:
    """Return the latencies of the commits that its store measures; none if it measures none."""
    return attached.store.commits if isinstance(attached.store, MeasuredStore) else Latencies()


def _rates(before: _Sample, now: _Sample) -> Facts:
    """Rates per second; 0 if no time has passed."""
    seconds = now.time_s - before.time_s

    def rate(earlier: int, later: int) -> float:
        return round((later - earlier) / seconds, 3) if seconds > 0 else 0.0

    counts = map(rate, before.traffic.counts, now.traffic.counts)
    return {
        "seconds": round(seconds, 3),
        "requests": dict(zip(KINDS, counts, strict=True)),
        "received": rate(before.traffic.bytes_received, now.traffic.bytes_received),
        "sent": rate(before.traffic.bytes_sent, now.traffic.bytes_sent),
        "commits": rate(before.commits, now.commits),
    }
