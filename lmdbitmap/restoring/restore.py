"""Restores a disk as it was at one of its backups.

backup_chain.py reads the images, prefetching.py proves what is read of them, target.py opens the target, writers.py or
parallel_restore.py writes. No byte of a backup is written before the digest of its chunk is known to be right. A target
that holds something already is not touched before everything that will be written is proven. An image without digests
by chunks is proven as a whole, beside the writing of a new file, which gets its name only if that proof succeeds too.
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
from lmdbitmap.repository.backup_folder import BackupFolder
from lmdbitmap.repository.digests import require_algorithms
from lmdbitmap.repository.manifest import BackupEntry
from lmdbitmap.repository.proof import proven_beside
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
    """Bytes written as data and as zeroes; in place, also the bytes of the target that were compared.

    `tracked` is the name of the disk whose tracker the restore went through, if `path` is its image.
    """

    entry: BackupEntry
    path: str
    bytes_written: int
    seconds: float
    bytes_zeroed: int = 0
    bytes_read: int = 0
    tracked: str | None = None
    bytes_behind: int = 0
    """Bytes of the target behind the disk's end: they are zeroes."""


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
    """Write the disk called `name` as it was at a backup; durable on return.

    - `at` is the backup's id, or a time (`2026-11-29`, `2026-11-29T02:38:24Z`), which means the newest backup not
      later. None is the newest backup.
    - `out_path` is a new or empty file; a block device or the URI of an NBD export, of the disk's size; or, `in_place`,
      any of these or a file, of which only what differs is written.
    - `larger` allows a target larger than the disk: everything behind the disk becomes zero.
    - `store`: the image of a disk in it must be restored `in_place`, and goes through the tracker. The disk's next
      backup is an increment of what the restore changed.
    - `verify=False` leaves out the digests, not the structure.
    - `progress` counts proven and then written bytes: up to twice the size of a target that existed before. What it
      raises cancels the restore; during the proof nothing was written yet.

    Raises `NotFound` without such a disk or backup, or the package that its digests need; `FormatError` for a damaged
    manifest or image; `AlreadyExists` for a file with something in it; `InvalidArgument` for a target that does not
    fit; `Busy` for a target in use; `StorageError` if the system refuses.
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
            writer.put_all(_tail(chain.size, target.size))  # separately: it may begin within a page
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
    """Prove everything that will be written, before anything is."""
    with contextlib.closing(made_ready(chain, _runs(chain, target.size), ())) as ready:
        for run, _ in ready:
            report.advance(run.length)


def _await(proven: Future[None], report: Report) -> None:
    """Wait for the thread that proves images as a whole. `progress` can cancel the wait."""
    while wait([proven], timeout=_TELL_AGAIN_S).not_done:
        report.repeat()
    proven.result()


def _runs(chain: BackupChain, target_size: int) -> Iterator[MappedRun]:
    """Return the runs of the disk, and of the target behind it, as zeroes."""
    return itertools.chain(chain.extents(0, chain.size), _tail(chain.size, target_size))


def _tail(start: int, end: int) -> Iterator[MappedRun]:
    """Yield zero runs in pieces: a device may take long to zero a large one, and could not be stopped meanwhile."""
    for offset in range(start, end, _TAIL_BYTES):
        yield MappedRun(offset, min(_TAIL_BYTES, end - offset), Kind.ZERO)
