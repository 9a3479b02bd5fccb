"""A limit to how fast a disk is read, for hosts whose disks or network a guest needs more."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

from lmdbitmap.errors import InvalidArgument

LEAST_BYTES_PER_S: Final = 1 << 20
"""What is read at once takes a second or two then: so nobody who ends a backup waits for longer."""


class Pace:
    """Admits reads at `bytes_per_s` on the average; time in which nobody reads is not made up for. For many threads."""

    def __init__(
        self,
        bytes_per_s: int,
        *,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        if bytes_per_s < LEAST_BYTES_PER_S:
            raise InvalidArgument(
                f"{bytes_per_s} bytes a second are too few",
                next_step=f"allow {LEAST_BYTES_PER_S} at least, or set no limit",
            )
        self._bytes_per_s = bytes_per_s
        self._now_s = now_s
        self._lock = threading.Lock()
        self._next_s = now_s()

    def admit(self, length: int, sleep_s: Callable[[float], object] = time.sleep) -> None:
        """Return when so many bytes may be read, or what is given to sleep returns before that."""
        with self._lock:
            now_s = self._now_s()
            begin_s = max(self._next_s, now_s)
            self._next_s = begin_s + length / self._bytes_per_s
        if begin_s > now_s:
            sleep_s(begin_s - now_s)


def pace_of(bytes_per_s: int | None) -> Pace | None:
    return None if bytes_per_s is None else Pace(bytes_per_s)
