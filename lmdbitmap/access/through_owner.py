"""Opens snapshots that the disks' owner holds for us, through descriptors it passes: no path lookup, no permission.

If the owner offers it, the image itself is read (direct.py) by a descriptor that the owner passes. The export is then
one connection, and a second connection asks what has to be read through the export. An older owner does not offer this,
nor does one without a descriptor of its own, such as for an image behind another NBD server. Then everything is read
through the export.

The export and the question are opened by a name, NAME@CHECKPOINT, which another snapshot may get once ours is released
and its checkpoint forgotten. **Everything read is from our snapshot, or is rejected**:

- A name belongs to one snapshot until that is released, as a checkpoint that is held cannot be forgotten
  (tracker/points.py).
- A released snapshot is never held again, and no other snapshot has the uuid of its checkpoint.
- So an owner that finds our snapshot by this uuid has held it ever since it took it, and what was opened by its name
  meanwhile belongs to it.
- The image is requested by uuid after the other two are open. Once everything is read, the snapshot is released by
  uuid, which fails if it was not held to the end (routes.py).

The exports of all disks are opened before anything else: the owner has room for a limited number of connections, and
can be read without a question.
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
    """A snapshot that the owner holds for us. `direct`: whether it offers its image; None from an older owner."""

    disk: Disk
    checkpoint: Checkpoint
    export: str
    direct: bool | None

    @property
    def takes_uuid(self) -> bool:
        """Whether the owner also knows a snapshot by its checkpoint's uuid."""
        return self.direct is not None

    @property
    def named(self) -> dict[str, str]:
        """The arguments that name it in an operation."""
        names = {"disk": self.disk.name, "checkpoint": self.checkpoint.name}
        return {**names, "uuid": str(self.checkpoint.uuid)} if self.takes_uuid else names


def open_held(owner: Client, held: Sequence[HeldThere], silence_s: float) -> list[NbdDevice | DirectDevice]:
    """Open the snapshots for reading. Raise `OwnerGone` if a connection to the owner is lost.

    Raises `Busy` if the owner sends nothing for a request for `silence_s`.
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
            next_step="see whether that process still runs, and try again",
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
    """Open the image without locks. The owner has the locks, and keeps the image's size while the disk is held."""
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
