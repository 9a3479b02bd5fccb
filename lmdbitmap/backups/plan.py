"""Which backup it will be: the one that was asked for, or the next best and why.

    incremental, differential    a bitmap says what changed since the backup that it is stacked on
    rescan                       no bitmap can, but that backup is there: the disk is compared with it
    full                         everything; also where that backup is not there, or nobody could read it

Its digests are of the algorithm of the newest backup. The fastest one that there is comes with a full one that was
asked for, and with the first of all: no program that cannot read it is surprised by a full one that had to be.

A differential one is not replaced by a rescan: all those after it would have to read the whole disk as well, until
there is another full one to count from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lmdbitmap.copying.digest_algorithms import DigestAlgorithm, fastest, is_available
from lmdbitmap.errors import FormatError, LmdbitmapError, NotFound
from lmdbitmap.notes.references import Reason
from lmdbitmap.repository.chain_tables import what_is_broken
from lmdbitmap.repository.json_fields import MAX_TEXT_BYTES
from lmdbitmap.repository.manifest import TAKEN_OVER_EPOCH, BackupEntry, BackupType, Manifest, chain_to
from lmdbitmap.repository.repository import BackupFolder
from lmdbitmap.storage.schema import Checkpoint, Disk
from lmdbitmap.store import Store
from lmdbitmap.tracker import chain


class BackupPlan(NamedTuple):
    """One that is not full has a parent, and but for a rescan that one's checkpoint to count from."""

    type_actual: BackupType
    parent: BackupEntry | None = None
    since: Checkpoint | None = None
    reason: Reason | None = None


def plan_for(
    store: Store,
    disk: Disk,
    folder: BackupFolder,
    manifest: Manifest,
    kind: BackupType,
    ended: Reason | None = None,
) -> BackupPlan:
    """The highest rung that holds, for a disk whose backups are in `folder`; `ended` says why its checkpoints went."""
    if kind is BackupType.FULL:
        return BackupPlan(BackupType.FULL)
    parent = newest(manifest, full=kind is BackupType.DIFFERENTIAL)
    if parent is None:
        return BackupPlan(BackupType.FULL, reason=Reason("no-earlier-backup", "no earlier backup"))
    images = chain_to(manifest, parent.id)
    missing = _what_is_missing(folder, images)
    if missing is not None:
        return BackupPlan(BackupType.FULL, reason=missing)
    plan = _stacked(store, disk, parent, kind, ended)
    if plan.parent is None:
        return plan
    broken = what_is_broken(folder, images, thoroughly=plan.type_actual is BackupType.RESCAN)
    return plan if broken is None else full_instead(broken)


def _stacked(
    store: Store, disk: Disk, parent: BackupEntry, kind: BackupType, ended: Reason | None
) -> BackupPlan:
    """What it can be, if it can be stacked on `parent`."""
    since = _checkpoint_of(store, disk, parent)
    lost = _why_unknown(disk, parent, since, ended)
    if kind is BackupType.RESCAN:
        return BackupPlan(kind, parent)
    if lost is None:
        return BackupPlan(kind, parent, since)
    if kind is BackupType.DIFFERENTIAL:
        return BackupPlan(BackupType.FULL, reason=lost)
    return BackupPlan(BackupType.RESCAN, parent, reason=lost)


class DigestChoice(NamedTuple):
    """What a backup's digests will be made with; `reason` says why not with what the chain's newest are of."""

    algorithm: DigestAlgorithm
    reason: Reason | None = None


def digests_for(plan: BackupPlan, manifest: Manifest, asked: DigestAlgorithm | None = None) -> DigestChoice:
    """What was `asked` for. Else all goes on as it is, unless this Python cannot: a chain's images may differ in it.

    A full backup that was asked for is one without a reason.
    """
    before, is_full_by_wish = newest(manifest), plan.parent is None and plan.reason is None
    if asked is not None or is_full_by_wish or before is None:
        return DigestChoice(asked or fastest())
    usual = before.digest_algorithm
    if is_available(usual):
        return DigestChoice(usual)
    words = f"there is no package {usual.value} here, which digests like those of backup {before.id} need"
    return DigestChoice(DigestAlgorithm.SHA256, Reason("package-missing", words))


def newest(manifest: Manifest, *, full: bool = False) -> BackupEntry | None:
    """The newest backup, or the newest full one."""
    entries = reversed(manifest.backups)
    return next((entry for entry in entries if entry.type_actual is BackupType.FULL or not full), None)


def _what_is_missing(folder: BackupFolder, images: Sequence[BackupEntry]) -> Reason | None:
    try:
        folder.check_images(images)
    except NotFound as missing:
        return Reason("image-missing", _printable(missing.problem))
    except FormatError as changed:
        return Reason("image-changed", _printable(changed.problem))
    return None


def full_instead(damage: LmdbitmapError) -> BackupPlan:
    """Where an image of the chain cannot be read."""
    return BackupPlan(BackupType.FULL, reason=Reason("image-damaged", _printable(damage.problem)))


def _why_unknown(
    disk: Disk, parent: BackupEntry, since: Checkpoint | None, ended: Reason | None
) -> Reason | None:
    if parent.epoch == TAKEN_OVER_EPOCH:
        words = f"backup {parent.id}, before it, was made while the disk was tracked elsewhere"
        return Reason("tracked-elsewhere", _printable(words))
    if parent.epoch != disk.epoch:
        return Reason("new-epoch", _printable(disk.epoch_reason))
    if since is None and ended is not None:
        return Reason(ended.code, _printable(ended.words))
    if since is None:
        words = f"checkpoint {parent.checkpoint.name} was forgotten"
        return Reason("checkpoint-forgotten", _printable(words))
    return None


def _checkpoint_of(store: Store, disk: Disk, entry: BackupEntry) -> Checkpoint | None:
    """The checkpoint that a backup holds, if the disk still has it."""
    with store.read() as reader:
        members = chain.epoch_chain(reader, disk)
    return next((member for member in members if member.uuid == entry.checkpoint.uuid), None)


def _printable(words: str) -> str:
    """As a manifest can hold it: an epoch's reason may quote file names, which may be anything."""
    shown = "".join(character if character.isprintable() else "?" for character in words)
    return shown.encode(errors="replace")[:MAX_TEXT_BYTES].decode(errors="ignore") or "unknown"
