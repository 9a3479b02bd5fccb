"""An image by its name: the path of a file or a block device, or the URI of an NBD export."""

from __future__ import annotations

import os
import stat

from lmdbitmap.errors import InvalidArgument
from lmdbitmap.images.device import FileDevice
from lmdbitmap.interfaces import TrackableDevice
from lmdbitmap.nbd import uri
from lmdbitmap.nbd.client.device import NbdDevice
from lmdbitmap.nbd.client.dial import is_one_place


def open_image(image: str, *, read_only: bool = False, share_writes: bool = False) -> TrackableDevice:
    """Open the image; see `FileDevice.open` and `NbdDevice.open`. An NBD export is not locked against others."""
    if uri.is_uri(image):
        return NbdDevice.open(image, read_only=read_only)
    return FileDevice.open(image, read_only=read_only, share_writes=share_writes)


def is_far(image: str) -> bool:
    """Return whether the image is an NBD export."""
    return uri.is_uri(image)


def lasting_name(image: str) -> str:
    """Return a name that is valid from every folder; two names of one image give the same name where we can tell.

    Raises `InvalidArgument` for a name that a store cannot hold, or that names nothing that can be tracked.
    """
    if uri.is_uri(image):
        place = uri.parse(image)
        path = place.socket_path and _real_path(place.socket_path)
        lasting = place._replace(socket_path=path, tls=place.tls and _lasting_credentials(place.tls))
        return uri.parse(lasting.uri).uri
    return _lasting_path(image)


def is_same_image(one: str, other: str) -> bool:
    """Return whether two names lead to one image, links and other names of a device included.

    An NBD export is the same with TLS and without, with any credentials, and by any name of its host.
    """
    if is_far(one) or is_far(other):
        return is_far(one) and is_far(other) and is_one_place(_lasting_place(one), _lasting_place(other))
    here_path, there_path = _file_name(one), _file_name(other)
    if os.path.realpath(here_path) == os.path.realpath(there_path):
        return True
    try:
        here, there = os.stat(here_path), os.stat(there_path)
    except (OSError, ValueError):
        return False
    return are_one(here, there)


def _file_name(path: str) -> bytes:
    """Return a file's name as the system has it. A store's are UTF-8, also where the locale has no such letters."""
    try:
        return os.fsencode(path)
    except UnicodeEncodeError:
        return path.encode(errors="surrogateescape")


def are_one(here: os.stat_result, there: os.stat_result) -> bool:
    """Return whether both are of one file, or of one block device, even through different nodes."""
    if stat.S_ISBLK(here.st_mode) and stat.S_ISBLK(there.st_mode):
        return here.st_rdev == there.st_rdev
    return os.path.samestat(here, there)


def _lasting_place(image: str) -> uri.NbdAddress:
    return uri.parse(lasting_name(image)).bare


def _lasting_credentials(tls: uri.Credentials) -> uri.Credentials:
    """Return the credentials with an absolute folder. Its links stay: certificates may be renewed by changing one."""
    return tls._replace(folder=tls.folder and _as_text(os.path.abspath(tls.folder)))


def _lasting_path(image: str) -> str:
    """Return a file's path with its links resolved, or a block device's path as it was given.

    Devices are numbered anew at each boot; only the links to them last (/dev/disk/by-id, /dev/vg/lv).
    """
    path = _real_path(image)
    is_block_device = os.path.exists(path) and stat.S_ISBLK(os.stat(path).st_mode)
    return _as_text(os.path.abspath(image)) if is_block_device else path


def _real_path(image: str) -> str:
    return _as_text(os.path.realpath(image))


def _as_text(path: str) -> str:
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise InvalidArgument(
            f"the image's path {path!r} is not UTF-8", next_step="rename the image or its folder"
        ) from error
    return path
