"""A flat file beside a served disk: `serve --bitmap-file X.dbm`, the original proposal to the letter.

    attach    prove X, OR it into the open period, durably; then clear its CLEAN flag, durably
    serve     even if we crash, X says "everything is dirty"
    detach    write X anew with the open period's bits and CLEAN set, whole or not at all

The store is crash-safe with or without X, which is for programs that read flat files. So X can only add dirt: a missing
X adds nothing, and an untrustworthy X (not CLEAN, damaged, naming no disk) makes everything dirty, in a new
epoch that says why. A file that does not begin like a flat file of this version, or is another disk's, is refused,
because detach would overwrite it.
"""

from __future__ import annotations

import errno
import os

from lmdbitmap import export
from lmdbitmap.errors import AlreadyExists, FormatError, NotFound, Untrusted, error_from_os, os_errors_at
from lmdbitmap.filter import Filter
from lmdbitmap.flat_file.flatfile import FlatFile, begins_like_ours
from lmdbitmap.format import NO_UUID, Flags, FlatHeader, encode_header
from lmdbitmap.storage.schema import Disk
from lmdbitmap.system import atomic_files
from lmdbitmap.tracker import chain
from lmdbitmap.tracker.changes import changes


def begin(attached: Filter, path: str | os.PathLike[str]) -> str | None:
    """Merge the file into the open period, before any guest writes; a clean detach of `attached` writes it out.

    Returns why the file was not trusted, in which case a new epoch has begun, or None. Raises, and changes nothing, if
    the file is not a flat file of this version, is another disk's, or could not be written.
    """
    place = os.path.abspath(path)
    _require_writable(os.path.dirname(os.path.realpath(place)))
    reason = _take_in(attached, place)
    attached.at_detach(lambda: _write_out(attached, place))
    return reason


def _require_writable(folder: str) -> None:
    with os_errors_at(folder):
        os.stat(folder)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise error_from_os(folder, OSError(errno.EACCES, "this user cannot write to it"))


def _take_in(attached: Filter, path: str) -> str | None:
    try:
        file = FlatFile.open(path, writable=True)
    except NotFound:
        return None
    except FormatError as error:
        if not begins_like_ours(path):
            raise
        attached.start_epoch(error.problem)
        _replace_by_unclean(path, attached.disk)
        return error.problem
    with file:
        _require_of(attached.disk, file)
        reason = _why_unbelievable(file, attached)
        if reason is None:
            loose = _why_loose(file.header, attached, path)
            export.merge_file_into(attached, file, loose=loose)
        else:
            attached.start_epoch(reason)
        file.clear_clean()
    return reason


def _replace_by_unclean(path: str, disk: Disk) -> None:
    """Say durably that everything is dirty. What we cannot read, a newer version may, and believe it after a crash."""
    header = FlatHeader(
        disk_size=disk.size,
        granularity_bits=disk.granularity_bits,
        bitmap_uuid=NO_UUID,
        disk_uuid=disk.uuid,
        epoch_uuid=disk.epoch,
        since_uuid=NO_UUID,
        until_uuid=None,
        since_time_ns=0,
    )
    atomic_files.replace(path, encode_header(header, {"disk": disk.name}))


def _require_of(disk: Disk, file: FlatFile) -> None:
    """Raise `AlreadyExists` for a file that is proven to be another disk's: we would take it from that one."""
    told = file.header.disk_uuid
    if told not in (disk.uuid, NO_UUID):
        raise AlreadyExists(
            f"{file.path} is the file of another disk ({told}; disk {disk.name!r} is {disk.uuid})",
            next_step="name this disk's own file, or one that is not there yet; if that disk is gone, remove its file",
        )


def _why_unbelievable(file: FlatFile, attached: Filter) -> str | None:
    header, disk = file.header, attached.disk
    if header.disk_uuid != disk.uuid:
        return f"{file.path} does not say of which disk it is"
    if header.disk_size != disk.size:
        return f"{file.path} is of a disk of {header.disk_size} bytes, and this one has {disk.size}"
    try:
        file.prove()
    except (Untrusted, FormatError) as error:
        return error.problem
    return None


def _why_loose(header: FlatHeader, attached: Filter, path: str) -> str | None:
    with attached.store.read() as reader:
        recording = chain.current_checkpoint(reader, attached.disk)
    if header.since_uuid != recording.uuid:
        return f"{path} counts from another checkpoint"
    return f"{path} was a superset" if Flags.SUPERSET in header.flags else None


def _write_out(attached: Filter, path: str) -> None:
    """Export the open period. The disk is still ours and nobody writes to it, so the store has all of its dirt."""
    export.export_changes(changes(attached.store, attached.disk.name, persisted=True), path)
