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
    socket_path: str,
    *,
    at: str | None = None,
    verify_first: bool = False,
) -> Iterator[Server]:
    """Serve the disk called `name` as it was at the backup that `at` names, as for `open_backup`, during the block.

    Clients find it at the unix socket `socket_path`, which is for the user of this process alone, under its name and
    as the default export; `uris` of the server that is yielded says how. The folder is not locked, and nothing is
    changed. Each piece is proven by its digest when it is read for the first time, and what does not fit is an error
    for the client; with `verify_first` all of it is proven before the first client is let in.

    For other places to listen at: a `Server` of `PlainDisk(backup)`, where `open_backup` gives the backup.
    Raises `NotFound` without such a backup or an image of it, `FormatError` for a damaged one, `Busy` where another
    server listens; and at the end of the block `LmdbitmapError` if a request hangs in the files.
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
    """Prove all of a backup, if that is wanted; else tell the log of images that nobody can prove piece by piece."""
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
