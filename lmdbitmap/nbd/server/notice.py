"""How a connection announces that it is about to wait, or has waited, to the thread that also serves others."""

from __future__ import annotations

from collections.abc import Callable


def nobody() -> None:
    """Ignore the notice."""


class Notice:
    """A replaceable callback: `give()` calls `to()` in the current thread."""

    def __init__(self) -> None:
        self.to: Callable[[], None] = nobody

    def give(self) -> None:
        self.to()
