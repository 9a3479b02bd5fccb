"""How long a run waits for others, all its waits together."""

from __future__ import annotations

import time
from typing import Final


class Patience:
    """`limit_s` from now on; 0 is none."""

    def __init__(self, limit_s: float) -> None:
        self._until_s = time.monotonic() + limit_s if limit_s > 0 else 0.0

    @property
    def left_s(self) -> float:
        return max(self._until_s - time.monotonic(), 0.0) if self._until_s else 0.0


NO_PATIENCE: Final = Patience(0)
