"""Lives in which a disk is copied away and back: backups, what becomes of them, second copies.

Nobody writes to the image between what is told of a copy as begun and the moment that the copy is of; so it is of what
the image's readers saw when it was begun.
"""

from __future__ import annotations

import errno
import itertools
import os

from lmdbitmap.backups.backup import backup
from lmdbitmap.repository.manifest import BackupType
from lmdbitmap.repository.prune import prune
from lmdbitmap.repository.retention import Retention
from lmdbitmap.repository.transfer import copy_backups
from lmdbitmap.restoring.restore import restore
from lmdbitmap.syncs.sync import sync
from lmdbitmap.tracker.scratch import Scratch
from tests.crash.power_cut.flaws import replaced
from tests.crash.power_cut.stage import (
    BLOCKS,
    COPY,
    REPOSITORY,
    RESTORED,
    SECOND_REPOSITORY,
    A,
    B,
    Stage,
    tell_mtime,
    telling,
)


def backing_up(stage: Stage) -> None:
    stage.prepare(A)
    for kind in (BackupType.FULL, BackupType.INCREMENTAL, BackupType.DIFFERENTIAL):
        write_and_detach(stage)
        back_up(stage, A, kind=kind)


def backing_up_live(stage: Stage) -> None:
    """Two disks at one moment, whose guests write on while they are copied."""
    stage.prepare(A, B)
    guests = {name: stage.attach(name) for name in (A, B)}
    old_data, numbers = Scratch("/dev/shm"), itertools.count()

    def write_on(*_: object) -> None:
        for guest in guests.values():
            guest.write(next(numbers) * 331 % BLOCKS)  # in another extent each time

    for _ in range(3):
        write_on()
        with telling("backup", disks=[A, B]):
            filters = {name: guest.disk for name, guest in guests.items()}
            backup(
                stage.store, [A, B], stage.folder / REPOSITORY,
                attached=filters, scratch=old_data, progress=write_on,
            )  # fmt: skip


def rescanning(stage: Stage) -> None:
    stage.prepare(A)
    for _ in range(2):
        write_and_detach(stage)
        back_up(stage, A)
        guest = stage.attach(A)
        guest.disk.start_epoch(NO_BITMAP)
        guest.detach()
    back_up(stage, A)


NO_BITMAP = "the bitmap was thrown away"


def pruning(stage: Stage) -> None:
    stage.prepare(A)
    for keep in (3, 1):
        for _ in range(3):
            write_and_detach(stage)
            back_up(stage, A)
        with telling("prune", disk=A, keep=keep), replaced(os, "copy_file_range", _no_copying_in_the_kernel):
            prune(stage.folder / REPOSITORY, keep=Retention(last=keep))
    write_and_detach(stage)
    back_up(stage, A)


def copying(stage: Stage) -> None:
    stage.prepare(A)
    for _ in range(2):
        for _ in range(2):
            write_and_detach(stage)
            back_up(stage, A)
        with telling("copy", disk=A), replaced(os, "copy_file_range", _no_copying_in_the_kernel):
            copy_backups(stage.folder / REPOSITORY, stage.folder / SECOND_REPOSITORY)


def syncing(stage: Stage) -> None:
    stage.prepare(A)
    for _ in range(3):
        write_and_detach(stage)
        with telling("sync", disk=A):
            sync(stage.store, A, stage.image(COPY))
        tell_mtime(COPY, stage.image(COPY))


def restoring(stage: Stage) -> None:
    stage.prepare(A)
    back_up(stage, A)
    with telling("restore"), replaced(os, "copy_file_range", _no_copying_in_the_kernel):
        restore(stage.folder / REPOSITORY, A, stage.folder / RESTORED)


def going_back(stage: Stage) -> None:
    """In place, through the tracker; another disk's life goes on before anybody asks for this one again."""
    stage.prepare(A, B)
    for _ in range(2):
        write_and_detach(stage)
        back_up(stage, A)
    write_and_detach(stage)
    with telling("go back", disk=A, at="1"):
        restore(stage.folder / REPOSITORY, A, stage.image(A), at="1", in_place=True, store=stage.store)
    tell_mtime(A, stage.image(A))
    guest = stage.attach(B)
    guest.live_a_little()
    guest.detach()
    back_up(stage, A)


def write_and_detach(stage: Stage) -> None:
    guest = stage.attach(A)
    number = next(_numbers)
    guest.write(90 + number)
    guest.write(3100 + 2 * number, 4)
    guest.discard(250 * number, 1)
    guest.detach()


_numbers = itertools.count()


def back_up(stage: Stage, disk: str, *, kind: BackupType = BackupType.INCREMENTAL) -> None:
    with telling("backup", disk=disk):
        backup(stage.store, [disk], stage.folder / REPOSITORY, kind=kind)


def _no_copying_in_the_kernel(*_: object) -> int:
    """The recorder would not see the data."""
    raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
