"""Which of two ways is faster here: each is tried in turns, and the better one is kept for a while.

Whether READ data should be copied or sent by reference, no constant can say: the processor, its memory and the client
decide. Either way was seen to be twice as fast as the other one on some machine.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Final

WINDOW_BYTES: Final = 16 << 20
"""Bytes after which the clock is looked at: a few milliseconds of a busy connection."""
TRIES: Final = 3
"""Windows of each way in a trial. The best of them counts: what disturbs one only makes it longer."""
KEPT_WINDOWS: Final = 256
_CLEARLY: Final = 0.95


class Trial:
    """`prefers_first` says which way to go now. Tell it by `count` how many bytes went that way.

    The first way stays preferred unless the other one is clearly faster: a client that asks for little sees no
    difference.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.prefers_first = True
        self._clock = clock
        self._left_bytes = WINDOW_BYTES
        self._since_s = clock()
        self._window = 0
        self._best_s = {True: math.inf, False: math.inf}

    def count(self, length_bytes: int) -> None:
        self._left_bytes -= length_bytes
        if self._left_bytes <= 0:
            self._end_window()

    def _end_window(self) -> None:
        now_s = self._clock()
        took_s, self._since_s, self._left_bytes = now_s - self._since_s, now_s, WINDOW_BYTES
        best_s, way = self._best_s, self.prefers_first
        self._window += 1
        if self._window <= 2 * TRIES:
            best_s[way] = min(best_s[way], took_s)
            self.prefers_first = not way if self._window < 2 * TRIES else self._first_is_better()
        elif self._window == 2 * TRIES + KEPT_WINDOWS:
            self._window = 0
            self._best_s = {True: math.inf, False: math.inf}

    def _first_is_better(self) -> bool:
        return self._best_s[False] > _CLEARLY * self._best_s[True]
