"""The limit on open files, which is set for programs with few of them."""

from __future__ import annotations

import contextlib
import resource


def allow_many_descriptors() -> None:
    """Raise the limit of open descriptors to the maximum: disks must not use up those of other disks.

    A connection takes up to five descriptors, and so does a disk that is backed up.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    # The kernel may allow fewer by now than when we were started.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
