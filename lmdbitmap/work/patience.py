"""How long a run waits for a lock or for an answer."""

from __future__ import annotations

import time
from typing import Final

from lmdbitmap.errors import InvalidArgument

MOST_S: Final = 10_000_000
"""Four months: a value that all of the system's own time-outs accept."""
_PAUSE_S: Final = 0.1


def require_limits(*limits_s: float) -> None:
    """Raise `InvalidArgument` unless every limit is more than 0 and at most `MOST_S`."""
    for limit_s in limits_s:
        if not 0 < limit_s <= MOST_S:
            raise _no_limit(limit_s)


def _no_limit(limit_s: float) -> InvalidArgument:
    return InvalidArgument(
        f"{limit_s:g} seconds are no time limit", next_step=f"name more than 0, and {MOST_S:,} at most"
    )


class Patience:
    """Lasts `limit_s` from now on, for all waits together; 0 means none. Raises `InvalidArgument` for a bad limit."""

    def __init__(self, limit_s: float) -> None:
        if not 0 <= limit_s <= MOST_S:
            raise _no_limit(limit_s)
        self._until_s = time.monotonic() + limit_s if limit_s > 0 else 0.0

    @property
    def left_s(self) -> float:
        return max(self._until_s - time.monotonic(), 0.0) if self._until_s else 0.0

    def pause(self) -> None:
        """Sleep until it is time to look again."""
        time.sleep(min(_PAUSE_S, self.left_s))


NO_PATIENCE: Final = Patience(0)
