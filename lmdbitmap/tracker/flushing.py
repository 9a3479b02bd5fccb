"""The flushes of one image, and the consequences of a failed flush.

Linux reports data that it could not write back once per descriptor, at the next flush, and calls that data clean from
then on. Another flush succeeds, though the data is not on the disk and may vanish from memory at any time. So all data
written since the last good flush is unknown, and:

1. After one failure every flush fails until the image is attached anew. Else a guest, a checkpoint or a detach would
   later be told that everything is on the disk. QEMU does the same.
2. Flushes run one at a time, so that none succeeds beside the one that took the error. Flushes that wait for their turn
   share the next one.
3. Data that the kernel calls clean is dropped from its memory: from then on the image reads as the disk has it.
4. `on_failure` is called at once, also for a flush that the device did unasked (`lose`), so that the failure is on
   record if the process dies then.

A server that is away (`FarAway`) has lost nothing: a flush of its image fails, and the next one may succeed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator

from lmdbitmap.errors import LmdbitmapError, StorageError
from lmdbitmap.interfaces import BlockDevice, FarAway

log = logging.getLogger(__name__)

MEND_IT = "look at the kernel log (dmesg), mend the disk, then restart the process that serves it"
_AWAIT_IT = "start that server again, or see why it does not answer"


class Flusher:
    """Flushes `device`, the image of the disk called `name`; `on_failure` is told why, once, before any caller.

    If it raises, it is told again at the next occasion. Safe for many threads.
    """

    def __init__(self, name: str, device: BlockDevice, on_failure: Callable[[str], None]) -> None:
        self._name = name
        self._device = device
        self._on_failure = on_failure
        self._turn = threading.Lock()
        self._begun = 0
        self._done = 0
        self._failure: OSError | None = None
        self._telling = threading.Lock()
        self._untold: str | None = None

    @property
    def failed(self) -> bool:
        return self._failure is not None

    def flush(self) -> None:
        """Return when everything written before is on stable storage. After one `StorageError` every call raises it."""
        needed = self._begun + 1  # one that has begun may have missed what was written last
        with self._turn:
            if self._done < needed:
                self._flush_now()

    def require_sound(self) -> None:
        """Raise the error of the failed flush, if one failed."""
        if self._failure is not None:
            self._tell()
            raise unflushed(self._name, self._failure) from self._failure

    def lose(self, error: OSError) -> None:
        """Take the device's word that written data may be lost, as a failed flush. May be called from any thread."""
        self._fail(error)
        try:
            self._tell()
        except (LmdbitmapError, OSError) as refusal:  # the next flush says so
            log.error(
                "disk %s: tracking is lost, and that could not be recorded yet: %s", self._name, refusal
            )

    def tell_again(self) -> None:
        """Call `on_failure` again if a flush failed: the first call may have come when track was lost already."""
        if self._failure is not None:
            self._on_failure(unflushed(self._name, self._failure).problem)

    def close(self, refusal: OSError) -> None:
        """Wait for the flush that is under way; make all later ones fail with `refusal`."""
        with self._turn, self._telling:
            self._failure, self._untold = refusal, None

    def _flush_now(self) -> None:
        self.require_sound()
        self._begun += 1
        try:
            self._device.flush()
        except FarAway as away:
            raise unflushed(self._name, away) from away
        except OSError as error:
            self._fail(error)
            forget_unwritten(self._device)
        self.require_sound()
        self._done = self._begun

    def _fail(self, error: OSError) -> None:
        with self._telling:
            if self._failure is None:
                self._failure, self._untold = error, unflushed(self._name, error).problem

    def _tell(self) -> None:
        with self._telling:
            if self._untold is not None:
                self._on_failure(self._untold)
                self._untold = None


def unflushed(name: str, error: OSError) -> StorageError:
    return StorageError(
        f"the image of disk {name!r} could not be flushed", error, next_step=_step_after(error)
    )


def _step_after(error: OSError) -> str:
    if isinstance(error, StorageError):  # ours: of a disk that is detached
        return error.next_step
    return _AWAIT_IT if isinstance(error, FarAway) else MEND_IT


def forget_unwritten(device: BlockDevice) -> None:
    """Advise the kernel to read the image from the disk again; it may follow this in part only."""
    if device.fd is not None:
        with contextlib.suppress(OSError):
            os.posix_fadvise(device.fd, 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def forgetting_unwritten(device: BlockDevice) -> Iterator[None]:
    """If the block, a flush of the device, fails, `forget_unwritten`: whoever compares it next must read its disk."""
    try:
        yield
    except OSError:
        forget_unwritten(device)
        raise
