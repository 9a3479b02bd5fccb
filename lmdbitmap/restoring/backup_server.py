"""Serves a disk as it was at a backup, over NBD and read-only: what `mount` does, for programs."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator

from lmdbitmap.errors import LmdbitmapError
from lmdbitmap.images.plain import PlainDisk
from lmdbitmap.nbd.server.server import Server
from lmdbitmap.repository.backup_chain import BackupChain, open_backup
from lmdbitmap.repository.proof import prove

log = logging.getLogger(__name__)


@contextlib.contextmanager
def serve_backup(
    repository_path: str | os.PathLike[str],
    name: str,
    socket_path: str | os.PathLike[str],
    *,
    at: str | None = None,
    verify_first: bool = False,
) -> Iterator[Server]:
    """Serve the disk called `name` as it was at the backup that `at` names, as for `open_backup`, during the block.

    Clients find it at the unix socket `socket_path`, which only this process's user may use, under the disk's name and
    as the default export; see `uris` of the server yielded. The folder is not locked, and nothing is changed. Each
    piece is proven by its digest when it is first read; one that does not fit is an error for the client. With
    `verify_first` all of it is proven before the first client is let in.

    To listen elsewhere, make a `Server` of `PlainDisk(backup)` with the backup from `open_backup`.
    Raises `NotFound` without such a backup or an image of it, `FormatError` for a damaged one, `Busy` if another server
    listens there; and at the end of the block `LmdbitmapError` if a request hangs in the files.
    """
    with open_backup(repository_path, name, at) as backup:
        prove_first(name, backup, wanted=verify_first)
        server = Server({name: PlainDisk(backup)})
        with ended(server):
            server.listen_unix(socket_path)
            server.start()
            yield server


def prove_first(
    name: str, backup: BackupChain, *, wanted: bool, stopped: Callable[[], bool] = lambda: False
) -> None:
    """Prove all of a backup if `wanted`; else log the images that cannot be proven piece by piece."""
    if wanted:
        prove([image.whole for image in backup.images], stopped)
    elif backup.unproven:
        log.warning(
            "disk %s: %s has no digests by chunks, and is served unproven; --verify proves it as a whole first",
            name, backup.unproven[-1].file.path,
        )  # fmt: skip


@contextlib.contextmanager
def ended(server: Server) -> Iterator[Server]:
    """Stop the server of a backup when the block ends. Raises `LmdbitmapError` if a request hangs in its files."""
    try:
        yield server
    finally:
        if not server.stop():
            raise LmdbitmapError(
                "a request hangs in the backup's files",
                next_step="see why their disk does not answer (dmesg)",
            )
