"""Watches whether an image is still found under its name. If it is not, its data lives only as long as its owner.

If a file is removed or replaced while a process has it open, that process goes on reading and writing the old file as
if nothing had happened, guest and backups included. The old file ends with that process, and everything written since
with it. So the operator has to be told while there is time for a backup.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from typing import Final

from lmdbitmap.images.image import are_one, is_far

log = logging.getLogger(__name__)

_PATIENCE_S: Final = 0.02
WHILE_THERE_IS_TIME: Final = (
    "do not stop the process that serves it before you have a backup, or a copy of its NBD export: what the guest"
    " wrote ends with that process"
)


def why_lost(image: str, fd: int) -> str | None:
    """Return why `image` no longer names the file that is open as `fd`; None if it does, or nobody can tell."""
    try:
        there = os.stat(image)
    except (FileNotFoundError, NotADirectoryError):
        return f"{image} was removed, or moved away"
    except OSError:
        return None  # unknown
    try:
        here = os.fstat(fd)
    except OSError:  # for instance if another host removed the file
        return f"{image} is not the file any more that is open, and that one is gone"
    return None if are_one(here, there) else f"{image} is another file now than the one that is open"


class Whereabouts:
    """Logs when the image of disk `name` is lost, and when it is found again. `fd` may be None for an NBD export."""

    def __init__(self, name: str, image: str, fd: int | None) -> None:
        self._name = name
        self._image = image
        self._fd = None if is_far(image) else fd
        self._lost: str | None = None
        self._looking = threading.RLock()
        """Its owner is known, so that who is interrupted just when it has it does not keep it."""

    def look(self) -> str | None:
        """Return why the image's name is lost, or None. Safe for many threads.

        Of a file system that does not answer whoever looks there, the others are told what was known before.
        """
        try:
            if not self._looking.acquire(timeout=_PATIENCE_S):
                return self._lost
            lost = None if self._fd is None else why_lost(self._image, self._fd)
            before, self._lost = self._lost, lost
        finally:
            with contextlib.suppress(RuntimeError):  # it is not this thread's
                self._looking.release()
        if lost is not None and before is None:
            log.error("disk %s: %s; %s", self._name, lost, WHILE_THERE_IS_TIME)
        elif lost is None and before is not None:
            log.warning("disk %s: its image is in its place again", self._name)
        return lost

    def end(self) -> None:
        """Stop watching: the image is not open any more."""
        with self._looking:
            self._fd = None
