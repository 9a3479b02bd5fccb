"""Decides the type of a backup: the one that was asked for, or the next best and why.

    incremental, differential    a bitmap says what changed since the backup that it is stacked on
    rescan                       no bitmap can say it, but that backup is there: the disk is compared with it
    full                         everything; also if that backup is missing or cannot be read

The digests use the algorithm of the newest backup. The fastest algorithm available is chosen only for the first backup
of all and for a full backup that was asked for. So a full backup made out of need never surprises a program that cannot
read the new algorithm.

A differential backup is not replaced by a rescan: all those after it would have to read the whole disk as well, until
there is another full one to count from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lmdbitmap.copying.digest_algorithms import DigestAlgorithm, fastest, is_available
from lmdbitmap.errors import FormatError, LmdbitmapError, NotFound, StorageError
from lmdbitmap.notes.references import Reason
from lmdbitmap.qcow2 import compression
from lmdbitmap.qcow2.layout import CompressionType
from lmdbitmap.repository.backup_folder import BackupFolder
from lmdbitmap.repository.chain_tables import what_is_broken
from lmdbitmap.repository.json_fields import MAX_TEXT_BYTES
from lmdbitmap.repository.manifest import TAKEN_OVER_EPOCH, BackupEntry, BackupType, Manifest, chain_to
from lmdbitmap.storage.schema import Checkpoint, Disk
from lmdbitmap.store import Store
from lmdbitmap.tracker import chain


class BackupPlan(NamedTuple):
    """What a backup will be. Unless full it has a parent; unless a rescan, also the checkpoint to count from."""

    type_actual: BackupType
    parent: BackupEntry | None = None
    since: Checkpoint | None = None
    reason: Reason | None = None
    sifts: bool = False
    """Whether a bitmap says too much, as after a crash: what may be unchanged is compared with the parent."""

    @property
    def compares(self) -> bool:
        """Whether some of the disk is read twice, and the parent too."""
        return self.sifts or self.type_actual is BackupType.RESCAN


def plan_for(
    store: Store,
    disk: Disk,
    folder: BackupFolder,
    manifest: Manifest,
    kind: BackupType,
    ended: Reason | None = None,
) -> BackupPlan:
    """Return the best possible plan for a disk whose backups are in `folder`; `ended` says why its checkpoints went."""
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
    if plan.since is not None and _says_too_much(store, disk, plan.since):
        plan = plan._replace(sifts=all(_can_be_proven(image) for image in images))
    broken = what_is_broken(folder, images, thoroughly=plan.type_actual is BackupType.RESCAN)
    return plan if broken is None else full_instead(broken)


def _stacked(
    store: Store, disk: Disk, parent: BackupEntry, kind: BackupType, ended: Reason | None
) -> BackupPlan:
    """Return the plan of a backup stacked on `parent`, or of a full one if that cannot be."""
    since = _checkpoint_of(store, disk, parent)
    lost = _why_unknown(disk, parent, since, ended)
    if kind is BackupType.RESCAN:
        return BackupPlan(kind, parent)
    if lost is None:
        return BackupPlan(kind, parent, since)
    if kind is BackupType.DIFFERENTIAL:
        return BackupPlan(BackupType.FULL, reason=lost)
    return BackupPlan(BackupType.RESCAN, parent, reason=lost)


def _says_too_much(store: Store, disk: Disk, since: Checkpoint) -> bool:
    """Return whether a bitmap of the periods since then may name clean blocks."""
    with store.read() as reader:
        periods = [each for each in chain.epoch_chain(reader, disk) if each.sequence >= since.sequence]
        bitmaps = [reader.bitmap(period.bitmap_id) for period in periods]
    return any(bitmap.superset or bitmap.all_dirty for bitmap in bitmaps)


def _can_be_proven(image: BackupEntry) -> bool:
    """Return whether an image can be read here, and what is read of it be proven."""
    try:
        compression.require(image.compression or CompressionType.ZLIB)
    except NotFound:
        return False
    return image.chunks is not None and is_available(image.digest_algorithm)


class DigestChoice(NamedTuple):
    """The digest algorithm of a backup; `reason` says why it is not the one of the chain's newest backup."""

    algorithm: DigestAlgorithm
    reason: Reason | None = None


def digests_for(plan: BackupPlan, manifest: Manifest, asked: DigestAlgorithm | None = None) -> DigestChoice:
    """Return the algorithm `asked` for. Else the fastest, for a first backup and for a full one that was asked for.

    Any other backup gets that of the newest one, or SHA-256 if this Python lacks the package for that: images of one
    chain may differ in it. A full backup without a reason is one that was asked for.
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
    """Return the newest backup, or the newest full one."""
    entries = reversed(manifest.backups)
    return next((entry for entry in entries if entry.type_actual is BackupType.FULL or not full), None)


def _what_is_missing(folder: BackupFolder, images: Sequence[BackupEntry]) -> Reason | None:
    try:
        folder.check_images(images)
    except NotFound as missing:
        return Reason("image-missing", _printable(missing.problem))
    except FormatError as changed:
        return Reason("image-changed", _printable(changed.problem))
    except StorageError as refusal:
        if not refusal.is_of_bad_disk:
            raise
        return _damaged(refusal)
    return None


def full_instead(damage: LmdbitmapError) -> BackupPlan:
    """Return the plan of a full backup made because an image of the chain cannot be read."""
    return BackupPlan(BackupType.FULL, reason=_damaged(damage))


def _damaged(damage: LmdbitmapError) -> Reason:
    return Reason("image-damaged", _printable(damage.problem))


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
    """Return the checkpoint that a backup holds, if the disk still has it."""
    with store.read() as reader:
        members = chain.epoch_chain(reader, disk)
    return next((member for member in members if member.uuid == entry.checkpoint.uuid), None)


def _printable(words: str) -> str:
    """Return `words` as a manifest can hold them. An epoch's reason may quote file names, which may be anything."""
    shown = "".join(character if character.isprintable() else "?" for character in words)
    return shown.encode(errors="replace")[:MAX_TEXT_BYTES].decode(errors="ignore") or "unknown"
