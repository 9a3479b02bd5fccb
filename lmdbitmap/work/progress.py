"""Progress reports of a job. A listener ends the job by raising an exception."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeAlias

Progress: TypeAlias = Callable[[int, int], None]
"""Called with (bytes done, bytes in all), in the thread that works; an exception from it ends the work."""

_BYTES_BETWEEN_REPORTS: Final = 4 << 20
_OF_LISTENER: Final = "_is_of_a_listener"


def is_of_a_listener(error: OSError) -> bool:
    """Return whether a listener raised it, such as one whose log is full: no disk of the job refused anything."""
    return _OF_LISTENER in vars(error)


class Report:
    """Reports progress every few megabytes, over all images of a run."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0
        self._told = 0

    def advance(self, length: int) -> None:
        # Rounding outward to clusters may copy more than was dirty.
        self._done = min(self._done + length, self._total)
        news = self._done - self._told
        if news >= _BYTES_BETWEEN_REPORTS or (news and self._done == self._total):
            self._told = self._done
            self.repeat()

    def repeat(self) -> None:
        """Report again, even without progress: the listener may want to cancel."""
        if self._progress is None:
            return
        try:
            self._progress(self._done, self._total)
        except OSError as error:
            vars(error)[_OF_LISTENER] = True
            raise

    def reach(self, done: int) -> None:
        """Note that at least `done` bytes are done."""
        self.advance(max(done - self._done, 0))

    def reach_all_but(self, rest: int) -> None:
        """Note that at most `rest` bytes are still to be done."""
        self.reach(self._total - rest)

    def expect(self, length: int) -> None:
        """Add `length` bytes to the total announced at the start."""
        self._total += length
