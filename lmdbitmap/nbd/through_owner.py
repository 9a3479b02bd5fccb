"""Opens a snapshot that the owner of a disk holds for us, by what it passes: nothing has to be found, or let us in.

Where the owner offers that, the image itself is read (direct.py), by a descriptor of it, and a second connection asks
what has to be read through the first, the export. An older owner, and one without a descriptor of its own, as of an
image behind another NBD server, does not: then all is read through the export.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Mapping

from lmdbitmap.device import FileDevice
from lmdbitmap.direct import DirectDevice
from lmdbitmap.errors import Busy, LmdbitmapError
from lmdbitmap.nbd import protocol as nbd
from lmdbitmap.nbd.client import NbdDevice
from lmdbitmap.nbd.client_dial import agreed
from lmdbitmap.nbd.control_client import Client
from lmdbitmap.nbd.kept_question import KeptQuestion
from lmdbitmap.nbd.uri import Place
from lmdbitmap.schema import Disk

log = logging.getLogger(__name__)


def open_held(
    owner: Client, disk: Disk, held: Mapping[str, object], checkpoint: str, silence_s: float
) -> NbdDevice | DirectDevice:
    """`held` is what the owner told of the snapshot. Raises `Busy` where its connection is lost.

    A request of which it sends nothing for `silence_s` is `Busy` too.
    """
    export = _opened(owner, disk, str(held["export"]), silence_s)
    if held.get("direct") is not True:
        return export
    try:
        return _direct(owner, disk, export, str(held["export"]), checkpoint, silence_s)
    except (OSError, LmdbitmapError) as why:
        log.info("%s: all of it is read there, and none from the image: %s", _name(disk), why)
        return export
    except BaseException:
        export.close()
        raise


def _opened(owner: Client, disk: Disk, export: str, silence_s: float) -> NbdDevice:
    try:
        return NbdDevice(
            Place(export, socket_path="the owner's"),
            read_only=True,
            reconnect_s=0,
            connect=lambda: agreed(owner.connection(), export, silence_s=silence_s),
            name=_name(disk),
            silence_s=silence_s,
        )
    except LmdbitmapError:
        raise
    except OSError as lost:
        raise Busy(
            f"{_name(disk)}: its connection was lost ({lost.strerror or lost})",
            next_step="see how that process is, and try again",
        ) from lost


def _direct(
    owner: Client, disk: Disk, export: NbdDevice, name: str, checkpoint: str, silence_s: float
) -> DirectDevice:
    question = KeptQuestion(
        lambda: agreed(owner.connection(), name, silence_s=silence_s, context=nbd.LMDBITMAP_META_KEPT),
        _name(disk),
        silence_s=silence_s,
    )
    try:
        image = _image(owner.image(disk.name, checkpoint), disk)
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
    return image


def _name(disk: Disk) -> str:
    return f"disk {disk.name!r} through the process that serves it"
