"""Whether guests are quiet: then whoever copies their disks may have the processor that is theirs (crew.py).

Nothing here is done by those who serve: requests are counted anyway, and whoever looks compares. So a request is
noticed by the next look after it, and each look is a whole quiet time away from being believed: the answer is never
"quiet" within `QUIET_S` after a look that found a request. Somebody who is awake anyway looks now and then, so that
what is known does not begin with the question.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

QUIET_S: Final = 1.0
"""Without a request. A guest that asks for something more often is to find its processor idle each time."""


class Quiet:
    """Of all whose `requests` are counted there, answered ones; for any thread."""

    def __init__(self, requests: Callable[[], int], clock_s: Callable[[], float] = time.monotonic) -> None:
        self._requests = requests
        self._clock_s = clock_s
        self._lock = threading.Lock()
        self._seen = 0
        self._heard_s: float | None = None

    def look(self) -> bool:
        """Whether nobody has asked for anything for `QUIET_S`, or ever."""
        with self._lock:
            requests, now_s = self._requests(), self._clock_s()
            if requests != self._seen:
                self._seen, self._heard_s = requests, now_s
            return self._heard_s is None or now_s - self._heard_s >= QUIET_S
