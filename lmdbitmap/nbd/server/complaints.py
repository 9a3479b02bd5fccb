"""Logs what goes wrong for one client, without flooding the log.

A guest retries what failed, and a hostile client may break the protocol a million times. So the first complaint of each
kind is logged at once. After that at most one per `_SILENCE_S` is logged, with the number left out in between. There is
no thread and no timer: a new complaint checks the clock. A kind is made of words that the client cannot choose, so the
number of kinds is bounded.

A client that reconnects is a new client each time. So `_MOST_TOLD` complaints of a kind are logged in `_SILENCE_S` for
all clients of a disk together, and as many for all clients that have not named a disk yet (`Volume`).
"""

from __future__ import annotations

import logging
import ssl
import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Final

from lmdbitmap.errors import FormatError

_log = logging.getLogger(__name__)

_SILENCE_S: Final = 60.0
_MOST_TOLD: Final = 10


class Volume:
    """How much is told of all clients of a server together. Safe for many threads."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._kinds: dict[Hashable, _Spell] = {}

    def admits(self, kind: Hashable, times: int = 1) -> int | None:
        """Ask before telling something that happened `times`: None says to be silent about it, which is counted.

        Otherwise the answer is how many of the kind were left untold so far.
        """
        now_s = self._clock()
        with self._lock:
            spell = self._kinds.get(kind)
            if spell is None or now_s - spell.since_s >= _SILENCE_S:
                untold = 0 if spell is None else spell.untold
                self._kinds[kind] = _Spell(now_s)
                return untold
            if spell.told == _MOST_TOLD:
                spell.untold += times
                return None
            spell.told += 1
            return 0


@dataclass(slots=True)
class _Spell:
    since_s: float
    told: int = 1
    untold: int = 0


class Complaints:
    """Complaints about a client, and about the disk it has chosen. For one thread at a time."""

    def __init__(
        self,
        client: str = "a client",
        disk: str | None = None,
        volume: Volume | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.names = {"disk": disk, "client": client}
        """Fields for logs that programs read."""
        self.whom: Final = client if disk is None else f"disk {disk}: {client}"
        self._disk = disk
        self._volume = volume or Volume(clock=clock)
        self._clock = clock
        self._told_s: dict[Hashable, float] = {}
        self._untold: dict[Hashable, int] = {}

    def refused(self, command: str, place: str, *, expected: str, found: object) -> None:
        """Log a request that is refused because the client made a mistake."""
        sentence = f": {command} of {place} is refused: expected {expected}, found {found}"
        self._add((command, expected), sentence)

    def failed(self, command: str, place: str, failure: Exception, *, times: int = 1) -> None:
        """Log a request that failed; `times` is how many failed alike, this one included."""
        kind = command, getattr(failure, "errno", None) or type(failure).__name__
        why = "there is no memory for it" if isinstance(failure, MemoryError) else failure
        self._add(kind, f": {command} of {place} failed: {why}", times)

    def turned_away(self, why: str) -> None:
        """Log that there is no room for the client. `why` has few forms."""
        self._add(("turned away", why), f" was turned away: {why}")

    def turned_down(self, refusal: FormatError) -> None:
        """Log a handshake option that is answered with an error."""
        self._add(refusal.expected, f": {refusal}")

    def dropped(self, failure: FormatError | ssl.SSLError) -> None:
        """Log that the client is dropped. A reason it was already turned down for is not logged again."""
        if isinstance(failure, FormatError):
            self._add(failure.expected, f" was dropped: {failure}")
        else:
            self._add("TLS", f" was dropped: TLS failed: {failure}")

    def _add(self, kind: Hashable, sentence: str, times: int = 1) -> None:
        now_s, untold = self._clock(), self._untold.pop(kind, 0)
        told_s = self._told_s.get(kind)
        if told_s is not None and now_s - told_s < _SILENCE_S:
            self._untold[kind] = untold + times
            return
        others = self._volume.admits((self._disk, kind), untold + times)
        if others is None:
            return
        untold += others
        self._told_s[kind] = now_s
        self._untold[kind] = times - 1
        since = f" ({untold} more like it since that was last told)" if untold else ""
        _log.warning("%s%s%s", self.whom, sentence, since, extra=self.names)
