"""Restores a disk as it was at one of its backups: into a new raw file, sparse, or onto a block device.

backup_chain.py reads the images. Digests are computed beside the copying, in a thread, and a file that is not what
the manifest says fails the restore before its result has a name; a block device is written only after they are
known to be right.

The kernel copies the data from file to file where it can, so that no byte passes through this program; what is
compressed does.
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from lmdbitmap import backup_chain, files
from lmdbitmap.backup_chain import BackupChain, Image
from lmdbitmap.copier import Progress, Report
from lmdbitmap.device import FileDevice
from lmdbitmap.errors import AlreadyExists, FormatError, InvalidArgument, NotFound, os_errors_at
from lmdbitmap.interfaces import Buffer
from lmdbitmap.manifest import BackupEntry, Manifest, chain_to
from lmdbitmap.qcow2 import Kind, Run
from lmdbitmap.repository import BackupFolder, disk_names, sha256_of

_PIECE_BYTES = 8 << 20
"""Copied in one call, between two reports."""
_USE_ANOTHER = "restore an earlier backup, or get the file from a copy of the repository"


@dataclass(frozen=True, slots=True)
class RestoreResult:
    """`bytes_written` of the disk's bytes were data; the others read as zeroes."""

    entry: BackupEntry
    path: str
    bytes_written: int
    seconds: float


def restore(
    repository_path: str | os.PathLike[str],
    name: str,
    out_path: str | os.PathLike[str],
    *,
    at: str | None = None,
    verify: bool = True,
    progress: Progress | None = None,
) -> RestoreResult:
    """Write the disk called `name` as it was at the backup with the id `at`, or at the newest one.

    `out_path` is a file that is not there yet, or empty, or a block device of the disk's size; durable on
    return. `verify=False` leaves out the digests, not the structure. Raises `NotFound` without such a
    disk or backup, `FormatError` for a manifest or image that is not what it must be, `AlreadyExists` for
    a file with something in it, `StorageError` where the system refuses.
    """
    started = time.monotonic()
    folder = BackupFolder(repository_path, name)
    manifest = _manifest(folder, name)
    entries = chain_to(manifest, at if at is not None else manifest.backups[-1].id)
    size, place = entries[-1].disk_size, os.fspath(out_path)
    with backup_chain.opened(folder, entries) as disk, _target(place, size) as (target, fresh):
        copy = _Copy(disk, target, fresh, Report(progress, size))
        with _digests(disk.images if verify else []) as checked:
            if not fresh:
                checked.result()
            for run in disk.extents(0, size):
                copy.put(run)
            with os_errors_at(place):
                target.flush()  # beside the digests, which mostly take longer than the copy
            checked.result()
    return RestoreResult(entries[-1], place, copy.bytes_written, time.monotonic() - started)


def _manifest(folder: BackupFolder, name: str) -> Manifest:
    """A manifest with a backup in it."""
    known = ", ".join(disk_names(folder.repository_path)) or "none"
    manifest = folder.manifest() if os.path.isdir(folder.path) else None
    if manifest is None or not manifest.backups:
        raise NotFound(
            f"{folder.repository_path} has no backup of a disk called {name!r}",
            next_step=f"name another: it has backups of {known}",
        )
    return manifest


# --- the digests ---


@contextlib.contextmanager
def _digests(images: Sequence[Image]) -> Iterator[Future[None]]:
    """Compare the images' digests in a thread of its own, until the block ends; its result raises what is wrong."""
    stop = threading.Event()
    with ThreadPoolExecutor(max_workers=1) as beside:
        try:
            yield beside.submit(_check_digests, images, stop)
        finally:
            stop.set()


def _check_digests(images: Sequence[Image], stop: threading.Event) -> None:
    for image in images:
        path, fd = image.device.path, image.device.fd
        assert fd is not None
        with os_errors_at(path):
            found = sha256_of(fd, stop.is_set)
        if found != image.entry.sha256:
            raise FormatError(
                path, expected=f"SHA-256 {image.entry.sha256}", found=found, next_step=_USE_ANOTHER
            )


# --- the target ---


