"""How many processors a job has to spare, in each way that makes a difference to its threads."""

from __future__ import annotations

import random
from typing import Final

from lmdbitmap.work.crew import Spared, none_spared

MORE_THAN_THERE_ARE: Final = 1 << 20


def all_spared() -> int:
    """No thread has one."""
    return MORE_THAN_THERE_ARE


class NowAndThen:
    """A guest that is quiet, and is not, by lot."""

    def __init__(self, seed: int = 0) -> None:
        self._lot = random.Random(seed)

    def __call__(self) -> int:
        return self._lot.choice([0, MORE_THAN_THERE_ARE])


EACH: Final[dict[str, Spared]] = {
    "with threads": none_spared,
    "without threads": all_spared,
    "now and then": NowAndThen(),
}
