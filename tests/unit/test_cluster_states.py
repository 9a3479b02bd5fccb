"""States of clusters, beside a plain list of them."""

from __future__ import annotations

import random

import pytest

from lmdbitmap.tracker.cluster_states import FIRST_SLOT, LOOK_CLUSTERS, UNTOUCHED, ZERO, ClusterStates


def listed(states: ClusterStates, start: int, stop: int) -> list[int]:
    found: list[int] = []
    position = start
    for state, first, last in states.runs(start, stop):
        assert first == position < last
        slots = range(state, state + last - first)
        found += slots if state >= FIRST_SLOT else [state] * (last - first)
        position = last
    assert position == stop
    return found


@pytest.mark.parametrize("seed", range(5))
def test_runs_are_what_was_set(seed: int) -> None:
    chosen, count = random.Random(seed), 2 * LOOK_CLUSTERS + 77
    states, naive = ClusterStates(count), [UNTOUCHED] * count
    for _ in range(50):
        start = chosen.randrange(count)
        length = min(chosen.choice([1, 3, 500]), count - start)
        some = [chosen.choice([ZERO, FIRST_SLOT + index, FIRST_SLOT + 7]) for index in range(length)]
        states.set(start, some)
        naive[start : start + length] = some
        first, last = sorted(chosen.choices(range(count + 1), k=2))
        last = min(last, first + LOOK_CLUSTERS)
        if first < last:
            assert listed(states, first, last) == naive[first:last]
            assert states.are_untouched(first, last) is not any(naive[first:last])


def test_no_cluster_of_a_huge_disk_is_looked_at_while_all_are_untouched() -> None:
    states = ClusterStates(1 << 30)
    assert list(states.runs(0, 1 << 30)) == [(UNTOUCHED, 0, 1 << 30)]
    states.set((1 << 30) - 1, [ZERO])
    assert states.are_untouched(0, (1 << 30) - LOOK_CLUSTERS)
    assert not states.are_untouched(0, 1 << 30)


def test_slots_that_do_not_follow_each_other_are_runs_of_their_own() -> None:
    states = ClusterStates(10)
    states.set(2, [FIRST_SLOT + 4, FIRST_SLOT + 5, FIRST_SLOT + 9, ZERO, ZERO])
    runs = list(states.runs(0, 8))
    assert runs == [
        (UNTOUCHED, 0, 2),
        (FIRST_SLOT + 4, 2, 4),
        (FIRST_SLOT + 9, 4, 5),
        (ZERO, 5, 7),
        (UNTOUCHED, 7, 8),
    ]
