"""How long a run waits for others: for a lock, for an answer."""

from __future__ import annotations

import time
from typing import Final

from lmdbitmap.errors import InvalidArgument

MOST_S: Final = 10_000_000
"""Four months: what the system's own time-outs can take everywhere."""


def require_limit(limit_s: float) -> None:
    """Raise `InvalidArgument` unless something may be given so long: time that passes, and an end of it."""
    if not 0 < limit_s <= MOST_S:
        raise InvalidArgument(
            f"{limit_s:g} is no time limit within 0..{MOST_S} seconds", next_step="name one that is"
        )


class Patience:
    """For `limit_s` from now on, all waits together; 0 is none."""

    def __init__(self, limit_s: float) -> None:
        self._until_s = time.monotonic() + limit_s if limit_s > 0 else 0.0

    @property
    def left_s(self) -> float:
        return max(self._until_s - time.monotonic(), 0.0) if self._until_s else 0.0


NO_PATIENCE: Final = Patience(0)
