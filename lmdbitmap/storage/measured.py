"""A store that measures its commits, to report how long writers waited for them.

Stores of one path in one process share their environment, so every disk can have its own measured store.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from lmdbitmap.storage.environment import Environment
from lmdbitmap.store import Store, Writer
from lmdbitmap.work.latencies import Latencies

T = TypeVar("T")


class MeasuredStore(Store):
    """`commits` are all transactions asked of this object, the wait for other writers of the store included."""

    def __init__(self, path: str, shared: Environment) -> None:
        super().__init__(path, shared)
        self.commits = Latencies()
        self._counting = threading.Lock()

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> MeasuredStore:
        opened = super().open(path)
        assert isinstance(opened, MeasuredStore)
        return opened

    def update(self, change: Callable[[Writer], T]) -> T:
        begun_ns = time.perf_counter_ns()
        try:
            return super().update(change)
        finally:
            duration_ns = time.perf_counter_ns() - begun_ns
            with self._counting:
                self.commits.count(duration_ns)

    def __enter__(self) -> MeasuredStore:
        return self
