"""Reads at a limited rate, by a clock that the test moves."""

from __future__ import annotations

import random
import threading

import pytest

from lmdbitmap.copying.readable import Metered
from lmdbitmap.errors import InvalidArgument
from lmdbitmap.images.memory_device import MemoryDevice
from lmdbitmap.work.pace import LEAST_BYTES_PER_S, Pace, pace_of

MIB = 1 << 20


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now_s += seconds


@pytest.mark.parametrize("seed", range(20))
def test_no_more_is_admitted_than_the_rate_allows_and_no_less_while_somebody_wants(seed: int) -> None:
    lot, clock = random.Random(seed), Clock()
    rate = lot.randrange(LEAST_BYTES_PER_S, 100 * MIB)
    pace = Pace(rate, now_s=lambda: clock.now_s)
    begun, done = clock.now_s, 0
    for _ in range(200):
        length = lot.randrange(1, 2 * MIB)
        pace.admit(length, clock.sleep)
        assert done <= rate * (clock.now_s - begun) + 1, "what was read before this one was read too fast"
        done += length
        clock.now_s += lot.random() * length / rate  # the read itself, faster than the limit
    assert clock.now_s - begun <= done / rate + 1e-6


def test_a_pause_is_not_made_up_for() -> None:
    clock = Clock()
    pace = Pace(MIB, now_s=lambda: clock.now_s)
    clock.now_s += 60
    pace.admit(MIB, clock.sleep)
    begun = clock.now_s
    pace.admit(MIB, clock.sleep)
    assert clock.now_s == begun + 1


def test_too_low_a_limit_is_refused_and_none_is_none() -> None:
    with pytest.raises(InvalidArgument, match="1048575 bytes a second are too few; allow 1048576 at least"):
        pace_of(LEAST_BYTES_PER_S - 1)
    assert pace_of(None) is None


def test_who_waits_to_read_a_device_that_is_interrupted_waits_no_more() -> None:
    metered = Metered(MemoryDevice(20 * MIB), Pace(LEAST_BYTES_PER_S))
    readers = [
        threading.Thread(target=metered.pread_into, args=(memoryview(bytearray(20 * MIB)), 0))
        for _ in range(4)
    ]
    for reader in readers:
        reader.start()
    metered.methods.interrupt()
    for reader in readers:
        reader.join(10)
        assert not reader.is_alive()
