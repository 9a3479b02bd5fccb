"""What an image is known by, taken so that it can be compared with later; continuity.py does that."""

from __future__ import annotations

import os
import time
from typing import Final

from lmdbitmap.interfaces import ImageIdentity, TrackableDevice

_CLOCK_REALTIME_COARSE: Final = 5
"""Linux has it; Python has no name for it."""
_SECOND_NS: Final = 1_000_000_000
_LONGEST_STEP_NS: Final = 2 * _SECOND_NS
_STEP_POLL_S: Final = 0.001


def identity_to_keep(device: TrackableDevice) -> ImageIdentity:
    """The image's identity, when it is to be compared with much later: it survives a power cut, mtime included.

    The data was flushed before. But that (fdatasync) leaves the mtime in memory for half a minute, and a power
    cut would set it back, as if an older image had been put there.
    """
    identity = settled_identity(device)
    if device.fd is not None:
        os.fsync(device.fd)
    return identity


def settled_identity(device: TrackableDevice) -> ImageIdentity:
    """The image's identity, once the clock that files' times are taken from shows a later time than its mtime.

    That clock stands still for milliseconds, or for two seconds on some file systems: a stranger's write in
    the moment of our last one would leave the same mtime. Nobody may write through us meanwhile, and a block
    device was flushed.
    """
    identity = device.identity()
    step_ns = _LONGEST_STEP_NS if identity.mtime_ns % _SECOND_NS == 0 else 1
    while 0 <= time.clock_gettime_ns(_CLOCK_REALTIME_COARSE) - identity.mtime_ns < step_ns:
        time.sleep(_STEP_POLL_S)
    return identity
