"""Whether guests are quiet; then a copy of their disks may use the processor that is theirs (crew.py).

The serving threads do nothing for this: requests are counted anyway, and `look` compares the counts. A request is
noticed by the next look after it, and counts from that look on: the answer is never "quiet" within `QUIET_S` after a
look that found a request. A thread that is awake anyway looks now and then, so that there is a history when the
question comes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

QUIET_S: Final = 1.0
"""Seconds without a request. A guest that sends requests more often finds its processor idle each time."""


class Quiet:
    """Whether the clients counted by `requests` (requests answered) are quiet. For any thread."""

    def __init__(self, requests: Callable[[], int], clock_s: Callable[[], float] = time.monotonic) -> None:
        self._requests = requests
        self._clock_s = clock_s
        self._lock = threading.Lock()
        self._seen = 0
        self._heard_s: float | None = None

    def look(self) -> bool:
        """Return whether no look has found a new request for `QUIET_S`, or ever."""
        with self._lock:
            requests, now_s = self._requests(), self._clock_s()
            if requests != self._seen:
                self._seen, self._heard_s = requests, now_s
            return self._heard_s is None or now_s - self._heard_s >= QUIET_S
