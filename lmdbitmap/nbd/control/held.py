"""The snapshots that an owner holds for others: taken on request, served as NAME@CHECKPOINT, released on request.

A snapshot *bound* to its caller is released when that connection ends, however it ends: the backup of a killed process
costs nothing from then on. Other snapshots are held until somebody releases them, or the disk is detached. One whose
caller hung up before it was told is released too: nobody would do it.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping, Sequence

from lmdbitmap.errors import Busy, NotFound, os_errors_at
from lmdbitmap.filter import Filter, take_snapshot
from lmdbitmap.nbd.server.server import Server
from lmdbitmap.tracker.scratch import Scratch
from lmdbitmap.tracker.snapshot import Snapshot

_log = logging.getLogger(__name__)

MOST_OF_A_DISK = 16
"""Snapshots held at once: for each, the first write to a block costs a copy."""


class HeldSnapshots:
    """Snapshots of the disks in `filters`, with old data in `scratch`. Without a `server` nobody can read them."""

    def __init__(self, filters: Mapping[str, Filter], server: Server | None, scratch: Scratch) -> None:
        self._filters = dict(filters)
        """A copy: a disk that is detached leaves the mapping of the `ControlServer`, and is still asked about here."""
        self._server = server
        self._scratch = scratch

    def room(self) -> int:
        """Return how many bytes of old data could be kept now of a disk."""
        return self._scratch.room()

    def take(self, disks: Sequence[str], name: str, *, private: bool = False) -> list[Snapshot]:
        """Take one checkpoint on all disks, or on none, and hold each disk as of that moment.

        A `private` snapshot is only for the caller, through connections that it asked for (`connect`): what a stranger
        read of a snapshot that is read only once, the caller would not get any more.
        """
        filters = [self._filters[disk] for disk in disks]
        for attached in filters:
            if len(attached.snapshots) >= MOST_OF_A_DISK:
                raise Busy(
                    f"disk {attached.disk.name!r} holds {MOST_OF_A_DISK} snapshots",
                    next_step=f"release one (`lmdbitmap release {attached.disk.name} CHECKPOINT`)",
                )
        taken = take_snapshot(filters, name, self._scratch)
        try:
            self._export(taken, private=private)
            self._require_held(taken)
        except BaseException:
            for snapshot in taken:
                self.release(snapshot)
            raise
        return taken

    def _export(self, taken: Sequence[Snapshot], *, private: bool) -> None:
        for snapshot in taken:
            if self._server is not None:
                snapshot.guests_are_quiet = self._server.quiet.look
                self._server.add(snapshot.name, snapshot, private=private)
            checkpoint = snapshot.checkpoint.name
            _log.info("disk %s: held as at checkpoint %s", snapshot.disk.name, checkpoint)

    def _require_held(self, taken: Sequence[Snapshot]) -> None:
        """Raise `Busy` if one was released while the images were flushed, as by who gave its snapshot up."""
        for snapshot in taken:
            if not self.is_held(snapshot):
                raise Busy(
                    f"the snapshot of disk {snapshot.disk.name!r} was released while it was made",
                    next_step="take another one",
                )

    def find(self, disk: str, checkpoint: str, uuid: str | None = None) -> Snapshot:
        """Return the held snapshot of `checkpoint`. `uuid` excludes another checkpoint that has the name by now."""
        for snapshot in self._filters[disk].snapshots:
            if snapshot.checkpoint.name == checkpoint and uuid in (None, str(snapshot.checkpoint.uuid)):
                return snapshot
        which = "" if uuid is None else f" with uuid {uuid[:40]}"
        raise NotFound(
            f"disk {disk!r} holds no snapshot of checkpoint {checkpoint!r}{which}",
            next_step=f"`lmdbitmap info {disk}` lists those there are",
        )

    def is_held(self, snapshot: Snapshot) -> bool:
        """Whether the snapshot is not released yet, by anybody."""
        return any(one is snapshot for one in self._filters[snapshot.disk.name].snapshots)

    def release(self, snapshot: Snapshot) -> None:
        """Release a snapshot; does nothing if it is released already."""
        self._hide(snapshot)  # its clients are cut off, whose reads would be waited for
        snapshot.release()
        self._hide(snapshot)  # it may have been exported just now

    def _hide(self, snapshot: Snapshot) -> None:
        if self._server is not None:
            self._server.remove(snapshot.name, snapshot)

    def open_image(self, disk: str, checkpoint: str, uuid: str | None = None) -> int:
        """Return a new read-only descriptor of the image of a held disk: see direct.py."""
        snapshot = self.find(disk, checkpoint, uuid)
        if snapshot.image_fd is None:
            raise Busy(
                f"the image of disk {disk!r} has no descriptor", next_step="read it through its export"
            )
        with os_errors_at(snapshot.disk.image):
            return os.open(f"/proc/self/fd/{snapshot.image_fd}", os.O_RDONLY | os.O_CLOEXEC)

    def connect(self) -> socket.socket:
        """Return the caller's end of a new connection to the NBD server."""
        if self._server is None:
            raise Busy(
                "the process that owns the disk does not serve it", next_step="read it in that process"
            )
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        if not self._server.take_in(ours):
            theirs.close()
            raise Busy("the NBD server has too many clients", next_step="try again")
        return theirs
