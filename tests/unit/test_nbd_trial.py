"""A trial finds the faster of two ways, keeps it for a while, and then looks again. The clock is the test's own."""

from __future__ import annotations

import random

import pytest

from lmdbitmap.nbd.server.trial import KEPT_WINDOWS, TRIES, WINDOW_BYTES, Trial


class Machine:
    """Sends at a speed that depends on the way; some of the time something else is in the way."""

    def __init__(self, first: float, other: float, seed: int = 0) -> None:
        self.rates = {True: first, False: other}
        self.now_s = 1000.0
        self.sent = {True: 0, False: 0}
        self._chosen = random.Random(seed)
        self.trial = Trial(lambda: self.now_s)

    def send(self, length: int) -> None:
        way = self.trial.prefers_first
        disturbed = 5 if self._chosen.random() < 0.01 else 1
        self.now_s += disturbed * length / self.rates[way]
        self.sent[way] += length
        self.trial.count(length)

    def send_windows(self, count: int, length: int = WINDOW_BYTES // 16) -> None:
        for _ in range(count * WINDOW_BYTES // length):
            self.send(length)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("first", "other"), [(9e9, 4e9), (4e9, 9e9), (1e9, 1.3e9)])
def test_nearly_all_goes_the_faster_way(first: float, other: float, seed: int) -> None:
    machine = Machine(first, other, seed)
    machine.send_windows(5 * (2 * TRIES + KEPT_WINDOWS))
    slower = machine.sent[first < other]
    assert slower == 5 * TRIES * WINDOW_BYTES


def test_first_way_is_kept_unless_the_other_one_is_clearly_faster() -> None:
    machine = Machine(1.00e9, 1.02e9)
    machine.send_windows(2 * TRIES)
    assert machine.trial.prefers_first


def test_what_became_slower_is_given_up_at_the_next_trial() -> None:
    machine = Machine(9e9, 4e9)
    machine.send_windows(2 * TRIES + 1)
    assert machine.trial.prefers_first
    machine.rates = {True: 4e9, False: 9e9}
    machine.send_windows(2 * TRIES + KEPT_WINDOWS)
    assert not machine.trial.prefers_first


def test_reads_longer_than_a_window_count_as_one() -> None:
    machine = Machine(4e9, 9e9)
    for _ in range(2 * TRIES):
        machine.send(3 * WINDOW_BYTES)
    assert not machine.trial.prefers_first


def test_what_a_long_read_had_over_a_window_shortens_no_other_one() -> None:
    machine = Machine(4e9, 9e9)
    machine.send(3 * WINDOW_BYTES)
    assert not machine.trial.prefers_first
    machine.send(WINDOW_BYTES - 1)
    assert not machine.trial.prefers_first
    machine.send(1)
    assert machine.trial.prefers_first