@contextlib.contextmanager
def _target(path: str, size: int) -> Iterator[tuple[FileDevice, bool]]:
    """What to write into, and whether all of it reads as zeroes yet. What was flushed is durable after the block."""
    if _is_block_device(path):
        with FileDevice.open(path) as device:
            if device.size != size:
                raise InvalidArgument(
                    f"{path} has {device.size} bytes, and the disk had {size}",
                    next_step="name a block device of that size, or a new file",
                )
            yield device, False
        return
    _require_free(path)
    with _taken_away_on_failure(path) as watched, files.replacing(path) as file:
        watched(file.fileno())
        with os_errors_at(path):
            os.ftruncate(file.fileno(), size)
        yield FileDevice(path, file.fileno(), read_only=False), True
        _require_free(path)  # again: a restore may take hours


@contextlib.contextmanager
def _taken_away_on_failure(path: str) -> Iterator[Callable[[int], None]]:
    """A file that got its name, but perhaps not durably, must not be in the way of the next restore.

    Only the file of the descriptor that is given to the block's function: it is held open, so that no other
    file can have its number.
    """
    with contextlib.ExitStack() as held:
        fds: list[int] = []

        def watch(fd: int) -> None:
            fds.append(os.dup(fd))
            held.callback(os.close, fds[-1])

        try:
            yield watch
        except BaseException:
            with contextlib.suppress(OSError):
                if fds and os.path.samestat(os.fstat(fds[0]), os.stat(path)):
                    os.unlink(path)
            raise


def _is_block_device(path: str) -> bool:
    return os.path.exists(path) and stat.S_ISBLK(os.stat(path).st_mode)


def _require_free(path: str) -> None:
    if os.path.isdir(path):
        raise InvalidArgument(f"{path} is a folder", next_step="name a new file in it")
    if os.path.exists(path) and os.path.getsize(path) > 0:
        raise AlreadyExists(
            f"{path} exists, and is not empty", next_step="name a new file, or remove that one"
        )


class _Copy:
    """Puts runs of the chain where they belong on the target."""

    def __init__(self, disk: BackupChain, target: FileDevice, fresh: bool, report: Report) -> None:
        self._disk = disk
        self._target = target
        self._fresh = fresh
        self._report = report
        self._kernel_can = True
        self.bytes_written = 0

    def put(self, run: Run) -> None:
        if run.kind is Kind.DATA:
            self._copy(self._disk.images[run.layer].device, run)
        elif run.kind is Kind.COMPRESSED:
            self._decompress(run)
        else:
            if not self._fresh:
                with os_errors_at(self._target.path):
                    self._target.write_zeroes(run.offset, run.length)
            self._report.advance(run.length)

    def _decompress(self, run: Run) -> None:
        data = bytearray(run.length)
        self._disk.fill(memoryview(data), run)
        self._write(data, run.offset)
        self.bytes_written += run.length
        self._report.advance(run.length)

    def _copy(self, image: FileDevice, run: Run) -> None:
        done = 0
        while done < run.length:
            length = min(_PIECE_BYTES, run.length - done)
            places = run.host_offset + done, run.offset + done
            copied = self._copy_in_kernel(image, *places, length)
            if not copied:
                self._copy_by_hand(image, *places, length)
            done += copied or length
            self._report.advance(copied or length)
        self.bytes_written += run.length

    def _copy_in_kernel(self, image: FileDevice, host_offset: int, offset: int, length: int) -> int:
        """How many bytes the kernel copied: 0 where it cannot, or where copying by hand will tell why not."""
        source, target = image.fd, self._target.fd
        assert source is not None
        assert target is not None
        if self._kernel_can:
            try:
                return os.copy_file_range(source, target, length, host_offset, offset)
            except OSError:
                self._kernel_can = False
        return 0

    def _copy_by_hand(self, image: FileDevice, host_offset: int, offset: int, length: int) -> None:
        with os_errors_at(image.path):
            data = image.pread(length, host_offset)
        self._write(data, offset)

    def _write(self, data: Buffer, offset: int) -> None:
        with os_errors_at(self._target.path):
            self._target.pwrite(data, offset)
