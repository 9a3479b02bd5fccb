"""The gate and its lanes: which way a write goes, what closes the gate, and that it opens again."""

from __future__ import annotations

import errno
import functools
import gc
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from lmdbitmap.bits import Run, bitmap_view
from lmdbitmap.errors import InvalidArgument, StorageError
from lmdbitmap.geometry import REGION_BYTES, Geometry
from lmdbitmap.images.device import FileDevice
from lmdbitmap.images.memory_device import MemoryDevice
from lmdbitmap.images.plain import PlainDisk
from lmdbitmap.interfaces import BlockDevice, Buffer
from lmdbitmap.tracker.lane import FilterLane, Gate, poll_pauses_s
from tests.helpers.support import make_raw_image

GRANULARITY = 512
SIZE = 4096 * GRANULARITY
"""One whole region: the bitmap ends with the disk."""
PATIENCE_SECONDS = 20.0


class Marker:
    """Stands behind lanes where a period would: settles what it is asked to, and writes it down."""

    def __init__(self, size: int = SIZE) -> None:
        self.settled = bitmap_view(bytearray(REGION_BYTES))
        self.gate = Gate(Geometry(size, 9), self.settled)
        self.marked: list[Run] = []
        self.refusal: Exception | None = None

    def __call__(self, runs: list[Run]) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.marked += runs
        for start, stop in runs:
            self.settled[start:stop] = 1

    def settle_all(self) -> None:
        self.settled.setall(1)


@contextmanager
def a_file(folder: Path, size: int) -> Iterator[BlockDevice]:
    with closing(FileDevice.open(make_raw_image(folder / "disk.raw", size))) as device:
        yield device


@contextmanager
def a_memory(folder: Path, size: int) -> Iterator[BlockDevice]:
    yield MemoryDevice(size)


@pytest.fixture(params=[a_file, a_memory], ids=["descriptor", "no descriptor"])
def device(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BlockDevice]:
    with request.param(tmp_path, SIZE) as device:
        yield device


