"""Servers that have no memory to listen for clients."""

from __future__ import annotations

import selectors
from typing import Any

import pytest


def lack_memory_to_listen(patch: pytest.MonkeyPatch, times: int = 3) -> list[int]:
    """From now on there is none, that many times; the list's only number says how often still."""
    lacks, select = [times], selectors.DefaultSelector.select

    def without_memory(selector: selectors.DefaultSelector, timeout: float | None = None) -> Any:
        if lacks[0]:
            lacks[0] -= 1
            raise MemoryError
        return select(selector, timeout)

    patch.setattr(selectors.DefaultSelector, "select", without_memory)
    return lacks
