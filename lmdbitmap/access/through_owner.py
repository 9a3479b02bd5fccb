"""Opens snapshots that the owner of disks holds for us, by what it passes: nothing has to be found, or let us in.

Where the owner offers that, the image itself is read (direct.py), by a descriptor of it, and a second connection asks
what has to be read through the first, the export. An older owner, and one without a descriptor of its own, as of an
image behind another NBD server, does not: then all is read through the export.

Export and question are opened by a name, NAME@CHECKPOINT, which another snapshot may get once ours is released and its
checkpoint forgotten. **What is read is of ours nevertheless, or is not believed**: a name is one snapshot's until that
is released, as a checkpoint that is held cannot be forgotten (tracker/points.py); and one that was released is never
held again, nor has another the uuid of its checkpoint. So an owner
that finds ours by this uuid has held it ever since it took it, and what was opened by its name meanwhile is of it. The
image is asked for by uuid after the other two are open; and whoever has read all releases by uuid, which fails if ours
was not held to the end (routes.py).

Exports are opened before anything else, of all disks: the owner has room for so many connections, and can be read
without a question.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Sequence
from contextlib import ExitStack
from typing import NamedTuple

from lmdbitmap.access.direct import DirectDevice
from lmdbitmap.errors import Busy, LmdbitmapError, OwnerGone
from lmdbitmap.images.device import FileDevice
from lmdbitmap.images.whereabouts import WHILE_THERE_IS_TIME, why_lost
from lmdbitmap.nbd import protocol as nbd
from lmdbitmap.nbd.client.device import NbdDevice
from lmdbitmap.nbd.client.dial import agreed
from lmdbitmap.nbd.client.kept_question import KeptQuestion
from lmdbitmap.nbd.control_client import Client
from lmdbitmap.nbd.uri import NbdAddress
from lmdbitmap.storage.schema import Checkpoint, Disk

log = logging.getLogger(__name__)


class HeldThere(NamedTuple):
    """A snapshot that the owner holds for us; `direct` is what it told of its image, which an older owner does not."""

    disk: Disk
    checkpoint: Checkpoint
    export: str
    direct: bool | None

    @property
    def takes_uuid(self) -> bool:
        """Whether the owner knows a snapshot by its checkpoint's uuid too."""
        return self.direct is not None

    @property
    def named(self) -> dict[str, str]:
        """The arguments of an operation on it."""
        names = {"disk": self.disk.name, "checkpoint": self.checkpoint.name}
        return {**names, "uuid": str(self.checkpoint.uuid)} if self.takes_uuid else names


def open_held(owner: Client, held: Sequence[HeldThere], silence_s: float) -> list[NbdDevice | DirectDevice]:
    """To be read. Raises `OwnerGone` where a connection of the owner's is lost.

    A request of which it sends nothing for `silence_s` is `Busy` too.
    """
    exports: list[NbdDevice] = []
    devices: list[NbdDevice | DirectDevice] = []
    with ExitStack() as on_failure:
        for each in held:
            exports.append(_opened(owner, each, silence_s))
            on_failure.callback(exports[-1].close)
        for each, export in zip(held, exports, strict=True):
            devices.append(_direct_if_offered(owner, each, export, silence_s))
            on_failure.callback(devices[-1].close)
        on_failure.pop_all()
    return devices


def _opened(owner: Client, held: HeldThere, silence_s: float) -> NbdDevice:
    name = _name(held.disk)
    try:
        return NbdDevice(
            NbdAddress(held.export, socket_path="the owner's"),
            read_only=True,
            reconnect_s=0,
            connect=lambda: agreed(owner.connection(), held.export, silence_s=silence_s),
            name=name,
            silence_s=silence_s,
        )
    except LmdbitmapError:
        raise
    except OSError as lost:
        raise OwnerGone(
            f"{name}: its connection was lost ({lost.strerror or lost})",
            next_step="see how that process is, and try again",
        ) from lost


def _direct_if_offered(
    owner: Client, held: HeldThere, export: NbdDevice, silence_s: float
) -> NbdDevice | DirectDevice:
    if held.direct is not True:
        return export
    try:
        return _direct(owner, held, export, silence_s)
    except (OSError, LmdbitmapError) as why:
        log.info("%s: all of it is read there, and none from the image: %s", _name(held.disk), why)
        return export


def _direct(owner: Client, held: HeldThere, export: NbdDevice, silence_s: float) -> DirectDevice:
    question = KeptQuestion(
        lambda: agreed(owner.connection(), held.export, silence_s=silence_s, context=nbd.LMDBITMAP_META_KEPT),
        _name(held.disk),
        silence_s=silence_s,
    )
    try:
        image = _image(owner.image(**held.named), held.disk)
    except BaseException:
        question.close()
        raise
    return DirectDevice(image, export, question)


def _image(fd: int, disk: Disk) -> FileDevice:
    """Not locked: the owner has the locks, and keeps the image as it is in size while the disk is held."""
    try:
        is_block_device = stat.S_ISBLK(os.fstat(fd).st_mode)
        image = FileDevice(disk.image, fd, read_only=True, locked=False, is_block_device=is_block_device)
        if image.size != disk.size:
            raise Busy(f"its image has {image.size} bytes, not {disk.size}", next_step="see who resized it")
    except BaseException:
        os.close(fd)
        raise
    if lost := why_lost(disk.image, fd):
        log.warning("disk %s: %s; %s", disk.name, lost, WHILE_THERE_IS_TIME)
    return image


def _name(disk: Disk) -> str:
    return f"disk {disk.name!r} through the process that serves it"
