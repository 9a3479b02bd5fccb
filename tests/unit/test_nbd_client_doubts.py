from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lmdbitmap.nbd.client.doubts import Doubts

few_runs = st.lists(st.tuples(st.integers(0, 300), st.integers(0, 20)), max_size=8)


@given(batches=st.lists(few_runs, max_size=6))
def test_few_ranges_are_just_what_was_added(batches: list[list[tuple[int, int]]]) -> None:
    doubts, model = Doubts(), set[int]()
    for batch in batches:
        doubts.add((start, start + length) for start, length in batch)
        model.update(byte for start, length in batch for byte in range(start, start + length))
        assert {byte for start, stop in doubts.runs for byte in range(start, stop)} == model
        assert all(one[1] < other[0] for one, other in zip(doubts.runs, doubts.runs[1:], strict=False))


@given(starts=st.lists(st.integers(0, 1 << 62), min_size=1, max_size=60))
def test_of_too_many_ranges_there_are_fewer_and_wider_ones_that_miss_nothing(starts: list[int]) -> None:
    doubts = Doubts(most=5)
    for start in starts:
        doubts.add([(start, start + 4096)])
        assert 1 <= len(doubts.runs) <= 5
    assert all(any(low <= start and start + 4096 <= high for low, high in doubts.runs) for start in starts)


def test_runs_that_were_taken_do_not_change() -> None:
    doubts = Doubts()
    doubts.add([(0, 5)])
    taken = doubts.runs
    doubts.add([(5, 9)])
    assert (list(taken), list(doubts.runs)) == ([(0, 5)], [(0, 9)])
