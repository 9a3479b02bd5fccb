"""Proves the images of a backup by their digests, beside other work.

A digest that fits says that every byte is what it was when the backup was made. To compute it all of the file is read,
so who needs a few bytes of a large chain may do without.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from lmdbitmap.backup_chain import Image
from lmdbitmap.errors import FormatError, os_errors_at
from lmdbitmap.repository import sha256_of

_USE_ANOTHER = "restore an earlier backup, or get the file from a copy of the repository"


def prove(images: Sequence[Image], stopped: Callable[[], bool] = lambda: False) -> None:
    """Raise `FormatError` for an image that is not to the bit what the manifest says; give up if `stopped` says so."""
    for image in images:
        path, fd = image.device.path, image.device.fd
        assert fd is not None
        with os_errors_at(path):
            found = sha256_of(fd, stopped)
        if stopped():
            return
        if found != image.entry.sha256:
            raise FormatError(
                path, expected=f"SHA-256 {image.entry.sha256}", found=found, next_step=_USE_ANOTHER
            )


@contextlib.contextmanager
def proven_beside(images: Sequence[Image]) -> Iterator[Future[None]]:
    """The same in a thread of its own, until the block ends; the future's result raises what is wrong."""
    stop = threading.Event()
    with ThreadPoolExecutor(max_workers=1) as beside:
        try:
            yield beside.submit(prove, images, stop.is_set)
        finally:
            stop.set()
