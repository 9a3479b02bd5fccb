"""Healing of a store: if its environment is damaged or gone, it is made anew with all of its disks.

    STORE/lmdb  ──▶  STORE/lmdb.damaged-20261123T194400Z      kept, never looked into again
    STORE/owners/*  ──▶  a new STORE/lmdb                      each disk in a new epoch, everything dirty

LMDB trusts its pages, and a damaged page can crash the process. So nothing is read from the old environment: each
disk's description is in its owner's file too (owner_file.py). Lost are the checkpoints, which a full backup replaces,
and the stand-alone bitmaps, which came from files.

Invariants:
- No other process has the environment open, or opens it, meanwhile (presence.py): a server that uses it would go on
  with the old file, and its commits would be lost.
- A store of a newer schema, or a sound environment of another program, is not damaged, and is left alone.
- Healing calls no block clean: a new epoch is all dirty, and its image has yet to be seen.
- The new environment appears whole or not at all. A crash leaves the damaged one, or none: either is healed again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import Iterator, Sequence
from uuid import uuid4

from lmdbitmap.errors import LmdbitmapError
from lmdbitmap.storage import creating, lmdb_errors, owner_file, presence, schema
from lmdbitmap.storage.lmdb_errors import DamagedStore
from lmdbitmap.storage.presence import Presence
from lmdbitmap.storage.records import Writer
from lmdbitmap.storage.schema import Bitmap, Checkpoint, Disk
from lmdbitmap.system import file_locks
from lmdbitmap.system.file_names import is_uuid

log = logging.getLogger(__name__)

SALVAGED = "the store was damaged and was made anew"


def make(path: str) -> None:
    """Make the store in `path`, unless it is there; durable on return.

    Raises `DamagedStore` if it is gone, and somebody else has it open all the same.
    """
    creating.prepare_folder(path)
    with file_locks.lock_folder(path):
        if creating.environment_file(path) is None:
            with _nobody_opening(path) as entered:
                if not entered.is_alone():
                    raise gone(path)
                _make_anew(path, "its environment is gone" if known_disks(path) else None)


def heal(path: str, damage: DamagedStore, looked_at: tuple[int, int] | None) -> None:
    """Make the store anew whose environment, the file `looked_at`, is damaged; durable on return.

    Raises `damage` while somebody else has it open, and `FormatError` for what never was a store. Another process
    may be first: then nothing is done.
    """
    if not creating.is_ours(path) and not known_disks(path):
        raise lmdb_errors.not_a_store(path, damage.found) from damage
    with file_locks.lock_folder(path), _nobody_opening(path) as entered:
        if creating.environment_file(path) == looked_at:
            if not entered.is_alone():
                raise damage
            _make_anew(path, damage.problem)


@contextlib.contextmanager
def _nobody_opening(path: str) -> Iterator[Presence]:
    """In the block, no other process opens the environment."""
    with contextlib.ExitStack() as afterwards, presence.entering(os.path.join(path, "lmdb")) as entered:
        afterwards.callback(entered.close)
        yield entered


def gone(path: str) -> DamagedStore:
    return DamagedStore(path, expected="an environment in its folder lmdb", found="none")


def is_lost(path: str) -> bool:
    """Whether there was a store with disks in it, whose environment is gone."""
    return creating.environment_file(path) is None and bool(known_disks(path))


def _make_anew(path: str, problem: str | None) -> None:
    disks, time_ns = known_disks(path), time.time_ns()

    def fill(writer: Writer) -> None:
        for disk in disks:
            _put_back(writer, disk, time_ns)

    kept = creating.make_environment(path, fill)
    if problem is not None:
        names, left = ", ".join(sorted(disk.name for disk in disks)) or "none", _count_left_out(path, disks)
        log.error(
            "%s: the store was made anew with its disks (%s), which need full backups; checkpoints are lost, and"
            " bitmaps that stood alone: import those again%s%s",
            problem, names, f"; {left} disk could not be put back: add it again" if left else "",
            f"; what is damaged is kept as {kept}" if kept else "",
        )  # fmt: skip


def _put_back(writer: Writer, disk: Disk, time_ns: int) -> None:
    """As a new epoch (tracker/chain.py). The image was not seen, so the next owner begins another, for this reason."""
    number = disk.epoch_number + 1
    bitmap = Bitmap(writer.new_bitmap_id(), uuid4(), disk.size, disk.granularity_bits, all_dirty=SALVAGED)
    checkpoint = Checkpoint(disk.uuid, 1, f"epoch-{number}", uuid4(), time_ns, uuid4(), bitmap.id)
    writer.put_bitmap(bitmap)
    writer.put_checkpoint(checkpoint)
    writer.put_disk(
        dataclasses.replace(
            disk, epoch=checkpoint.epoch, epoch_number=number, epoch_reason=SALVAGED, next_sequence=2
        )
    )


# --- what the owners' files tell ---


def known_disks(path: str) -> list[Disk]:
    """The disks that owners' files describe: of two with one name or image, the one that was added last."""
    found: dict[str, Disk] = {}
    for disk in sorted(_described(path), key=lambda disk: disk.created_ns):
        for other in [other for other in found.values() if disk.image == other.image]:
            del found[other.name]
        found[disk.name] = disk
    return list(found.values())


def _described(path: str) -> Iterator[Disk]:
    """What is no description, or not of the file's own disk, is passed over."""
    for name in _owners_of(path):
        with contextlib.suppress(LmdbitmapError):
            record = owner_file.description(os.path.join(path, "owners", name))
            disk = None if record is None else schema.decode(Disk, record, place=name)
            if disk is not None and str(disk.uuid) == name:
                yield schema.portrait(disk)


def _count_left_out(path: str, disks: Sequence[Disk]) -> int:
    """How many owners' files there are of which no disk could be made."""
    known = {str(disk.uuid) for disk in disks}
    return sum(is_uuid(name) and name not in known for name in _owners_of(path))


def _owners_of(path: str) -> list[str]:
    folder = os.path.join(path, "owners")
    return os.listdir(folder) if os.path.isdir(folder) else []