class StubbornDevice(MemoryDevice):
    """Its next write waits until it is let go."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.writing, self.go_on = threading.Event(), threading.Event()

    def pwrite(self, data: Buffer, offset: int) -> None:
        self.writing.set()
        assert self.go_on.wait(PATIENCE_SECONDS)
        super().pwrite(data, offset)


def start(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def errno_of(call: Callable[[], object]) -> int | None:
    with pytest.raises(OSError) as refused:
        call()
    return refused.value.errno


# --- which way ---


def test_write_is_marked_once_and_then_goes_straight(device: BlockDevice) -> None:
    marker = Marker()
    lane = FilterLane(marker.gate, device, marker)
    lane.pwrite(b"first", 1000)
    lane.pwrite(b"again", 1000)
    assert marker.marked == [(1, 2)]
    assert device.pread(5, 1000) == b"again"


def test_write_over_one_clean_block_among_settled_ones_is_marked(device: BlockDevice) -> None:
    marker = Marker()
    lane = FilterLane(marker.gate, device, marker)
    marker.settle_all()
    marker.settled[3] = 0
    lane.pwrite(bytes(5 * 512), 512)
    assert marker.marked == [(1, 6)]
    lane.write_many([(0, memoryview(bytes(512))), (512, memoryview(bytes(5 * 512)))])
    assert marker.marked == [(1, 6)]
    marker.settled[5] = 0
    lane.pwrite(bytes(5 * 512), 512)
    assert marker.marked == [(1, 6), (1, 6)]
    marker.settled[5] = 0
    assert lane.write_many([(0, memoryview(b"x")), (512, memoryview(bytes(5 * 512)))]) == {}
    assert marker.marked == [(1, 6)] * 3


def test_last_byte_decides_which_blocks_a_write_touches(device: BlockDevice) -> None:
    marker = Marker()
    lane = FilterLane(marker.gate, device, marker)
    lane.pwrite(bytes(512), 512)
    lane.pwrite(bytes(513), 1024)
    assert marker.marked == [(1, 2), (2, 4)]


@pytest.mark.parametrize("settled", [False, True])
def test_all_blocks_of_a_view_of_larger_items_are_marked(device: BlockDevice, settled: bool) -> None:
    """Its length is not in bytes: a block that is written and not marked would be called clean (law 1)."""
    marker = Marker()
    lane = FilterLane(marker.gate, device, marker)
    if settled:
        marker.settled[0] = 1
    wide = memoryview(b"x" * 4 * GRANULARITY).cast("I")
    lane.pwrite(wide, 0)
    assert marker.marked == [(0, 4)]
    assert lane.write_many([(8 * GRANULARITY, wide), (SIZE - GRANULARITY, wide)]) == {1: errno.ENOSPC}
    assert marker.marked == [(0, 4), (8, 12)]
    assert (device.size, device.pread(4 * GRANULARITY, 8 * GRANULARITY)) == (SIZE, bytes(wide))


def test_a_lane_without_a_filter_counts_bytes_too(tmp_path: Path) -> None:
    """A write past the end would make the image longer."""
    with closing(FileDevice.open(make_raw_image(tmp_path / "image", 4096))) as image:
        wide = memoryview(b"x" * 4096).cast("I")
        assert PlainDisk(image).lane().write_many([(0, wide), (1024, wide)]) == {1: errno.EINVAL}
        assert (tmp_path / "image").read_bytes() == bytes(wide)


def test_batch_shares_one_marking(device: BlockDevice) -> None:
    marker = Marker()
    calls: list[list[Run]] = []

    def mark(runs: list[Run]) -> None:
        calls.append(runs)
        marker(runs)

    lane = FilterLane(marker.gate, device, mark)
    assert lane.write_many([(n * 1024, memoryview(b"data")) for n in range(10)]) == {}
    assert calls == [[(2 * n, 2 * n + 1) for n in range(10)]]
    assert [device.pread(4, n * 1024) for n in range(10)] == [b"data"] * 10


@pytest.mark.parametrize("settled", [True, False])
@pytest.mark.parametrize(
    ("offset", "length"),
    [(-1, 1), (-1, 2), (-512, 512), (-(10**9), 5), (SIZE, 1), (SIZE - 1, 2), (SIZE + 1, 0), (2**63, 1), (2**70, 0)],
)  # fmt: skip
def test_write_off_the_disk_is_refused_on_either_way(
    device: BlockDevice, offset: int, length: int, settled: bool
) -> None:
    marker = Marker()
    lane = FilterLane(marker.gate, device, marker)
    if settled:
        marker.settle_all()
    with pytest.raises(InvalidArgument):
        lane.pwrite(bytes(length), offset)
    good, bad = (0, memoryview(b"good")), (offset, memoryview(bytes(length)))
    assert lane.write_many([bad, good, bad]) == {0: errno.ENOSPC, 2: errno.ENOSPC}
    assert device.pread(4, 0) == b"good"
    assert device.pread(SIZE - 4, 4) == bytes(SIZE - 4)
    assert device.size == SIZE


@pytest.mark.parametrize("settled", [True, False])
@pytest.mark.parametrize("offset", [0, 1, 512, SIZE - 1, SIZE])
def test_empty_write_is_nothing(device: BlockDevice, offset: int, settled: bool) -> None:
    marker = Marker()
    lane = FilterLane(marker.gate, device, marker)
    if settled:
        marker.settle_all()
    lane.pwrite(b"", offset)
    assert lane.write_many([(offset, memoryview(b""))]) == {}
    lane.write_zeroes(offset, 0)
    lane.discard(offset, 0)
    assert all(start == stop for start, stop in marker.marked)


# --- refusals ---


def test_refused_mark_writes_nothing(device: BlockDevice) -> None:
    marker = Marker()
    marker.refusal = StorageError("store", OSError(errno.EDQUOT, "full"), next_step="free some space")
    lane = FilterLane(marker.gate, device, marker)
    writes: list[Callable[[], None]] = [
        lambda: lane.pwrite(b"x", 0),
        lambda: lane.write_zeroes(0, 1),
        lambda: lane.discard(0, 1),
    ]
    for write in writes:
        assert errno_of(write) == errno.EDQUOT
    assert lane.write_many([(0, memoryview(b"x"))]) == {0: errno.EDQUOT}
    assert device.pread(SIZE, 0) == bytes(SIZE)
    assert not lane.busy


def test_refused_write_is_told_and_the_others_of_its_batch_are_done() -> None:
    device = MemoryDevice(SIZE)
    marker = Marker()
    lane = FilterLane(marker.gate, device, marker)
    device.fail_next["pwrite"] = errno.EIO
    assert lane.write_many([(0, memoryview(b"a")), (512, memoryview(b"b"))]) == {0: errno.EIO}
    assert device.pread(1, 512) == b"b"
    device.fail_next["pwrite"] = errno.ENOSPC
    assert errno_of(lambda: lane.pwrite(b"c", 1024)) == errno.ENOSPC
    assert not lane.busy


def test_whatever_a_mark_raises_leaves_the_lane_idle(device: BlockDevice) -> None:
    marker = Marker()
    marker.refusal = MemoryError()
    lane = FilterLane(marker.gate, device, marker)
    writes: list[Callable[[], None]] = [lambda: lane.pwrite(b"x", 0), lambda: lane.write_zeroes(0, 1)]
    for write in writes:
        with pytest.raises(MemoryError):
            write()
        assert not lane.busy


# --- the gate (law 2) ---


@pytest.mark.parametrize("settled", [True, False], ids=["fast", "slow"])
def test_drained_waits_for_the_write_in_flight(settled: bool) -> None:
    device = StubbornDevice(SIZE)
    marker = Marker()
    lane = FilterLane(marker.gate, device, marker)
    if settled:
        marker.settle_all()
    writer = start(lambda: lane.pwrite(b"in flight", 0))
    assert device.writing.wait(PATIENCE_SECONDS)
    order: list[str] = []

    def drain() -> None:
        with marker.gate.drained():
            order.append("drained")
            assert device.pread(9, 0) == b"in flight"

    drainer = start(drain)
    wait_until(lambda: lane.size < 0)
    assert order == []
    order.append("let go")
    device.go_on.set()
    for thread in (writer, drainer):
        thread.join(PATIENCE_SECONDS)
    assert order == ["let go", "drained"]


@pytest.mark.parametrize("settled", [True, False], ids=["fast", "slow"])
@pytest.mark.parametrize("batch", [True, False], ids=["batch", "write"])
def test_drained_waits_for_the_system_call_that_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: bool, settled: bool
) -> None:
    """A batch, and each piece of a long write, for an image with a descriptor."""
    states: list[bool] = []
    pwrite = os.pwrite

    def watched(fd: int, data: bytes, offset: int) -> int:
        states.append(lane.busy)
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", watched)
    with a_file(tmp_path, SIZE) as device:
        marker = Marker()
        lane = FilterLane(marker.gate, device, marker)
        if settled:
            marker.settle_all()
        if batch:
            assert lane.write_many([(0, memoryview(b"a")), (GRANULARITY, memoryview(b"b"))]) == {}
        else:
            lane.pwrite(b"a", 0)
        assert states == [True] * (1 + batch)
        assert not lane.busy


def test_a_write_that_takes_long_is_looked_at_less_and_less_often() -> None:
    """An hour's wait costs a hundred looks a second, and none is late by more than a tenth of the wait."""
    pauses = list(itertools.islice(poll_pauses_s(), 400))
    assert set(pauses[:100]) == {0.0001}
    assert pauses == sorted(pauses)
    assert pauses[-1] == pauses[-2] == 0.01
    assert all(pause <= sum(pauses[:number]) / 10 for number, pause in enumerate(pauses[100:], 100))
    assert 2.4 < sum(pauses) < 3


