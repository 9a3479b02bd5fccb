"""Takes an image's identity so that it can be compared later; continuity.py compares."""

from __future__ import annotations

import os
import time
from typing import Final

from lmdbitmap.errors import os_errors_at
from lmdbitmap.images.device import FileDevice
from lmdbitmap.interfaces import ImageIdentity, TrackableDevice

_CLOCK_REALTIME_COARSE: Final = 5
"""Linux has it; Python has no name for it."""
_SECOND_NS: Final = 1_000_000_000
_LONGEST_STEP_NS: Final = 2 * _SECOND_NS
_LONGEST_STEP_BELOW_A_SECOND_NS: Final = 10_000_000
_STEP_POLL_S: Final = 0.001


def identity_to_keep(device: TrackableDevice) -> ImageIdentity:
    """Return an identity that survives a power cut, mtime included, for a comparison much later.

    The caller has flushed the data. But fdatasync leaves the mtime in memory for half a minute, and a power cut would
    set it back, as if an older image had been put there.
    """
    identity = settled_identity(device)
    if device.fd is not None:
        with os_errors_at(device.path if isinstance(device, FileDevice) else "the image"):
            os.fsync(device.fd)
    return identity


def leave_late_mtime(device: TrackableDevice) -> None:
    """Set the image's mtime to now, durably: a power cut then cannot hide that data was written later.

    Through a descriptor of its own: what a failed sync says here, the next flush of the image says again.
    """
    if device.fd is None:
        return
    with os_errors_at(device.path if isinstance(device, FileDevice) else "the image"):
        fd = os.open(f"/proc/self/fd/{device.fd}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.utime(fd)
            os.fsync(fd)
        finally:
            os.close(fd)


def settled_identity(device: TrackableDevice) -> ImageIdentity:
    """Return the image's identity, once the clock that file times are taken from is later than its mtime.

    That clock advances in steps of milliseconds. Some file systems round its time down to steps of their own: FAT to
    two seconds, exFAT to 10 ms, NTFS to 100 ns. A foreign write in the same step as our last one would leave the same
    mtime. The caller must let nobody write through us meanwhile, and must have flushed a block device.
    """
    identity = device.identity()
    step_ns = _longest_step_ns(identity.mtime_ns)
    while 0 <= time.clock_gettime_ns(_CLOCK_REALTIME_COARSE) - identity.mtime_ns < step_ns:
        time.sleep(_STEP_POLL_S)
    return identity


def _longest_step_ns(mtime_ns: int) -> int:
    """Return the longest step that a file system's times may have, if this is one of them."""
    if mtime_ns % _SECOND_NS == 0:
        return _LONGEST_STEP_NS
    step_ns = 1
    while step_ns < _LONGEST_STEP_BELOW_A_SECOND_NS and mtime_ns % (10 * step_ns) == 0:
        step_ns *= 10
    return step_ns
