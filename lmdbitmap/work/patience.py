"""How long a run waits for others: for a lock, for an answer."""

from __future__ import annotations

import time
from typing import Final

from lmdbitmap.errors import InvalidArgument

MOST_S: Final = 10_000_000
"""Four months: what the system's own time-outs can take everywhere."""
_PAUSE_S: Final = 0.1


def require_limits(*limits_s: float) -> None:
    """Raise `InvalidArgument` unless something may be given so long: time that passes, and an end of it."""
    for limit_s in limits_s:
        if not 0 < limit_s <= MOST_S:
            raise _no_limit(limit_s)


def _no_limit(limit_s: float) -> InvalidArgument:
    return InvalidArgument(
        f"{limit_s:g} seconds are no time limit", next_step=f"name more than 0, and {MOST_S:,} at most"
    )


class Patience:
    """For `limit_s` from now on, all waits together; 0 is none. Raises `InvalidArgument` for what is no time."""

    def __init__(self, limit_s: float) -> None:
        if not 0 <= limit_s <= MOST_S:
            raise _no_limit(limit_s)
        self._until_s = time.monotonic() + limit_s if limit_s > 0 else 0.0

    @property
    def left_s(self) -> float:
        return max(self._until_s - time.monotonic(), 0.0) if self._until_s else 0.0

    def pause(self) -> None:
        """Return when it is time to look again at what is waited for."""
        time.sleep(min(_PAUSE_S, self.left_s))


NO_PATIENCE: Final = Patience(0)