def wait_until(is_so: Callable[[], bool]) -> None:
    """For what has no event of its own."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("newcomer", [True, False], ids=["a new lane", "an old lane"])
def test_writer_waits_at_a_closed_gate_and_finds_what_is_new_behind_it(newcomer: bool) -> None:
    device = MemoryDevice(2 * SIZE)
    marker = Marker()
    lane = FilterLane(marker.gate, device, marker)
    marker.settle_all()
    fresh = bitmap_view(bytearray(2 * REGION_BYTES))
    arrived = threading.Event()

    def write() -> None:
        arrived.set()
        mine = FilterLane(marker.gate, device, marker) if newcomer else lane
        mine.pwrite(b"late", SIZE)

    with marker.gate.drained():
        writer = start(write)
        assert arrived.wait(PATIENCE_SECONDS)
        writer.join(0.05)
        assert writer.is_alive()
        assert device.pread(4, SIZE) == bytes(4)
        marker.gate.settled = marker.settled = fresh
        marker.gate.geometry = Geometry(2 * SIZE, 9)
    writer.join(PATIENCE_SECONDS)
    assert device.pread(4, SIZE) == b"late"
    assert marker.marked == [(4096, 4097)]


def test_failure_inside_opens_the_gate_again(device: BlockDevice) -> None:
    marker = Marker()
    lane = FilterLane(marker.gate, device, marker)
    with pytest.raises(ZeroDivisionError), marker.gate.drained():
        raise ZeroDivisionError
    assert lane.size == SIZE
    lane.pwrite(b"goes on", 0)


def test_shut_gate_refuses_old_lanes_and_new_ones(device: BlockDevice) -> None:
    marker = Marker()
    lane = FilterLane(marker.gate, device, marker)
    marker.settle_all()
    with marker.gate.drained():
        marker.gate.shut(StorageError("disk", OSError(errno.ESHUTDOWN, "off"), next_step="attach it again"))
    for late in (lane, FilterLane(marker.gate, device, marker)):
        assert errno_of(functools.partial(late.pwrite, b"x", 0)) == errno.ESHUTDOWN
        assert not late.busy
    assert device.pread(1, 0) == b"\0"


def test_gate_forgets_lanes_that_nobody_holds(device: BlockDevice) -> None:
    marker = Marker()
    lanes = [FilterLane(marker.gate, device, marker) for _ in range(100)]
    assert len(marker.gate._lanes) == 100
    del lanes[1:]
    gc.collect()
    assert len(marker.gate._lanes) == 1


@pytest.mark.parametrize(("wait_s", "told"), [(-1.0, 1), (PATIENCE_SECONDS, 0)])
def test_a_lane_tells_of_writes_that_had_to_wait(
    device: BlockDevice, monkeypatch: pytest.MonkeyPatch, wait_s: float, told: int
) -> None:
    monkeypatch.setattr("lmdbitmap.tracker.lane._WAIT_S", wait_s)
    marker, waits = Marker(), list[int]()
    lane = FilterLane(marker.gate, device, marker)
    lane.has_waited = lambda: waits.append(len(marker.marked))
    for _ in range(2):  # the second time the block is settled
        assert lane.write_many([(0, memoryview(b"new dirt"))]) == {}
    assert waits == [1] * told
