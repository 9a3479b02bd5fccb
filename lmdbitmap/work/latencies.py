"""How long things took: counts in buckets that double, so that counting one costs a bit_length and an addition.

Bucket 0 counts what took less than 1 µs, bucket i what took from 2**(i-1) to less than 2**i µs, the last one all
that took longer. A percentile is known as the end of its bucket, so it says "at most", and may be twice too much.
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
    """Where a bucket ends, in microseconds; None for the last, which has no end."""
    return 1 << bucket if bucket < _LAST else None


@dataclass
class Latencies:
    """Counted by one thread, or under a lock; read by any, who may miss what is being counted."""

    counts: list[int] = field(default_factory=lambda: [0] * BUCKETS)
    total_ns: int = 0
    max_ns: int = 0

    def count(self, duration_ns: int) -> None:
        self.counts[min((duration_ns // 1000).bit_length(), _LAST)] += 1
        self.total_ns += duration_ns
        if duration_ns > self.max_ns:
            self.max_ns = duration_ns

    def percentile_ns(self, percent: int) -> int:
        """At most so long took `percent` of them; 0 where nothing was counted."""
        rank = ceil_div(sum(self.counts) * percent, 100)
        bucket = next(number for number, seen in enumerate(accumulate(self.counts)) if seen >= rank)
        end_us = bound_us(bucket)
        return self.max_ns if end_us is None else min(end_us * 1000, self.max_ns)

    def facts(self) -> dict[str, object]:
        """As the control socket and `info --json` tell it."""
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
    """All that was counted in any of them."""
    counts, total_ns, max_ns = [0] * BUCKETS, 0, 0
    for part in parts:
        counts = _added(counts, part.counts)
        total_ns += part.total_ns
        max_ns = max(max_ns, part.max_ns)
    return Latencies(counts, total_ns, max_ns)


def _added(left: Sequence[int], right: Sequence[int]) -> list[int]:
    return [one + other for one, other in zip(left, right, strict=True)]
