"""Several things are done in one run, and what is wrong with one of them is no reason to leave the others out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from lmdbitmap.errors import LmdbitmapError, error_from_os
from lmdbitmap.work.progress import Progress


class Failures:
    """Which ones failed, and why. With `at_once` nothing is set aside: whatever is raised ends the run.

    Errors of the classes `never` are not set aside either.
    """

    def __init__(self, *, at_once: bool = False, never: tuple[type[LmdbitmapError], ...] = ()) -> None:
        self.at_once = at_once
        self._never = never
        self.errors: dict[str, LmdbitmapError] = {}
        """By the names of those that failed, in the order in which they did."""

    def __contains__(self, name: object) -> bool:
        return name in self.errors

    @contextlib.contextmanager
    def of(self, name: str) -> Iterator[None]:
        """What fails in the block is about the one called `name`, and is set aside."""
        try:
            yield
        except LmdbitmapError as error:
            if self.at_once or isinstance(error, self._never):
                raise
            self.errors[name] = error
        except OSError as refusal:
            if self.at_once:
                raise
            self.errors[name] = error_from_os(str(refusal.filename or name), refusal)

    def heeding(self, listener: Progress | None) -> Progress | None:
        """The listener, whose exceptions end the run, of whatever class they are: so it is cancelled."""
        if listener is None:
            return None

        def tell(done: int, total: int) -> None:
            try:
                listener(done, total)
            except BaseException:
                self.at_once = True
                raise

        return tell
