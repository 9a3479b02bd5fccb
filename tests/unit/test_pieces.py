"""The pieces of a run are the run: no gap, no byte twice, zeroes where and only where a whole block of them is."""

from __future__ import annotations

import contextlib
import errno
import random
import threading
from collections.abc import Iterator, Sequence

import pytest

from lmdbitmap.bits import Run
from lmdbitmap.copying.loads import SMALL_BYTES
from lmdbitmap.copying.pieces import Pieces
from lmdbitmap.copying.readable import CHUNK_BYTES, Metered, Readable
from lmdbitmap.geometry import Geometry, ceil_div
from lmdbitmap.images.memory_device import MemoryDevice
from tests.helpers.spared import MORE_THAN_THERE_ARE, NowAndThen

BLOCK_BITS = 13
BLOCK = 1 << BLOCK_BITS


def device_with(randomness: random.Random, block_count: int, tail: int) -> MemoryDevice:
    """Blocks of zeroes, of data, and of zeroes but for one byte."""
    device = MemoryDevice(block_count * BLOCK + tail)
    for offset in range(0, device.size, BLOCK):
        length = min(BLOCK, device.size - offset)
        kind = randomness.randrange(3)
        if kind == 1:
            device.pwrite(randomness.randbytes(length), offset)
        elif kind == 2:
            device.pwrite(b"x", offset + randomness.randrange(length))
    return device


