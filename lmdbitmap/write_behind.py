"""Writes a file in a thread of its own, while whoever has the bytes hashes them and gets the next.

    pieces.py ──▶ pwrite(data) ──▶ a thread writes `data` ────────────▶ let_go(its buffer) ──▶ pieces.py fills it anew
                       └──▶ meanwhile the caller hashes it (hashing.py)

To read, to hash and to write each take a processor a while, and all three let go of Python's lock: so a copy is a pipe
of three threads, each piece goes through it without being copied, and the slowest of the three says how fast it is.
What is small is written at once, as to hand it over would cost more.

After an error each later call raises it again.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from functools import partial
from types import TracebackType
from typing import Final

from lmdbitmap.copier import ImageFile
from lmdbitmap.crew import Follower, Spared, none_spared
from lmdbitmap.errors import os_errors_at
from lmdbitmap.hashing import ChunkHasher
from lmdbitmap.interfaces import Buffer

_BEHIND_FROM: Final = 256 << 10
"""Bytes in a write."""
_MOST_BEHIND: Final = 2
"""Writes: one is under way, and the next is there when that is done."""


class WriteBehind:
    """Writes to `file`, which `hasher` is to know. A sink for an image, and who takes pieces for it; for one thread.

    A context, which owns its thread, and ends without an error when all is written. Of the processors,
    `spared` are left to others: while none is left for that thread, all is written at once.
    """

    most_held = _MOST_BEHIND

    def __init__(self, file: ImageFile, hasher: ChunkHasher, *, spared: Spared = none_spared) -> None:
        self._file = file
        self._hasher = hasher
        hasher.before_reading = self.settle
        self._writer: Follower[None] = Follower(spared=spared, busy=2)
        self._under_way: deque[object] = deque()
        """Whose bytes are being written, oldest first."""
        self._failure: Exception | None = None

    def __enter__(self) -> WriteBehind:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.settle()
        finally:
            self._writer.close()

    def pwrite(self, data: Buffer, offset: int) -> None:
        """Write the bytes, now or soon: they are not to change before `let_go` or `settle`."""
        with self._remembering():
            view = memoryview(data)
            if len(view) >= _BEHIND_FROM and self._writer.is_beside:
                self._settle_down_to(_MOST_BEHIND - 1)
                self._writer.hand(partial(self._file.pwrite, view, offset))
                self._under_way.append(view.obj)
            else:
                self._settle_down_to(0)
                self._file.pwrite(view, offset)
            with os_errors_at(self._file.place):
                self._hasher.feed(offset, view)

    def let_go(self, buffer: bytearray) -> None:
        """Return when nothing of this buffer is still to be written."""
        with self._remembering():
            while any(owner is buffer for owner in self._under_way):
                self._settle_down_to(len(self._under_way) - 1)

    def settle(self) -> None:
        """Return when all is written."""
        with self._remembering():
            self._settle_down_to(0)

    @contextlib.contextmanager
    def _remembering(self) -> Iterator[None]:
        if self._failure is not None:
            raise self._failure
        try:
            yield
        except Exception as failure:
            self._failure = failure
            raise

    def _settle_down_to(self, most: int) -> None:
        while len(self._under_way) > most:
            self._writer.answer()
            self._under_way.popleft()
