"""Writes pieces of a disk onto a copy of it, in one of two ways: blindly, or after a look at what is there.

- `Overwriting`, where it is known what changed: data is written, zeroes are zeroed.
- `Mending`, where it is not: the copy is read, and what differs is written, in pages. What both know to be zero
  is not read. So one that was interrupted goes on where it was.
"""

from __future__ import annotations

from typing import Protocol

from lmdbitmap.pieces import Piece
from lmdbitmap.putting_back import differences
from lmdbitmap.target import Target

_CHUNK_BYTES = 1 << 20
_ZEROES = bytes(_CHUNK_BYTES)


class Mirror(Protocol):
    """`bytes_compared` were read of the copy; `bytes_written` were data, `bytes_zeroed` zeroes."""

    bytes_compared: int
    bytes_written: int
    bytes_zeroed: int

    def put(self, piece: Piece) -> None: ...


class Overwriting:
    def __init__(self, target: Target) -> None:
        self._target = target
        self.bytes_compared = self.bytes_written = self.bytes_zeroed = 0

    def put(self, piece: Piece) -> None:
        if piece.data is not None:
            self._target.write_many([(piece.offset, piece.data)])
            self.bytes_written += piece.length
        elif not self._target.is_fresh:
            self._target.write_zeroes(piece.offset, piece.length)
            self.bytes_zeroed += piece.length


class Mending:
    def __init__(self, target: Target) -> None:
        self._target = target
        self._present = bytearray(_CHUNK_BYTES)
        self.bytes_compared = self.bytes_written = self.bytes_zeroed = 0

    def put(self, piece: Piece) -> None:
        if piece.data is None:
            self._mend_zeroes(piece.offset, piece.length)
            return
        for start in range(0, piece.length, _CHUNK_BYTES):
            self._mend_data(piece.offset + start, piece.data[start : start + _CHUNK_BYTES])

    def _mend_data(self, offset: int, wanted: memoryview) -> None:
        self._read(offset, len(wanted))
        found = differences(bytes(wanted), self._present, len(wanted))
        writes = [(offset + start, wanted[start:stop]) for start, stop in found]
        if writes:
            self._target.write_many(writes)
        self.bytes_written += sum(len(data) for _, data in writes)

    def _mend_zeroes(self, offset: int, length: int) -> None:
        for part in self._target.allocation(offset, length):
            if not part.zero:
                for start in range(offset, offset + part.length, _CHUNK_BYTES):
                    self._mend_stretch(start, min(_CHUNK_BYTES, offset + part.length - start))
            offset += part.length

    def _mend_stretch(self, offset: int, length: int) -> None:
        self._read(offset, length)
        for start, stop in differences(_ZEROES, self._present, length):
            self._target.write_zeroes(offset + start, stop - start)
            self.bytes_zeroed += stop - start

    def _read(self, offset: int, length: int) -> None:
        self._target.pread_into(memoryview(self._present)[:length], offset)
        self.bytes_compared += length
