"""Reads a device piece by piece, data or zeroes, for callers that write one piece after the other.

A thread reads ahead by two loads (loads.py), so that slow reads go on while earlier pieces are written. If that
thread's processor is left to a guest, as the device says in its `spared_processors`, the kernel is told ahead what will
be read: an image that is not in memory is then copied nearly twice as fast.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from functools import partial
from typing import NamedTuple

from lmdbitmap.bits import Run
from lmdbitmap.copying.loads import Loads, Stretch
from lmdbitmap.copying.readable import Readable
from lmdbitmap.geometry import Geometry
from lmdbitmap.work.buffers import new_buffer
from lmdbitmap.work.crew import Follower

_MOST_FILLED = 2
"""Buffers that are filled while the pieces of another are used."""


class Piece(NamedTuple):
    """Bytes of the device. `data` is None if they are zeroes, and is valid until the next piece comes."""

    offset: int
    length: int
    data: memoryview | None


class Pieces:
    """Reads runs of `blocks`. Data and zeroes are told apart by block: a block is data if any byte of it is."""

    def __init__(self, device: Readable, blocks: Geometry) -> None:
        self._loads = Loads(device, blocks)
        self._methods = self._loads.methods

    def of_all(self, runs: Iterable[Run]) -> Generator[Piece, None, None]:
        """Yield pieces of the ascending runs, without a gap within a run. Raises `OSError` as the device does.

        Close it if it is left before its end: its thread may be reading. The device is then interrupted, if it can be,
        and is unusable afterwards.
        """
        reader: Follower[list[Stretch]] = Follower(spared=self._methods.spared)
        free = deque(new_buffer(self._loads.buffer_bytes) for _ in range(1 + _MOST_FILLED))
        filling: deque[bytearray] = deque()
        try:
            for load in self._loads.planned(runs):
                if not free:
                    yield from _taken(reader, filling, free)
                if not reader.is_beside:
                    self._loads.announce(load)
                filling.append(free.popleft())
                reader.hand(partial(self._loads.read, load, filling[-1]))
            while filling:
                yield from _taken(reader, filling, free)
        except BaseException:
            self._methods.interrupt()
            raise
        finally:
            reader.close()


def _taken(
    reader: Follower[list[Stretch]], filling: deque[bytearray], free: deque[bytearray]
) -> Iterator[Piece]:
    """Yield the pieces of the load that was read first. Its buffer is free afterwards."""
    stretches, buffer = reader.answer(), filling.popleft()
    view = memoryview(buffer)
    for offset, length, start in stretches:
        yield Piece(offset, length, None if start is None else view[start : start + length])
    free.append(buffer)
