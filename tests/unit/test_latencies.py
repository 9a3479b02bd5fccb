"""Latencies in buckets that double: every duration is in one, and percentiles never say too little."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from lmdbitmap.work.latencies import BUCKETS, Latencies, bound_us, together

durations = st.lists(st.integers(0, 200 * 10**9), max_size=40)


def counted(values: list[int]) -> Latencies:
    found = Latencies()
    for value in values:
        found.count(value)
    return found


@given(durations)
def test_every_duration_is_in_the_first_bucket_that_ends_after_it(values: list[int]) -> None:
    ends = [float("inf") if (end := bound_us(bucket)) is None else end * 1000 for bucket in range(BUCKETS)]
    naive = [0] * BUCKETS
    for value in values:
        naive[next(bucket for bucket, end in enumerate(ends) if value < end)] += 1
    found = counted(values)
    assert found.counts == naive
    assert (found.total_ns, found.max_ns) == (sum(values), max(values, default=0))


@given(durations.filter(bool), st.integers(1, 100))
def test_a_percentile_is_the_true_one_or_at_most_twice_it(values: list[int], percent: int) -> None:
    true = sorted(values)[-(-len(values) * percent // 100) - 1]
    told = counted(values).percentile_ns(percent)
    assert true <= told <= max(values)
    assert told <= max(2 * true, 1000) or true >= (1 << 26) * 1000


@given(st.lists(durations, max_size=4))
def test_parts_together_are_the_whole(parts: list[list[int]]) -> None:
    assert together(map(counted, parts)) == counted(list(itertools.chain(*parts)))


def test_nothing_counted_is_nothing_told() -> None:
    assert Latencies().facts() == {
        "count": 0, "total_ns": 0, "max_ns": 0, "p50_ns": 0, "p99_ns": 0, "buckets": [0] * BUCKETS,
    }  # fmt: skip
