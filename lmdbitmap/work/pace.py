"""A limit on the rate at which a disk is read, so that guests keep the host's disks and network."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

from lmdbitmap.errors import InvalidArgument

LEAST_BYTES_PER_S: Final = 1 << 20
"""At this rate one read takes a second or two, so ending a backup takes no longer."""


class Pace:
    """Admits reads at `bytes_per_s` on average. Idle time earns no credit. Safe for many threads."""

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
        """Return when `length` bytes may be read, or earlier if `sleep_s` returns early."""
        with self._lock:
            now_s = self._now_s()
            begin_s = max(self._next_s, now_s)
            self._next_s = begin_s + length / self._bytes_per_s
        if begin_s > now_s:
            sleep_s(begin_s - now_s)


def pace_of(bytes_per_s: int | None) -> Pace | None:
    return None if bytes_per_s is None else Pace(bytes_per_s)
