"""Proves backups without restoring them: every byte of every image by its digests, and every image's structure.

- An image is as long as the manifest says. Its header names the disk's size and the parent that the manifest names.
  Every entry of its tables can be followed and leads into the file. Refcounts are not checked: no reader of a backup
  needs them.
- Its chunks have the digests that the file beside it lists, and that file has the digest in the manifest. If that file
  is missing or damaged, or was never made, the image is proven by its digest as a whole.
- What the disk cannot read is a flaw like any other, and the rest is proven.
- An image that cannot be proven, because this Python lacks the package for its digests, is not sound either.

Digests are computed in as many threads as there are processors. Images are opened one after the other, so that a chain
may be of any length. Backups and prunes can go on meanwhile. A flaw of an image that a prune removed or rewrote
meanwhile proves nothing: it is left out, and `Busy` is raised if there is no other flaw. Every other flaw stands,
whatever else was changed.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import NamedTuple

from lmdbitmap.copying.digest_algorithms import DIGEST_BYTES
from lmdbitmap.copying.hashing import digest_at, thread_count
from lmdbitmap.errors import (
    BAD_DISK,
    Busy,
    FormatError,
    InvalidArgument,
    LmdbitmapError,
    NotFound,
    StorageError,
    os_errors_at,
)
from lmdbitmap.geometry import ceil_div
from lmdbitmap.images.device import FileDevice
from lmdbitmap.repository.backup_chain import are_still, image_reader
from lmdbitmap.repository.backup_folder import BackupFolder
from lmdbitmap.repository.digests import found_digest, is_damage, read_digests, require_algorithms
from lmdbitmap.repository.manifest import BackupEntry, ChunkDigests, Manifest, chain_to, id_at
from lmdbitmap.repository.repository import folders_of, known_backups
from lmdbitmap.system import files
from lmdbitmap.work.crew import Threads
from lmdbitmap.work.progress import Progress, Report

MAX_FLAWS = 1000
"""Flaws that are listed; more are counted."""
_OTHER_DATA, _UNREADABLE = "the data is not what was backed up", "the disk cannot read the data"
_BATCH_BYTES = 16 << 20
"""Bytes that a thread hashes at once."""


@dataclass(frozen=True, slots=True)
class Flaw:
    """What is wrong with a file. For damaged data also which bytes of the file, in whole chunks."""

    disk: str
    backup: str | None
    """The id of the backup whose image it is; None if it is the manifest."""
    path: str
    problem: str
    offset: int | None = None
    length: int | None = None
    next_step: str | None = None
    """What to do about this flaw, if that differs from what to do about any damaged file."""


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """`flaws` has the first thousand of `flaw_count`. Bytes are those of image files."""

    disks: tuple[str, ...]
    image_count: int
    bytes_read: int
    flaws: tuple[Flaw, ...]
    flaw_count: int
    seconds: float

    @property
    def is_sound(self) -> bool:
        return self.flaw_count == 0


def verify(
    repository_path: str | os.PathLike[str],
    name: str | None = None,
    *,
    at: str | None = None,
    progress: Progress | None = None,
) -> VerifyResult:
    """Prove all backups of a repository, or of one disk, or those that a restore `at` a backup or a time needs.

    The result lists the flaws, and the images that cannot be proven for want of a package. Raises `NotFound` without
    such a disk or backup, `Busy` if the only flaws are in images that were pruned meanwhile, `StorageError` if the
    system refuses. Of a whole repository, a manifest that the system does not let us read is a flaw: the others are
    proven.
    """
    if at is not None and name is None:
        raise InvalidArgument(f"the disk of backup {at} is not named", next_step="name the disk too")
    started = time.monotonic()
    flaws = _Flaws()
    tasks = list(_tasks(repository_path, name, at, flaws))
    report = Report(progress, sum(entry.bytes_stored for task in tasks for entry in task.entries))
    for task in tasks:
        _prove(task, flaws, report)
    flaws.require_settled()
    return VerifyResult(
        disks=tuple(task.disk for task in tasks),
        image_count=sum(len(task.entries) for task in tasks),
        bytes_read=flaws.bytes_read,
        flaws=tuple(flaws.told),
        flaw_count=flaws.count,
        seconds=time.monotonic() - started,
    )


class _Flaws:
    def __init__(self) -> None:
        self.told: list[Flaw] = []
        self.count = 0
        self.bytes_read = 0
        self._pruned_at: str | None = None

    def add(self, found: Sequence[Flaw]) -> None:
        self.told += found[: MAX_FLAWS - len(self.told)]
        self.count += len(found)

    def add_all(self, others: _Flaws) -> None:
        self.told += others.told[: MAX_FLAWS - len(self.told)]
        self.count += others.count

    def excuse(self, folder_path: str) -> None:
        """Ignore a flawed image of that folder: the manifest does not mean it any more."""
        self._pruned_at = folder_path

    def require_settled(self) -> None:
        if self._pruned_at is not None and not self.count:
            raise Busy(f"{self._pruned_at} was pruned while it was verified", next_step="verify it again")


@dataclass(frozen=True, slots=True)
class _DiskToVerify:
    """The backups of one disk that are to be proven."""

    folder: BackupFolder
    disk: str
    manifest: Manifest
    entries: Sequence[BackupEntry]


def _tasks(
    repository_path: str | os.PathLike[str], name: str | None, at: str | None, flaws: _Flaws
) -> Iterator[_DiskToVerify]:
    for folder in folders_of(repository_path, None if name is None else [name]):
        try:
            manifest = known_backups(folder) if name is not None else folder.manifest()
        except (FormatError, StorageError) as refusal:
            if name is not None and isinstance(refusal, StorageError):
                raise
            step = refusal.next_step
            flaws.add([Flaw(folder.disk_name, None, refusal.place, refusal.problem, next_step=step)])
            continue
        if manifest is not None and not manifest.backups:
            flaws.add([_without_backups(folder)])
        elif manifest is not None:
            entries = manifest.backups if at is None else chain_to(manifest, id_at(manifest, at))
            yield _DiskToVerify(folder, folder.disk_name, manifest, entries)


def _without_backups(folder: BackupFolder) -> Flaw:
    """Return a flaw for a folder without backups: a nightly check of a copy must report that it was never completed."""
    problem = (
        f"{folder.path}: there is no backup in it: a copy into it is under way, or did not come to its end"
    )
    return Flaw(folder.disk_name, None, folder.path, problem, next_step="copy the backups there again")


def _prove(task: _DiskToVerify, flaws: _Flaws, report: Report) -> None:
    with closing(_found(task)) as found:
        for _, pieces in groupby(found, key=lambda piece: piece.entry.id):
            of_image = _Flaws()
            for piece in pieces:
                of_image.add(piece.found)
                flaws.bytes_read += piece.length
                report.advance(piece.length)
            if of_image.count == 0 or are_still(task.folder, [piece.entry]):
                flaws.add_all(of_image)
            else:
                flaws.excuse(task.folder.path)


def require_sound(
    folder: BackupFolder, manifest: Manifest, entries: Sequence[BackupEntry], report: Report
) -> None:
    """Raise `FormatError` unless every byte of the images is what was backed up. Call `require_algorithms` before.

    An image whose digests by chunks are lost is proven as a whole, and so may be sound.
    """
    with closing(_found(_DiskToVerify(folder, folder.disk_name, manifest, entries))) as pieces:
        for entry, flaws, length in pieces:
            report.advance(length)
            lost = folder.path_of(entry.chunks.file) if entry.chunks else None
            found = [flaw for flaw in flaws if flaw.path != lost]
            if found:
                raise FormatError(
                    folder.path,
                    expected="sound images",
                    found=f"a flaw: {found[0].problem}",
                    next_step="see all flaws with `lmdbitmap verify`, and get the files from a copy of the repository",
                )


class _CheckResult(NamedTuple):
    """The flaws of a piece of an image, and how many bytes of the image the piece proves."""

    entry: BackupEntry
    found: list[Flaw]
    length: int


def _found(task: _DiskToVerify) -> Generator[_CheckResult, None, None]:
    """Yield the results piece by piece in the order of the files, at least one for each.

    Close it if it is left before its end: what was not begun is then left out.
    """
    pending: deque[tuple[BackupEntry, Future[list[Flaw]], int]] = deque()
    with Threads(max_workers=thread_count()) as pool:
        try:
            for entry, job in _jobs(task):
                pending.append((entry, pool.submit(job.run), job.length))
                if len(pending) > 4 * thread_count():
                    yield _piece(*pending.popleft())
            while pending:
                yield _piece(*pending.popleft())
        finally:
            for _, unwanted, _ in pending:
                unwanted.cancel()


def _piece(entry: BackupEntry, found: Future[list[Flaw]], length: int) -> _CheckResult:
    return _CheckResult(entry, found.result(), length)


class _Check(NamedTuple):
    """Work for one thread, and how many bytes of the image it proves."""

    run: Callable[[], list[Flaw]]
    length: int = 0


def _jobs(task: _DiskToVerify) -> Iterator[tuple[BackupEntry, _Check]]:
    files_by_id = {entry.id: entry.file for entry in task.manifest.backups}
    for entry in task.entries:
        parent = None if entry.parent is None else files_by_id[entry.parent]
        for job in _Image(task, entry, parent).jobs():
            yield entry, job


class _Image:
    """One image and its digests. Each job opens the files anew, so no file is open for longer than it is read."""

    def __init__(self, task: _DiskToVerify, entry: BackupEntry, parent: str | None) -> None:
        self._folder = task.folder
        self._entry = entry
        self._parent = parent

    @property
    def _path(self) -> str:
        """Where the image is now: a prune or copy that takes effect gives it its name meanwhile."""
        return self._folder.image_path(self._entry.file)

    def jobs(self) -> Iterator[_Check]:
        try:
            self._folder.check_images([self._entry])
        except LmdbitmapError as refused:
            if not is_damage(refused):
                raise
            yield _Check(partial(list, [self._flaw(refused)]), self._entry.bytes_stored)
            return
        yield _Check(partial(self._unless_gone, self._check_structure))
        chunks = self._entry.chunks
        if chunks is not None and (wrong := self._wrong_with(chunks)) is not None:
            yield _Check(partial(list, [wrong]))
            chunks = None
        try:
            require_algorithms(self._folder, [self._entry])
        except NotFound as lacking:
            yield _Check(partial(list, [self._unproven(lacking)]))
            return
        yield from self._digest_jobs(chunks)

    def _digest_jobs(self, chunks: ChunkDigests | None) -> Iterator[_Check]:
        length = self._entry.bytes_stored
        if chunks is None:
            yield _Check(partial(self._unless_gone, self._check_whole), length)
            return
        batch = max(_BATCH_BYTES, chunks.chunk_size)
        for start in range(0, length, batch):
            stop = min(start + batch, length)
            check = partial(self._check_chunks, chunks, start, stop)
            yield _Check(partial(self._unless_gone, check), stop - start)

    def _unless_gone(self, check: Callable[[], list[Flaw]]) -> list[Flaw]:
        """Return what a check finds; a file that cannot be read, has gone or changed since is a flaw too."""
        path = self._path
        try:
            return check()
        except LmdbitmapError as wrong:
            if not is_damage(wrong):
                raise
            if self._path != path:  # it got its name at this very moment
                return self._unless_gone(check)
            return [self._flaw(wrong)]

    def _check_structure(self) -> list[Flaw]:
        with FileDevice.open(self._path, read_only=True) as device, os_errors_at(self._path):
            reader = image_reader(device, self._entry, self._parent)
            deque(reader.extents(0, reader.size), maxlen=0)
        return []

    def _wrong_with(self, chunks: ChunkDigests) -> Flaw | None:
        """Return why the digests of the chunks cannot be used; None if they can."""
        try:
            read_digests(self._folder, self._entry.bytes_stored, chunks)
        except LmdbitmapError as wrong:
            if not is_damage(wrong):
                raise
            return self._flaw(wrong, self._folder.path_of(chunks.file))
        return None

    def _check_whole(self) -> list[Flaw]:
        with _opened(self._path) as fd, os_errors_at(self._path):
            found = found_digest(self._entry, fd)
        if found == self._entry.digest:
            return []
        problem = f"expected SHA-256 {self._entry.digest}, found {found}"
        return [self._bytes_flaw(problem, 0, self._entry.bytes_stored)]

    def _check_chunks(self, chunks: ChunkDigests, start: int, stop: int) -> list[Flaw]:
        """Return the damaged ranges of [start, stop), which begins on a chunk."""
        path, first = self._folder.path_of(chunks.file), start // chunks.chunk_size
        count = ceil_div(stop, chunks.chunk_size) - first
        with _opened(path) as fd, os_errors_at(path):
            digests = files.pread_whole(fd, DIGEST_BYTES * count, DIGEST_BYTES * first)
        damaged: dict[str, list[tuple[int, int]]] = {_OTHER_DATA: [], _UNREADABLE: []}
        with _opened(self._path) as fd, os_errors_at(self._path):
            for number, offset in enumerate(range(start, stop, chunks.chunk_size)):
                length = min(chunks.chunk_size, stop - offset)
                digest = digests[DIGEST_BYTES * number : DIGEST_BYTES * (number + 1)]
                problem = _wrong_with_chunk(fd, chunks, offset, length, digest)
                if problem is not None:
                    _lengthen(damaged[problem], offset, length)
        return [self._bytes_flaw(problem, *run) for problem, runs in damaged.items() for run in runs]

    def _flaw(self, wrong: LmdbitmapError, path: str | None = None) -> Flaw:
        return Flaw(self._folder.disk_name, self._entry.id, path or self._path, wrong.problem)

    def _unproven(self, lacking: NotFound) -> Flaw:
        problem = f"{lacking.problem}; {lacking.next_step}"
        return Flaw(self._folder.disk_name, self._entry.id, self._path, problem)

    def _bytes_flaw(self, problem: str, offset: int, length: int) -> Flaw:
        where = f"{self._path}: bytes {offset}..{offset + length}: {problem}"
        return Flaw(self._folder.disk_name, self._entry.id, self._path, where, offset, length)


def _wrong_with_chunk(fd: int, chunks: ChunkDigests, offset: int, length: int, digest: bytes) -> str | None:
    try:
        found = digest_at(fd, chunks.algorithm, offset, length)
    except OSError as refusal:
        if refusal.errno not in BAD_DISK:
            raise
        return _UNREADABLE
    return None if found == digest else _OTHER_DATA


def _lengthen(runs: list[tuple[int, int]], offset: int, length: int) -> None:
    """Add a run (offset, length), merged into the last one if it continues that."""
    if runs and sum(runs[-1]) == offset:
        offset, length = runs[-1][0], runs.pop()[1] + length
    runs.append((offset, length))


@contextmanager
def _opened(path: str) -> Iterator[int]:
    with os_errors_at(path):
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
