"""Collects failures by name, so that one bad disk does not stop a run for the others."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from lmdbitmap.errors import LmdbitmapError, error_from_os
from lmdbitmap.work.progress import Progress


class Failures:
    """The errors of a run, by name. With `at_once` nothing is collected: the first error ends the run.

    Errors of the classes `never` end the run too.
    """

    def __init__(self, *, at_once: bool = False, never: tuple[type[LmdbitmapError], ...] = ()) -> None:
        self.at_once = at_once
        self._never = never
        self.errors: dict[str, LmdbitmapError] = {}
        """By name, in the order of the failures."""

    def __contains__(self, name: object) -> bool:
        return name in self.errors

    @contextlib.contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Collect an error that the block raises under `name`."""
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
        """Return `listener`, wrapped so that any exception it raises ends the run: that is how a run is cancelled."""
        if listener is None:
            return None

        def tell(done: int, total: int) -> None:
            try:
                listener(done, total)
            except BaseException:
                self.at_once = True
                raise

        return tell
