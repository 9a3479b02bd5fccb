"""What every `BlockDevice` is held to, whether it can be written or not."""

from __future__ import annotations

import errno
import itertools
import threading
from collections.abc import Callable

import pytest

from lmdbitmap.interfaces import Allocation, BlockDevice

THREADS = 4


def check_allocation(parts: list[Allocation], data: bytes) -> None:
    """`parts` describe `data` without a gap, neighbours differ, and no zero is claimed in vain."""
    assert sum(part.length for part in parts) == len(data)
    assert all(part.length > 0 for part in parts)
    assert all(left[1:] != right[1:] for left, right in itertools.pairwise(parts))
    offset = 0
    for part in parts:
        if part.zero:
            assert data[offset : offset + part.length] == bytes(part.length)
        offset += part.length


def check_writes_are_refused(device: BlockDevice) -> None:
    writes: list[Callable[[], None]] = [
        lambda: device.pwrite(b"x", 0),
        lambda: device.write_zeroes(0, 1),
        lambda: device.discard(0, device.size),
    ]
    for write in writes:
        with pytest.raises(PermissionError) as refused:
            write()
        assert refused.value.errno == errno.EPERM


def check_closed_says_so(device: BlockDevice, *uses: Callable[[], object]) -> None:
    """Closed twice, it refuses these uses and what every device can do."""
    device.close()
    device.close()
    for use in (lambda: device.pread(1, 0), device.flush, *uses):
        with pytest.raises(OSError) as refused:
            use()
        assert refused.value.errno is not None


def check_side_by_side(rounds: int, is_right: Callable[[int, int], bool]) -> None:
    """Threads that begin at the same time ask `is_right(thread, round)`, and each gets to its end."""
    start = threading.Barrier(THREADS)
    wrong: list[tuple[int, int]] = []
    done: list[int] = []

    def work(number: int) -> None:
        start.wait()
        wrong.extend((number, turn) for turn in range(rounds) if not is_right(number, turn))
        done.append(number)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert (sorted(done), wrong) == (list(range(THREADS)), [])