@pytest.mark.parametrize("tail", [0, 1, 4095, 4097])
@pytest.mark.parametrize("block_count", [1, 40, 2 * CHUNK_BYTES // BLOCK + 3])
def test_the_pieces_are_the_run(block_count: int, tail: int) -> None:
    randomness = random.Random(block_count + tail)
    device = device_with(randomness, block_count, tail)
    blocks = Geometry(device.size, BLOCK_BITS)
    start = randomness.randrange(block_count)
    position, end = start * BLOCK, device.size
    kinds = set()
    for offset, length, data in Pieces(device, blocks).of_all([(start, blocks.block_count)]):
        assert offset == position
        assert 0 < length <= CHUNK_BYTES or data is None
        whole = device.pread(length, offset)
        assert bytes(data if data is not None else bytes(length)) == whole
        for block in range(0, length, BLOCK):
            assert any(whole[block : block + BLOCK]) is (data is not None)
        kinds.add(data is None)
        position += length
    assert position == end
    assert len(kinds) == 2 or block_count == 1


class Far(MemoryDevice):
    """Reads many ranges in one go, and notes how many."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.together: list[int] = []

    def pread_many(self, parts: Sequence[tuple[memoryview, int]]) -> None:
        self.together.append(len(parts))
        for buffer, offset in parts:
            self.pread_into(buffer, offset)


class BesideAGuest(MemoryDevice):
    """No processor is left for a thread that reads ahead."""

    spared_processors = MORE_THAN_THERE_ARE

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        assert threading.current_thread() is threading.main_thread()
        super().pread_into(buffer, offset)


@pytest.mark.parametrize("wrapped", [False, True])
def test_beside_a_guest_the_pieces_are_the_same(wrapped: bool) -> None:
    device, guarded = device_with(random.Random(5), 700, 4097), BesideAGuest(700 * BLOCK + 4097)
    guarded.pwrite(device.pread(device.size, 0), 0)
    blocks = Geometry(device.size, BLOCK_BITS)
    alone = [
        (at, length, data and bytes(data)) for at, length, data in Pieces(device, blocks).of_all([(0, 701)])
    ]
    pieces = Pieces(Metered(guarded) if wrapped else guarded, blocks)
    assert [(at, length, data and bytes(data)) for at, length, data in pieces.of_all([(0, 701)])] == alone


class InLargeChunks(MemoryDevice):
    chunk_bytes = 3 * CHUNK_BYTES

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.pwrite(b"x" * size, 0)
        self.reads: list[int] = []

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        self.reads.append(len(buffer))
        super().pread_into(buffer, offset)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_device_may_say_how_much_is_to_be_read_at_once(wrapped: bool) -> None:
    device = InLargeChunks(7 * CHUNK_BYTES)
    blocks = Geometry(device.size, BLOCK_BITS)
    found = list(Pieces(Metered(device) if wrapped else device, blocks).of_all([(0, blocks.block_count)]))
    assert device.reads == [3 * CHUNK_BYTES, 3 * CHUNK_BYTES, CHUNK_BYTES]
    assert sum(piece.length for piece in found) == device.size


class Announced(InLargeChunks):
    """Is told what will be read."""

    def __init__(self, size: int, spared_processors: int) -> None:
        super().__init__(size)
        self.spared_processors = spared_processors
        self.told: list[tuple[str, int, int]] = []

    def will_need(self, offset: int, length: int) -> None:
        self.told.append(("will need", offset, length))

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        self.told.append(("read", offset, len(buffer)))
        super().pread_into(buffer, offset)


@pytest.mark.parametrize("wrapped", [False, True])
def test_without_a_thread_the_device_is_told_two_buffers_ahead_what_will_be_read(wrapped: bool) -> None:
    device, chunk = Announced(15 * CHUNK_BYTES, spared_processors=MORE_THAN_THERE_ARE), 3 * CHUNK_BYTES
    blocks = Geometry(device.size, BLOCK_BITS)
    pieces = Pieces(Metered(device) if wrapped else device, blocks).of_all([(0, blocks.block_count)])
    assert sum(piece.length for piece in pieces) == device.size
    coming = [("will need", number * chunk, chunk) for number in range(5)]
    read = [("read", number * chunk, chunk) for number in range(5)]
    assert device.told == [*coming[:3], read[0], coming[3], read[1], coming[4], *read[2:]]


def test_with_a_thread_that_reads_ahead_nothing_needs_to_be_announced() -> None:
    device = Announced(6 * CHUNK_BYTES, spared_processors=0)
    blocks = Geometry(device.size, BLOCK_BITS)
    assert (
        sum(piece.length for piece in Pieces(device, blocks).of_all([(0, blocks.block_count)])) == device.size
    )
    assert [what for what, _, _ in device.told] == ["read", "read"]


@pytest.mark.parametrize("tail", [0, 1, 4097])
def test_small_runs_are_read_together_and_are_what_they_are_one_by_one(tail: int) -> None:
    randomness = random.Random(tail)
    near = device_with(randomness, 4 * CHUNK_BYTES // BLOCK, tail)
    far = Far(near.size)
    far.pwrite(near.pread(near.size, 0), 0)
    blocks = Geometry(near.size, BLOCK_BITS)
    lengths = [*[1, 2, 3] * 9, SMALL_BYTES // BLOCK, SMALL_BYTES // BLOCK + 1, 1, CHUNK_BYTES // BLOCK + 5]
    runs = list(separate_runs(blocks.block_count, lengths, randomness))
    asked, read = copied(near, blocks, runs), copied(Metered(far), blocks, runs)
    assert content_of(asked) == content_of(read)
    assert sum(length for _, length, _ in read) == sum(blocks.bytes_of(*run)[1] for run in runs)
    assert max(far.together) > 10
    assert len(far.together) <= ceil_div(near.size, CHUNK_BYTES)


def test_what_is_read_together_is_metered() -> None:
    far = Far(64 * BLOCK)
    far.pwrite(b"x" * far.size, 0)
    metered = Metered(far)
    found = copied(metered, Geometry(far.size, BLOCK_BITS), [(0, 1), (2, 4), (10, 13)])
    assert sum(length for _, length, _ in found) == metered.bytes_read == 6 * BLOCK


def copied(device: Readable, blocks: Geometry, runs: Sequence[Run]) -> list[tuple[int, int, bytes | None]]:
    pieces = Pieces(device, blocks).of_all(runs)
    return [(offset, length, None if data is None else bytes(data)) for offset, length, data in pieces]


def separate_runs(
    block_count: int, lengths: Sequence[int], randomness: random.Random
) -> Iterator[tuple[int, int]]:
    """Up to the last block, with gaps between them."""
    position = 0
    while position < block_count:
        stop = min(position + randomness.choice(lengths), block_count)
        yield position, stop
        position = stop + 1
    if stop < block_count:
        yield block_count - 1, block_count


def content_of(pieces: Sequence[tuple[int, int, bytes | None]]) -> dict[int, bytes]:
    """By block, as pieces may be cut in another way."""
    found = {}
    for offset, length, data in pieces:
        for at in range(0, length, BLOCK):
            size = min(BLOCK, length - at)
            found[offset + at] = bytes(size) if data is None else data[at : at + size]
    return found


class Slow(MemoryDevice):
    """Reads when it is let, and fails at one place."""

    def __init__(self, content: bytes, fails_at: int | None = None) -> None:
        super().__init__(len(content))
        self.pwrite(content, 0)
        self.reads = threading.Semaphore(0)
        self.let = threading.Semaphore(0)
        self.begun = 0
        self._fails_at = fails_at
        self.spared_processors = 0

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        self.begun += 1
        self.reads.release()
        self.let.acquire()
        if offset == self._fails_at:
            raise OSError(errno.EIO, "a bad sector")
        super().pread_into(buffer, offset)


def test_it_reads_ahead_by_two_buffers_and_no_more() -> None:
    content = random.Random(1).randbytes(6 * CHUNK_BYTES)
    device = Slow(content)
    device.let.release(5)
    blocks = Geometry(device.size, BLOCK_BITS)
    with contextlib.closing(Pieces(device, blocks).of_all([(0, blocks.block_count)])) as pieces:
        taken = 0
        for taken, piece in enumerate(pieces, 1):
            assert bytes(piece.data or b"") == content[piece.offset : piece.offset + piece.length]
            while device.reads.acquire(timeout=10):
                if device.begun == min(taken + 2, 6):
                    break
            assert device.begun == min(taken + 2, 6)
            device.let.release()
    assert (taken, device.begun) == (6, 6)


class BesideAGuestNowAndThen(MemoryDevice):
    def __init__(self, content: bytes) -> None:
        super().__init__(len(content))
        self.pwrite(content, 0)
        self._guest = NowAndThen()

    @property
    def spared_processors(self) -> int:
        return self._guest()


@pytest.mark.parametrize("wrapped", [False, True])
def test_beside_a_guest_that_is_quiet_now_and_then_the_pieces_come_in_their_order(wrapped: bool) -> None:
    content = random.Random(9).randbytes(40 * CHUNK_BYTES)
    device = BesideAGuestNowAndThen(content)
    blocks = Geometry(device.size, BLOCK_BITS)
    pieces = Pieces(Metered(device) if wrapped else device, blocks)
    assert b"".join(bytes(piece.data or b"") for piece in pieces.of_all([(0, blocks.block_count)])) == content


@pytest.mark.parametrize("bad", [0, 1, 4])
def test_an_error_comes_in_its_place(bad: int) -> None:
    content = random.Random(bad).randbytes(5 * CHUNK_BYTES)
    device = Slow(content, bad * CHUNK_BYTES)
    device.let.release(99)
    blocks = Geometry(device.size, BLOCK_BITS)
    pieces = Pieces(device, blocks).of_all([(0, blocks.block_count)])
    assert [next(pieces).offset for _ in range(bad)] == [CHUNK_BYTES * number for number in range(bad)]
    with pytest.raises(OSError, match="a bad sector"):
        next(pieces)


def test_who_leaves_before_the_end_leaves_no_thread_behind() -> None:
    device = Slow(random.Random(5).randbytes(5 * CHUNK_BYTES))
    device.let.release(99)
    blocks = Geometry(device.size, BLOCK_BITS)
    before = set(threading.enumerate())
    pieces = Pieces(device, blocks).of_all([(0, blocks.block_count)])
    assert next(pieces).offset == 0
    pieces.close()
    assert set(threading.enumerate()) <= before


def test_zeroes_between_data_come_in_their_place_and_take_no_memory() -> None:
    size = 900 * BLOCK
    device = MemoryDevice(size)
    for block in range(0, 900, 100):
        device.pwrite(b"x" * BLOCK, block * BLOCK)
    blocks = Geometry(size, BLOCK_BITS)
    runs = [(block, block + 1) for block in range(0, 900, 2)]
    pieces = copied(device, blocks, runs)
    assert [offset for offset, _, _ in pieces] == [start * BLOCK for start, _ in runs]
    assert [data is not None for _, _, data in pieces] == [start % 100 == 0 for start, _ in runs]


class Hanging(MemoryDevice):
    """Answers the first read, and no other until it is interrupted."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.pwrite(random.Random(1).randbytes(size), 0)
        self.reads: list[int] = []
        self.hangs = threading.Event()
        self.interrupted = threading.Event()

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        self.reads.append(offset)
        if offset:
            self.hangs.set()
            assert self.interrupted.wait(30)
            raise OSError(errno.ESHUTDOWN, "interrupted")
        super().pread_into(buffer, offset)

    def interrupt(self) -> None:
        self.interrupted.set()


@pytest.mark.parametrize("wrapped", [False, True])
def test_who_leaves_while_a_read_hangs_interrupts_it_and_begins_no_other(wrapped: bool) -> None:
    device = Hanging(6 * CHUNK_BYTES)
    blocks = Geometry(device.size, BLOCK_BITS)
    pieces = Pieces(Metered(device) if wrapped else device, blocks).of_all([(0, blocks.block_count)])
    assert next(pieces).offset == 0
    assert device.hangs.wait(30)
    pieces.close()
    assert device.interrupted.is_set()
    assert device.reads == [0, CHUNK_BYTES]
