"""Whether the image of a disk is still to be found by its name. Where it is not, its data lives as long as its owner.

A file that is removed, or replaced by another one, under the process that has it open is written and read on as if
nothing had happened, guest and backups included. It ends with that process, and everything written since with it. So
somebody has to be told while there is time for a backup.
"""

from __future__ import annotations

import logging
import os
import threading
from typing import Final

from lmdbitmap.images.image import are_one, is_far

log = logging.getLogger(__name__)

WHILE_THERE_IS_TIME: Final = (
    "do not stop the process that serves it before you have a backup, or a copy of its NBD export: what the guest"
    " wrote ends with that process"
)


def why_lost(image: str, fd: int) -> str | None:
    """What became of the name of the image that is open as `fd`, if it does not lead there any more."""
    try:
        there = os.stat(image)
    except (FileNotFoundError, NotADirectoryError):
        return f"{image} was removed, or moved away"
    except OSError:
        return None  # nobody can say
    try:
        here = os.fstat(fd)
    except OSError:  # as of a file that another host removed
        return f"{image} is not the file any more that is open, and that one is gone"
    return None if are_one(here, there) else f"{image} is another file now than the one that is open"


class Whereabouts:
    """Tells the log when the image of disk `name` is lost, and when it is found again. `fd` is None of a far one."""

    def __init__(self, name: str, image: str, fd: int | None) -> None:
        self._name = name
        self._image = image
        self._fd = None if is_far(image) else fd
        self._lost: str | None = None
        self._looking = threading.Lock()

    def look(self) -> str | None:
        """What became of the image's name, if it is lost. Safe for many threads."""
        with self._looking:
            lost = None if self._fd is None else why_lost(self._image, self._fd)
            before, self._lost = self._lost, lost
        if lost is not None and before is None:
            log.error("disk %s: %s; %s", self._name, lost, WHILE_THERE_IS_TIME)
        elif lost is None and before is not None:
            log.warning("disk %s: its image is in its place again", self._name)
        return lost

    def end(self) -> None:
        """The image is not open any more: there is nothing to tell."""
        with self._looking:
            self._fd = None
