"""Latency histogram: counts in buckets that double, so that counting one costs a bit_length and an addition.

Bucket 0 counts durations below 1 µs, bucket i those from 2**(i-1) to below 2**i µs, and the last bucket all longer
ones. A percentile is reported as the end of its bucket: an upper bound that may be twice the true value.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Final

from lmdbitmap.geometry import ceil_div

BUCKETS: Final = 28
"""The last but one ends at 2**26 µs, 67 s."""
_LAST: Final = BUCKETS - 1


def bound_us(bucket: int) -> int | None:
    """Return where a bucket ends, in microseconds; None for the last, which has no end."""
    return 1 << bucket if bucket < _LAST else None


@dataclass
class Latencies:
    """Counted by one thread or under a lock. Any thread may read it, and may miss a count in progress."""

    counts: list[int] = field(default_factory=lambda: [0] * BUCKETS)
    total_ns: int = 0
    max_ns: int = 0

    def count(self, duration_ns: int) -> None:
        self.counts[min((duration_ns // 1000).bit_length(), _LAST)] += 1
        self.total_ns += duration_ns
        if duration_ns > self.max_ns:
            self.max_ns = duration_ns

    def percentile_ns(self, percent: int) -> int:
        """Return an upper bound of the given percentile; 0 if nothing was counted."""
        rank = ceil_div(sum(self.counts) * percent, 100)
        bucket = next(number for number, seen in enumerate(accumulate(self.counts)) if seen >= rank)
        end_us = bound_us(bucket)
        return self.max_ns if end_us is None else min(end_us * 1000, self.max_ns)

    def facts(self) -> dict[str, object]:
        """Return the map that the control socket and `info --json` print."""
        counts = list(self.counts)
        return {
            "count": sum(counts),
            "total_ns": self.total_ns,
            "max_ns": self.max_ns,
            "p50_ns": self.percentile_ns(50),
            "p99_ns": self.percentile_ns(99),
            "buckets": counts,
        }


def together(parts: Iterable[Latencies]) -> Latencies:
    """Return the sum of `parts`."""
    counts, total_ns, max_ns = [0] * BUCKETS, 0, 0
    for part in parts:
        counts = _added(counts, part.counts)
        total_ns += part.total_ns
        max_ns = max(max_ns, part.max_ns)
    return Latencies(counts, total_ns, max_ns)


def _added(left: Sequence[int], right: Sequence[int]) -> list[int]:
    return [one + other for one, other in zip(left, right, strict=True)]
