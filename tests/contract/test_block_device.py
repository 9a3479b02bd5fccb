"""What `BlockDevice` promises, asked of everyone who implements it (implementations.py)."""

from __future__ import annotations

import errno
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmdbitmap.errors import InvalidArgument
from lmdbitmap.interfaces import BlockDevice, Buffer
from tests.contract.checks import (
    check_allocation,
    check_closed_says_so,
    check_side_by_side,
    check_writes_are_refused,
)
from tests.contract.implementations import Implementation, implementations

SIZE = 24 * 4096
RANGES = [
    (0, SIZE),
    (0, 1),
    (SIZE - 1, 1),
    (4096, 4096),
    (100, 10_000),
    (511, 2),
    (1000, 100),
    (5000, 0),
    (SIZE, 0),
]
PATTERN = bytes(range(1, 256)) * (2 * SIZE // 255)
OFF_THE_DISK = [(-1, 2), (0, SIZE + 1), (SIZE, 1), (SIZE + 1, 0), (1 << 63, 1)]

Steps: TypeAlias = list[tuple[str, int, int, int]]


class Workbench:
    """Opens devices of one implementation, each in a folder of its own."""

    def __init__(self, implementation: Implementation, folder: Path) -> None:
        self.implementation = implementation
        self.folder = folder

    @contextmanager
    def device(self, size: int = SIZE, read_only: bool = False) -> Iterator[BlockDevice]:
        with (
            tempfile.TemporaryDirectory(dir=self.folder) as folder,
            self.implementation.open(Path(folder), size, read_only) as device,
        ):
            yield device

    def round(self, size: int) -> int:
        return size // self.implementation.sector_bytes * self.implementation.sector_bytes


@pytest.fixture(params=implementations(), ids=lambda implementation: implementation.name)
def workbench(request: pytest.FixtureRequest, tmp_path: Path) -> Workbench:
    return Workbench(request.param, tmp_path)


@pytest.fixture
def device(workbench: Workbench) -> Iterator[BlockDevice]:
    with workbench.device() as device:
        yield device


def pattern(length: int, seed: int = 0) -> bytes:
    """Bytes without a zero among them, that differ from place to place."""
    return PATTERN[seed % 255 :][:length]


def content(device: BlockDevice) -> bytes:
    return device.pread(device.size, 0)


# --- reading and writing ---


def test_new_disk_reads_as_zeroes(device: BlockDevice) -> None:
    assert device.size == SIZE
    assert not device.read_only
    assert content(device) == bytes(SIZE)


@pytest.mark.parametrize(("offset", "length"), RANGES)
def test_write_changes_its_bytes_and_no_others(device: BlockDevice, offset: int, length: int) -> None:
    device.pwrite(pattern(length), offset)
    assert content(device) == bytes(offset) + pattern(length) + bytes(SIZE - offset - length)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_buffer_can_be_written(device: BlockDevice, kind: Callable[[bytes], Buffer]) -> None:
    device.pwrite(kind(b"content"), 3)
    assert device.pread(9, 2) == b"\0content\0"


@pytest.mark.parametrize(("offset", "length"), RANGES)
def test_reading_into_a_buffer_fills_all_of_it(device: BlockDevice, offset: int, length: int) -> None:
    device.pwrite(pattern(SIZE), 0)
    buffer = bytearray(b"?" * (length + 2))
    device.pread_into(memoryview(buffer)[1:-1], offset)
    assert buffer == b"?" + pattern(SIZE)[offset : offset + length] + b"?"


WIDE_VIEWS: list[Callable[[bytearray], memoryview]] = [
    lambda data: memoryview(data).cast("I"),
    lambda data: memoryview(data).cast("B", (8, len(data) // 8)),
    lambda data: memoryview(data).cast("b"),
]
"""As of an array of numbers, or of rows: their length is not in bytes."""


@pytest.mark.parametrize("view_of", WIDE_VIEWS, ids=["numbers", "rows", "signed"])
def test_all_bytes_of_a_view_of_larger_items_are_written_and_read(
    device: BlockDevice, view_of: Callable[[bytearray], memoryview]
) -> None:
    device.pwrite(view_of(bytearray(pattern(16384))), 4096)
    assert content(device) == bytes(4096) + pattern(16384) + bytes(SIZE - 20480)
    buffer = bytearray(16384)
    device.pread_into(view_of(buffer), 4096)
    assert buffer == pattern(16384)
    for call in (device.pwrite, device.pread_into):
        with pytest.raises(InvalidArgument):
            call(view_of(bytearray(16384)), SIZE - 8192)
    device.pwrite(memoryview(bytearray()).cast("I"), 0)
    assert (device.size, content(device)[:4096]) == (SIZE, bytes(4096))


def test_what_is_read_does_not_change_with_the_disk(device: BlockDevice) -> None:
    device.pwrite(b"old", 0)
    kept = device.pread(3, 0)
    device.pwrite(b"new", 0)
    device.flush()
    assert (kept, device.pread(3, 0)) == (b"old", b"new")


def test_descriptor_reads_and_writes_the_same_bytes(device: BlockDevice) -> None:
    if device.fd is None:
        return  # a device need not have one
    device.pwrite(b"by device", 700)
    assert os.pread(device.fd, 9, 700) == b"by device"
    os.pwrite(device.fd, b"by descriptor", 5000)
    assert device.pread(13, 5000) == b"by descriptor"


@pytest.mark.parametrize(("offset", "length"), OFF_THE_DISK)
def test_range_off_the_disk_is_refused_and_changes_nothing(
    device: BlockDevice, offset: int, length: int
) -> None:
    device.pwrite(pattern(SIZE), 0)
    data = bytes(min(length, SIZE + 1))
    calls: list[Callable[[], object]] = [
        lambda: device.pread(length, offset),
        lambda: device.pread_into(memoryview(bytearray(data)), offset),
        lambda: device.pwrite(data, offset),
        lambda: device.write_zeroes(offset, length),
        lambda: device.discard(offset, length),
        lambda: device.allocation(offset, length),
    ]
    for call in calls:
        with pytest.raises(InvalidArgument):
            call()
    assert content(device) == pattern(SIZE)


def test_negative_length_is_refused(device: BlockDevice) -> None:
    device.pwrite(pattern(SIZE), 0)
    for call in (device.write_zeroes, device.discard, device.allocation):
        with pytest.raises(InvalidArgument):
            call(4096, -1)
    with pytest.raises(InvalidArgument):
        device.pread(-1, 4096)
    assert content(device) == pattern(SIZE)


# --- zeroes and discards ---


@pytest.mark.parametrize(("offset", "length"), RANGES)
@pytest.mark.parametrize("may_unmap", [True, False])
def test_zeroed_range_reads_as_zeroes_and_its_neighbours_as_before(
    device: BlockDevice, offset: int, length: int, may_unmap: bool
) -> None:
    device.pwrite(pattern(SIZE), 0)
    device.write_zeroes(offset, length, may_unmap=may_unmap)
    assert content(device) == pattern(SIZE)[:offset] + bytes(length) + pattern(SIZE)[offset + length :]
    assert device.size == SIZE


@pytest.mark.parametrize(("offset", "length"), RANGES)
@pytest.mark.parametrize("may_unmap", [True, False])
def test_fast_zeroing_does_all_or_nothing(
    device: BlockDevice, offset: int, length: int, may_unmap: bool
) -> None:
    device.pwrite(pattern(SIZE), 0)
    zeroed = pattern(SIZE)[:offset] + bytes(length) + pattern(SIZE)[offset + length :]
    done = zeroes_fast(device, offset, length, may_unmap)
    assert content(device) == (zeroed if done else pattern(SIZE))


def zeroes_fast(device: BlockDevice, offset: int, length: int, may_unmap: bool) -> bool:
    """Whether the device could; a refusal for any reason but ENOTSUP fails the test."""
    try:
        device.write_zeroes(offset, length, may_unmap=may_unmap, fast_only=True)
    except OSError as refusal:
        if refusal.errno != errno.ENOTSUP:
            raise
        return False
    return True


@pytest.mark.parametrize(("offset", "length"), RANGES)
def test_discard_leaves_the_neighbours_alone(device: BlockDevice, offset: int, length: int) -> None:
    device.pwrite(pattern(SIZE), 0)
    device.discard(offset, length)
    assert device.pread(offset, 0) == pattern(SIZE)[:offset]
    assert device.pread(SIZE - offset - length, offset + length) == pattern(SIZE)[offset + length :]
    assert device.size == SIZE


# --- allocation ---


@pytest.mark.parametrize(("offset", "length"), RANGES)
def test_allocation_covers_what_was_asked(device: BlockDevice, offset: int, length: int) -> None:
    device.pwrite(pattern(4096), 4096)
    device.pwrite(pattern(100), 5 * 4096 + 50)
    device.flush()
    check_allocation(list(device.allocation(offset, length)), device.pread(length, offset))


def test_allocation_of_nothing_is_nothing(device: BlockDevice) -> None:
    assert [*device.allocation(0, 0), *device.allocation(5, 0), *device.allocation(SIZE, 0)] == []


def test_two_walks_at_once_do_not_disturb_each_other(device: BlockDevice) -> None:
    for offset in range(0, SIZE, 8192):
        device.pwrite(pattern(4096), offset)
    alone = list(device.allocation(0, SIZE))
    together = list(zip(device.allocation(0, SIZE), device.allocation(0, SIZE), strict=True))
    assert together == [(part, part) for part in alone]


# --- size ---


def test_resize_keeps_what_stays_and_adds_zeroes(workbench: Workbench, device: BlockDevice) -> None:
    if not workbench.implementation.is_resizable:
        with pytest.raises(InvalidArgument):
            device.resize(SIZE * 2)
        assert device.size == SIZE
        return
    device.pwrite(pattern(SIZE), 0)
    device.resize(SIZE + 4099)
    assert content(device) == pattern(SIZE) + bytes(4099)
    device.resize(777)
    assert content(device) == pattern(SIZE)[:777]
    device.resize(SIZE)
    assert content(device) == pattern(SIZE)[:777] + bytes(SIZE - 777)


@pytest.mark.parametrize("size", [-1, 1 << 63])
def test_size_that_no_disk_can_have_is_refused(device: BlockDevice, size: int) -> None:
    with pytest.raises(InvalidArgument):
        device.resize(size)
    assert device.size == SIZE


def test_disk_of_no_bytes_can_be_used(workbench: Workbench) -> None:
    with workbench.device(size=0) as device:
        assert (device.size, device.pread(0, 0), list(device.allocation(0, 0))) == (0, b"", [])
        device.pwrite(b"", 0)
        device.write_zeroes(0, 0)
        device.discard(0, 0)
        device.flush()


# --- read-only, closed ---


def test_read_only_device_reads_and_refuses_writes(workbench: Workbench) -> None:
    if not workbench.implementation.can_be_read_only:
        return
    with workbench.device(read_only=True) as device:
        assert device.read_only
        assert content(device) == bytes(SIZE)
        check_allocation(list(device.allocation(0, SIZE)), bytes(SIZE))
        device.flush()
        check_writes_are_refused(device)


def test_closed_device_refuses_and_may_be_closed_again(device: BlockDevice) -> None:
    check_closed_says_so(device, lambda: device.pwrite(b"x", 0))


# --- threads ---


def test_threads_do_not_mix_up_each_others_bytes(device: BlockDevice) -> None:
    rounds, piece = 20, 1000

    def finds_its_own(number: int, turn: int) -> bool:
        mine = pattern(piece, seed=number * rounds + turn)
        device.pwrite(mine, number * piece)
        list(device.allocation(0, SIZE))
        return device.pread(piece, number * piece) == mine

    check_side_by_side(rounds, finds_its_own)


def test_allocation_ends_while_the_disk_changes(device: BlockDevice) -> None:
    stop = threading.Event()
    rounds = 0

    def change() -> None:
        nonlocal rounds
        while not stop.is_set() or rounds == 0:
            for offset in range(0, SIZE, 4096):
                device.pwrite(pattern(4096), offset)
            device.discard(0, SIZE)
            rounds += 1

    changer = threading.Thread(target=change)
    changer.start()
    try:
        lengths = [sum(part.length for part in device.allocation(0, SIZE)) for _ in range(50)]
    finally:
        stop.set()
        changer.join()
    assert lengths == [SIZE] * 50
    assert rounds > 0


# --- the naive model ---

steps = st.lists(
    st.tuples(
        st.sampled_from(["write", "write", "zero", "zero, keep", "zero, fast", "discard", "resize", "flush"]),
        st.one_of(st.integers(0, SIZE), st.integers(0, SIZE // 4096).map(lambda page: page * 4096)),
        st.one_of(st.integers(0, SIZE), st.just(4096)),
        st.integers(0, 254),
    ),
    min_size=4,
    max_size=16,
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(steps=steps)
def test_any_steps_leave_what_a_bytearray_would(workbench: Workbench, steps: Steps) -> None:
    with workbench.device() as device:
        model = bytearray(SIZE)
        for number, (step, offset, length, seed) in enumerate(steps, 1):
            take_step(workbench, device, model, step, min(offset, len(model)), length, seed)
            assert device.size == len(model), number
            assert content(device) == model, number
            check_allocation(list(device.allocation(0, device.size)), bytes(model))


def take_step(
    workbench: Workbench,
    device: BlockDevice,
    model: bytearray,
    step: str,
    offset: int,
    length: int,
    seed: int,
) -> None:
    stop = min(offset + length, len(model))
    length = stop - offset
    if step == "write":
        device.pwrite(pattern(length, seed), offset)
        model[offset:stop] = pattern(length, seed)
    elif step == "discard":
        device.discard(offset, length)
        model[offset:stop] = device.pread(length, offset)  # anybody's guess
    elif step == "resize" and workbench.implementation.is_resizable:
        device.resize(offset)
        del model[offset:]
    elif step == "flush":
        device.flush()
    elif step == "zero, fast":
        if zeroes_fast(device, offset, length, may_unmap=bool(seed % 2)):
            model[offset:stop] = bytes(length)
    elif step in ("zero", "zero, keep"):
        device.write_zeroes(offset, length, may_unmap=step == "zero")
        model[offset:stop] = bytes(length)
