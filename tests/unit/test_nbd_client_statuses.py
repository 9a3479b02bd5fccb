"""Statuses of long ranges, from servers that answer in every way they may; a naive map of the disk beside it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest

from lmdbitmap.nbd import protocol as nbd
from lmdbitmap.nbd.client import statuses as client_statuses
from lmdbitmap.nbd.client.link import Request
from lmdbitmap.nbd.client.statuses import statuses

CHUNK = 100
SIZE = 20_000


class Far:
    """A disk of runs of `run_bytes`, alternately 0 and 3; `most` descriptors to an answer. Counts its batches."""

    def __init__(self, run_bytes: int, most: int = 1 << 17, beyond: bool = False) -> None:
        self.flags = [3 * (at // run_bytes % 2) for at in range(SIZE + CHUNK)]
        self.most = most
        self.beyond = beyond
        self.batches: list[int] = []

    def ask(self, requests: Sequence[Request]) -> None:
        self.batches.append(len(requests))
        for request in requests:
            answer = self.answer(request.offset, request.length)
            request.statuses = answer[: request.most_extents * nbd.BLOCK_DESCRIPTOR.size]

    def answer(self, offset: int, length: int) -> bytes:
        assert 0 < length <= CHUNK
        runs: list[list[int]] = []
        for at in range(offset, offset + length + (50 if self.beyond else 0)):
            if runs and runs[-1][1] == self.flags[at]:
                runs[-1][0] += 1
            elif at < offset + length:
                runs.append([1, self.flags[at]])
            else:
                break
        return b"".join(nbd.BLOCK_DESCRIPTOR.pack(*run) for run in runs[: self.most])


def flags_of(ask: Callable[[Sequence[Request]], None], start: int, stop: int) -> list[int]:
    found: list[int] = []
    for length, flags in statuses(ask, start, stop, CHUNK):
        assert length > 0
        found += [flags] * length
    return found


@pytest.mark.parametrize("most", [1, 3, 1 << 17])
@pytest.mark.parametrize("beyond", [False, True])
@pytest.mark.parametrize("run_bytes", [1, 7, 90, 1000, SIZE])
def test_they_are_those_of_the_disk(run_bytes: int, beyond: bool, most: int) -> None:
    chosen = random.Random(run_bytes)
    for _ in range(5):
        far = Far(run_bytes, most, beyond)
        start = chosen.randrange(SIZE)
        stop = min(start + chosen.randrange(3000), SIZE)
        assert flags_of(far.ask, start, stop) == far.flags[start:stop]


def test_more_and_more_questions_travel_together_while_answers_are_short() -> None:
    far = Far(SIZE)
    flags_of(far.ask, 0, SIZE)
    assert far.batches == [1, 2, 4, 8, 16, 32, 64, 64, 9]


def test_long_answers_come_one_by_one() -> None:
    far = Far(2)
    flags_of(far.ask, 0, SIZE)
    assert set(far.batches) == {1}


@pytest.mark.parametrize("most", [1, 64, 100, 1000])
def test_answers_to_questions_that_travel_together_are_no_more_to_hold_than_one(
    monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """A disk that is alike for long at first, so that many are asked at once, and changes everywhere then."""
    monkeypatch.setattr(client_statuses, "MOST_EXTENTS", most)
    monkeypatch.setattr(client_statuses, "_MOST_QUESTIONS", min(64, most))
    far, held = Far(SIZE), list[int]()
    far.flags[SIZE // 2 :] = [3 * (at % 2) for at in range(SIZE // 2, len(far.flags))]

    def ask(requests: Sequence[Request]) -> None:
        far.ask(requests)
        held.append(sum(len(list(request.extents())) for request in requests))

    assert flags_of(ask, 0, SIZE) == far.flags[:SIZE]
    assert max(held) <= most


def test_server_that_answers_a_part_is_not_asked_for_more_than_it_answers() -> None:
    far = Far(SIZE, beyond=False)
    far.answer = lambda offset, length: nbd.BLOCK_DESCRIPTOR.pack(min(length, 60), 0)  # type: ignore[method-assign]
    assert len(flags_of(far.ask, 0, 1000)) == 1000
    assert set(far.batches) == {1}


def test_an_error_ends_it_where_it_is() -> None:
    far = Far(90)

    def ask(requests: Sequence[Request]) -> None:
        far.ask(requests)
        for request in requests:
            request.error = nbd.NBD_EIO if request.offset >= 500 else 0

    assert flags_of(ask, 0, SIZE) == far.flags[:500]


def test_no_answer_ends_it() -> None:
    assert flags_of(lambda requests: None, 0, SIZE) == []


def test_nothing_is_asked_of_nothing() -> None:
    far = Far(SIZE)
    assert flags_of(far.ask, 7, 7) == []
    assert far.batches == []
