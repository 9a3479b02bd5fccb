"""Writes pieces of a disk onto a copy of it, in one of two ways.

- `BlindMirror`, if it is known what changed: data is written, zeroes are zeroed.
- `Mending`, if it is not: the copy is read, and the pages that differ are written (differences.py).
"""

from __future__ import annotations

from typing import Protocol

from lmdbitmap.copying.pieces import Piece
from lmdbitmap.targets.differences import CHUNK_BYTES, Mender
from lmdbitmap.targets.target import Target


class Mirror(Protocol):
    """`bytes_compared` were read of the copy; `bytes_written` were data, `bytes_zeroed` zeroes."""

    bytes_compared: int
    bytes_written: int
    bytes_zeroed: int

    def put(self, piece: Piece) -> None: ...


class BlindMirror:
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


class Mending(Mender):
    def put(self, piece: Piece) -> None:
        if piece.data is None:
            self.mend_zeroes(piece.offset, piece.length)
            return
        for start in range(0, piece.length, CHUNK_BYTES):
            wanted = bytes(piece.data[start : start + CHUNK_BYTES])
            self.mend_data(piece.offset + start, wanted, len(wanted))
