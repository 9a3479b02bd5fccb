"""How an owner vouches for its disk: by signs of life while tracking holds, and how it stops when tracking fails.

A bitmap is believed because its owner vouches for it (continuity.py). So an owner that lost track, and lets the guest
write all the same (policy `guest-first`), first withdraws its word, durably:

1. by distrust in the owner's file, which needs no space (owner_file.py);
2. if even that file cannot be written, by silence: no more signs of life, and no write before the last one is so old
   that the image's mtime proves a gap. That mtime is durable before the write: a flush leaves a write's own in memory;
3. on an image without an mtime silence proves nothing: there the write fails.

The owner vouches again only for a new epoch.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from uuid import UUID

from lmdbitmap.errors import LmdbitmapError, StorageError
from lmdbitmap.images.identity import leave_late_mtime
from lmdbitmap.interfaces import TrackableDevice
from lmdbitmap.storage import owner
from lmdbitmap.storage.owner import Owner
from lmdbitmap.storage.owner_name import OWNED_TWICE

log = logging.getLogger(__name__)

SILENCE_S = 61.0
"""Longer than continuity.py forgives: a write this late after the last beat counts as another program's. It forgives a
minute if the machine was restarted, as one may be that lost the disk of its store: the last beats may not be on it."""


class Voucher:
    """Holds the owner's lock on the disk called `name` until `close`, in its `session`. Safe for many threads."""

    def __init__(self, name: str, session: UUID | None, device: TrackableDevice, owner: Owner) -> None:
        self._name = name
        self._session = session
        self._device = device
        self._owner = owner
        self._changing = threading.Lock()
        self._beating = True
        self._has_beaten = False
        self.lost: str | None = None
        """Why the open period is worth nothing; None while the owner vouches for it."""

    def beat(self) -> None:
        """Leave a sign of life, the first one durably. Do nothing if silence must say that track is lost.

        Track is lost too if another process turns out to have owned the disk, which is noted before that (owner.py).
        """
        with self._changing:  # no beat is under way while silence begins
            if self._beating:
                now_ns, awake_ns = time.time_ns(), owner.awake_ns()
                change = self._device.identity().last_change
                try:
                    self._owner.beat(
                        now_ns,
                        *change,
                        awake_ns=awake_ns,
                        session=self._session,
                        durable=not self._has_beaten,
                    )
                    self._has_beaten = True
                finally:
                    if self._owner.was_owned_twice and self.lost is None:
                        self.lost = OWNED_TWICE

    def lose_track(self, reason: str) -> None:
        """Return when the bitmap can no longer be believed; after that the guest may write untracked.

        Raises `StorageError` if neither distrust nor silence can say so.
        """
        with self._changing:
            if self.lost is None:
                try:
                    self._owner.declare_distrust(reason, time.time_ns())
                except LmdbitmapError as error:
                    self._fall_silent(error)
                self.lost = reason
                log.error(
                    "disk %s: %s: the guest goes on, and the next backup reads the whole disk",
                    self._name,
                    reason,
                )

    def _fall_silent(self, error: LmdbitmapError) -> None:
        if self._device.identity().mtime_ns == 0:
            raise write_refused(self._name, error) from error
        self._beating = False
        log.error(
            "disk %s: %s; it gives no more signs of life, so that the next backup reads the whole disk",
            self._name,
            error,
        )
        try:
            time.sleep(SILENCE_S)
            leave_late_mtime(self._device)
        except BaseException as gives_up:  # whoever waited, so that track is not lost yet
            self._beating = True
            if isinstance(gives_up, LmdbitmapError):
                raise write_refused(self._name, gives_up) from gives_up
            raise

    def require_a_voice(self) -> None:
        """Raise unless distrust can be written: a file that does not take it does not take trust either."""
        if self.lost is not None:
            self._owner.require_the_name()
            self._owner.declare_distrust(self.lost, time.time_ns())

    def vouch_again(self) -> None:
        """Vouch for a new epoch, which is durable."""
        self._owner.restore_trust()
        self.lost = None
        self._beating = True

    def close(self) -> None:
        with self._changing:  # a beat under way must not write to the next file with its descriptor
            self._owner.close()

    def forsake(self) -> None:
        """Close the files in a forked child. The lock is made anew: its holder's thread does not exist here."""
        self._changing = threading.Lock()
        self.close()


def write_refused(name: str, error: LmdbitmapError) -> StorageError:
    """Return the error for a guest's write whose dirt cannot be recorded."""
    code = error.errno if isinstance(error, StorageError) else errno.EIO
    return StorageError(
        f"disk {name!r} cannot record a write ({error.problem})",
        OSError(code or errno.EIO, os.strerror(code or errno.EIO)),
        next_step=error.next_step,
    )
