"""What of a device is data and what reads as zeroes, run by run, in pieces small enough to hold in memory.

Holes are found by asking, and not even read unless they cover a block in part only. Other zeroes are found by
looking, block by block. Where every question travels, as to an NBD server, small runs are read together, and without
asking.

A thread reads ahead by two buffers, so that what takes its time to read does so while what came before is put
somewhere. While the processor for that is left to a guest, as the device says in its `spared_processors`, the kernel is
told ahead what will be read: an image that is not in memory is copied nearly twice as fast.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, Protocol, TypeAlias

from lmdbitmap.bits import Run
from lmdbitmap.buffers import new_buffer
from lmdbitmap.crew import Follower, Spared
from lmdbitmap.geometry import Geometry
from lmdbitmap.interfaces import Allocation
from lmdbitmap.pace import Pace

CHUNK_BYTES = 1 << 20
"""Read at once, unless a block is larger, or the device says more in its `chunk_bytes`. Two and four times as much was
no faster, and takes more memory."""

SMALL_BYTES = CHUNK_BYTES // 4
"""Runs up to here are read together with others."""

_MOST_FILLED = 2
"""Buffers that are filled while the pieces of another are looked at."""

_MOST_AHEAD = 64
"""Zeroes take no buffer, and wait behind what is being read."""


class Borrower(Protocol):
    """Whoever takes pieces, and uses up to `most_held` buffers for longer than until the next piece."""

    @property
    def most_held(self) -> int: ...
    def let_go(self, buffer: bytearray) -> None:
        """Return when the buffer can be filled anew. What it raises ends the reading."""


ReadMany: TypeAlias = Callable[[Sequence[tuple[memoryview, int]]], None]
"""Fills every (buffer, offset), many at a time."""
WillNeed: TypeAlias = Callable[[int, int], None]
"""Is told (offset, length)."""


class Readable(Protocol):
    """What copying a device takes of a `BlockDevice`."""

    @property
    def size(self) -> int: ...
    def pread_into(self, buffer: memoryview, offset: int) -> None: ...
    def allocation(self, offset: int, length: int) -> Iterator[Allocation]: ...


class Ways(NamedTuple):
    """How a device is best read: what it says of itself in attributes of these names, or what goes for any."""

    pread_many: ReadMany | None
    """Of a device to which every question travels."""
    will_need: WillNeed | None
    """Of a device that can begin to read before that is waited for."""
    interrupt: Callable[[], None]
    """Has a read that hangs fail, from any thread."""
    chunk_bytes: int
    spared: Spared
    """What it says at this moment of its `spared_processors`, to be left to others while it is read."""


def ways_of(device: Readable) -> Ways:
    if isinstance(device, Metered):
        return device.ways
    return Ways(
        getattr(device, "pread_many", None),
        getattr(device, "will_need", None),
        getattr(device, "interrupt", _nothing),
        getattr(device, "chunk_bytes", CHUNK_BYTES),
        partial(getattr, device, "spared_processors", 0),
    )


def _nothing() -> None:
    """A device that cannot hang, or nobody can help it."""


class Metered:
    """A device, and how much of it was read: no faster than `pace` allows."""

    def __init__(self, device: Readable, pace: Pace | None = None) -> None:
        self._device = device
        self._pace = pace
        self._ways = ways_of(device)
        self.ways = self._ways
        """The same, metered; what is announced is when it is read."""
        if self._ways.pread_many is not None:
            self.ways = self._ways._replace(pread_many=self._pread_many)
        self.bytes_read = 0
        self._counting = threading.Lock()

    @property
    def size(self) -> int:
        return self._device.size

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        self._admit(len(buffer))
        self._device.pread_into(buffer, offset)

    def _pread_many(self, parts: Sequence[tuple[memoryview, int]]) -> None:
        assert self._ways.pread_many is not None
        self._admit(sum(len(buffer) for buffer, _ in parts))
        self._ways.pread_many(parts)

    def _admit(self, length: int) -> None:
        if self._pace is not None:
            self._pace.admit(length)
        with self._counting:
            self.bytes_read += length

    def allocation(self, offset: int, length: int) -> Iterator[Allocation]:
        return self._device.allocation(offset, length)


class Piece(NamedTuple):
    """Bytes of the device; `data` is None where they are zeroes, and else holds them until the next piece comes."""

    offset: int
    length: int
    data: memoryview | None


class _Read(NamedTuple):
    """Ranges (offset, length) of the device that one buffer has room for; `together` if they are small runs."""

    places: Sequence[tuple[int, int]]
    together: bool = False


class _Ahead(NamedTuple):
    """The next pieces; `answer` waits until their buffer is filled. Zeroes have none."""

    answer: Callable[[], Sequence[Piece]]
    buffer: bytearray | None = None


class Pieces:
    """Reads runs of `blocks`, which are as large as what is told apart: a block is data if any byte of it is."""

    def __init__(self, device: Readable, blocks: Geometry, borrower: Borrower | None = None) -> None:
        self._device = device
        self._borrower = borrower
        self._ways = ways_of(device)
        self._blocks = blocks
        self._chunk_bytes = max(self._ways.chunk_bytes, blocks.granularity)
        self._zeroes = bytes(blocks.granularity)

    def of_all(self, runs: Iterable[Run]) -> Generator[Piece, None, None]:
        """The runs, which ascend, without a gap in one of them. Raises `OSError` as the device does.

        Close it where it is left before its end: its thread may be reading. A device that can be interrupted is, and is
        of no use afterwards.
        """
        held = 0 if self._borrower is None else self._borrower.most_held
        ahead: deque[_Ahead] = deque()
        reader: Follower[Sequence[Piece]] = Follower(spared=self._ways.spared)
        free = self._buffers(held)
        try:
            for step in self._steps(runs):
                while len(ahead) > _MOST_AHEAD or len(free) <= held:
                    yield from _taken(ahead, free)
                if isinstance(step, _Read):
                    buffer = free.popleft()
                    if self._borrower is not None:
                        self._borrower.let_go(buffer)
                    if not reader.is_beside:
                        self._announce(step)
                    reader.hand(partial(self._read, step, buffer))
                    ahead.append(_Ahead(reader.answer, buffer))
                elif ahead:
                    ahead.append(_Ahead(partial(tuple, [step])))
                else:
                    yield step
            while ahead:
                yield from _taken(ahead, free)
        except BaseException:
            self._ways.interrupt()
            raise
        finally:
            reader.close()

    def _announce(self, step: _Read) -> None:
        if self._ways.will_need is not None:
            for offset, length in step.places:
                self._ways.will_need(offset, length)

    def _buffers(self, held: int) -> deque[bytearray]:
        """One to look at, some to fill ahead, and `held`: so many of the last that are free may still be in use."""
        length = min(self._chunk_bytes, self._blocks.size)
        return deque(new_buffer(length) for _ in range(1 + _MOST_FILLED + held))

    # -- what to read --------------------------------------------------------------------------------------

    def _steps(self, runs: Iterable[Run]) -> Iterator[Piece | _Read]:
        together: list[tuple[int, int]] = []
        for run in runs:
            offset, length = self._blocks.bytes_of(*run)
            is_small = self._ways.pread_many is not None and length <= SMALL_BYTES
            if together and (not is_small or sum(size for _, size in together) + length > self._chunk_bytes):
                yield _Read(together, together=True)
                together = []
            if is_small:
                together.append((offset, length))
            else:
                yield from self._steps_of(run)
        if together:
            yield _Read(together, together=True)

    def _steps_of(self, run: Run) -> Iterator[Piece | _Read]:
        for start, stop, zero in self._parts(run):
            offset, length = self._blocks.bytes_of(start, stop)
            if zero:
                yield Piece(offset, length, None)
                continue
            for position in range(offset, offset + length, self._chunk_bytes):
                yield _Read([(position, min(self._chunk_bytes, offset + length - position))])

    def _parts(self, run: Run) -> Iterator[tuple[int, int, bool]]:
        """The run in parts (first block, stop, whether the device knows that all of it is zero)."""
        position, stop = run
        offset, length = self._blocks.bytes_of(position, stop)
        for part in self._device.allocation(offset, length):
            zero = self._blocks.blocks_inward(offset, part.length) if part.zero else range(0)
            if zero:
                if position < zero.start:
                    yield position, zero.start, False
                yield zero.start, zero.stop, True
                position = zero.stop
            offset += part.length
        if position < stop:
            yield position, stop, False

    # -- reading, in the thread that does ------------------------------------------------------------------

    def _read(self, step: _Read, buffer: bytearray) -> list[Piece]:
        view = memoryview(buffer)
        ends = list(itertools.accumulate(length for _, length in step.places))
        places = [(end - length, end, at) for (at, length), end in zip(step.places, ends, strict=True)]
        if step.together and self._ways.pread_many is not None:
            self._ways.pread_many([(view[begin:end], at) for begin, end, at in places])
        else:
            for begin, end, at in places:
                self._device.pread_into(view[begin:end], at)
        return [
            Piece(at + start - begin, stop - start, None if zero else view[start:stop])
            for begin, end, at in places
            for start, stop, zero in self._stretches(buffer, begin, end)
        ]

    def _stretches(self, buffer: bytearray, begin: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """Stretches (start, stop, zero) of the buffer's [begin, end) in blocks, neighbours differing."""
        start, was_zero = begin, self._is_zero(buffer, begin, end)
        for position in range(begin + len(self._zeroes), end, len(self._zeroes)):
            zero = self._is_zero(buffer, position, end)
            if zero is not was_zero:
                yield start, position, was_zero
                start, was_zero = position, zero
        yield start, end, was_zero

    def _is_zero(self, buffer: bytearray, start: int, end: int) -> bool:
        """`startswith` is a memcmp: data that is not zero mostly differs early, and costs next to nothing."""
        stop = start + len(self._zeroes)
        if stop <= end:
            return buffer.startswith(self._zeroes, start, stop)
        return buffer.startswith(self._zeroes[: end - start], start, end)


def _taken(ahead: deque[_Ahead], free: deque[bytearray]) -> Iterator[Piece]:
    """The next pieces; their buffer is free when they were looked at."""
    answer, buffer = ahead.popleft()
    yield from answer()
    if buffer is not None:
        free.append(buffer)
