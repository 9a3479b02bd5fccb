"""How a connection tells that it is about to wait, or has waited: whoever serves others in its thread minds."""

from __future__ import annotations

from collections.abc import Callable


def nobody() -> None:
    """Minds nothing."""


class Notice:
    """Goes `to` whoever it is that minds, in the thread that gives it."""

    def __init__(self) -> None:
        self.to: Callable[[], None] = nobody

    def give(self) -> None:
        self.to()
