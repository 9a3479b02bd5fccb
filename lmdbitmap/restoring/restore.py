"""Restores a disk as it was at one of its backups.

backup_chain.py reads the images, prefetching.py proves what is read of them, target.py opens what is written into,
writers.py or parallel_restore.py writes. No byte of a backup is written before the digest of its chunk is known to be
right. What holds something already is not touched before that is known of all that is going to be written. An image
that has no digests by chunks is proven as a whole, beside the writing of a new file, which gets its name only if that
is right too.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass

from lmdbitmap.qcow2 import Kind, MappedRun
from lmdbitmap.repository import backup_chain
from lmdbitmap.repository.backup_chain import BackupChain
from lmdbitmap.repository.digests import require_algorithms
from lmdbitmap.repository.manifest import BackupEntry
from lmdbitmap.repository.proof import proven_beside
from lmdbitmap.repository.repository import BackupFolder
from lmdbitmap.restoring.parallel_restore import CarryingBack
from lmdbitmap.restoring.prefetching import made_ready
from lmdbitmap.restoring.writers import Comparing, Overwriting, PuttingBack
from lmdbitmap.store import Store
from lmdbitmap.targets.target import Target, opened_target
from lmdbitmap.work.progress import Progress, Report

_TAIL_BYTES = 1 << 30
_TELL_AGAIN_S = 0.5


@dataclass(frozen=True, slots=True)
class RestoreResult:
    """`bytes_written` were data, `bytes_zeroed` were made zeroes; in place, `bytes_read` of the target were compared.

    `tracked` is the name of the disk through whose tracker it went, if `path` is one's image.
    """

    entry: BackupEntry
    path: str
    bytes_written: int
    seconds: float
    bytes_zeroed: int = 0
    bytes_read: int = 0
    tracked: str | None = None
    bytes_behind: int = 0
    """Of the target, behind the disk's end: they are zeroes."""


def restore(
    repository_path: str | os.PathLike[str],
    name: str,
    out_path: str | os.PathLike[str],
    *,
    at: str | None = None,
    verify: bool = True,
    in_place: bool = False,
    larger: bool = False,
    store: Store | None = None,
    progress: Progress | None = None,
) -> RestoreResult:
    """Write the disk called `name` as it was at the backup with the id `at`, or at the newest one.

    `at` may also be a time (`2026-11-29`, `2026-11-29T02:38:24Z`): it is the newest backup not later that counts then.
    `out_path` is a file that is not there yet, or empty; a block device or the URI of an NBD export, of the disk's
    size; or, `in_place`, any of these or a file, of which only what differs is written. What is there may be `larger`
    than the disk, if you say so: whatever is behind that becomes zero. Durable on return. Where it is the image of a
    disk in `store`, it has to be in place, and goes through the tracker: the disk's next backup is an increment of what
    the restore changed. `verify=False` leaves out the digests, not the structure.
    `progress` counts what is proven and then what is written, so to twice the size of what was there before; what it
    raises cancels the restore, and while it proves nothing was written yet.

    Raises `NotFound` without such a disk or backup, or the package that its digests need, `FormatError` for a manifest
    or image that is not what it must be, `AlreadyExists` for a file with something in it, `InvalidArgument` for a
    target that does not fit, `Busy` for one that somebody uses, `StorageError` where the system refuses.
    """
    started = time.monotonic()
    folder, place = BackupFolder(repository_path, name), os.fspath(out_path)
    entries = backup_chain.entries_at(folder, at)
    if verify:
        require_algorithms(folder, entries, instead="restore without proof: --no-verify")
    with (
        backup_chain.opened(folder, entries, verify=verify) as chain,
        opened_target(place, folder, chain, in_place=in_place, larger=larger, store=store) as target,
    ):
        proves_first = verify and not target.is_fresh
        report = Report(progress, target.size * (2 if proves_first else 1))
        writer = _writer_for(chain, target, report, in_place=in_place)
        with proven_beside(chain.unproven if verify else []) as proven:
            if proves_first:
                _prove_all(chain, target, report)
                _await(proven, report)
            writer.put_all(chain.extents(0, chain.size))
            writer.put_all(_tail(chain.size, target.size))  # by itself: it may begin within a page
            target.flush()
            _await(proven, report)
    return RestoreResult(
        chain.entry, place, writer.bytes_written, time.monotonic() - started,
        writer.bytes_zeroed, writer.bytes_read, target.disk, target.size - chain.size,
    )  # fmt: skip


def _writer_for(chain: BackupChain, target: Target, report: Report, *, in_place: bool) -> PuttingBack:
    if in_place:
        return Comparing(chain, target, report)
    if target.fd is not None:
        return CarryingBack(chain, target, report)
    return Overwriting(chain, target, report)


def _prove_all(chain: BackupChain, target: Target, report: Report) -> None:
    """Of what is going to be written, before anything is."""
    with contextlib.closing(made_ready(chain, _runs(chain, target.size), ())) as ready:
        for run, _ in ready:
            report.advance(run.length)


def _await(proven: Future[None], report: Report) -> None:
    """Images are proven as a whole by a thread of its own. Whoever waits for it can be cancelled."""
    while wait([proven], timeout=_TELL_AGAIN_S).not_done:
        report.repeat()
    proven.result()


def _runs(chain: BackupChain, target_size: int) -> Iterator[MappedRun]:
    """The disk, and what is behind it of the target, as zeroes."""
    return itertools.chain(chain.extents(0, chain.size), _tail(chain.size, target_size))


def _tail(start: int, end: int) -> Iterator[MappedRun]:
    """In pieces: to zero a large one may take a device long, and nobody could stop it meanwhile."""
    for offset in range(start, end, _TAIL_BYTES):
        yield MappedRun(offset, min(_TAIL_BYTES, end - offset), Kind.ZERO)
