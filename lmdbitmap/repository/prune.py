"""Removes old backups. The remaining ones read as before, and need nothing that is removed.

A remaining backup that is stacked on a removed one is written anew, as the union of both (merge.py), over the nearest
remaining backup below it. Without one it becomes a full backup, made without the disk. It keeps its id, its time, its
checkpoint and its file's name, which the headers of the images above it contain. When several have lost the same full
backup, the first of them becomes full and the others are moved onto it, so that they stay small.

Each merge is proven, durable and decided by itself (`BackupFolder.succeed`), and removes what nothing needs any more.
So the folder is larger only by the images that are being written. A death costs the merge under way. Images are checked
by their digests before they are merged: a new digest must not vouch for old damage. The merged image's digests use the
algorithm of the remaining backup.

The store is not needed. Checkpoints of removed backups are named in the manifest, as `released`, until the next backup
has forgotten them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import tzinfo
from typing import NamedTuple

from lmdbitmap.copying.copier import Copied
from lmdbitmap.copying.hashing import ChunkHasher
from lmdbitmap.errors import InvalidArgument, LmdbitmapError
from lmdbitmap.extents import Trust
from lmdbitmap.images.file_pool import FilePool
from lmdbitmap.notes.references import Reason
from lmdbitmap.repository.backup_folder import BackupFolder
from lmdbitmap.repository.digests import require_algorithms, synced_digests
from lmdbitmap.repository.manifest import BackupEntry, BackupType, ChunkDigests, Manifest, chain_to
from lmdbitmap.repository.merge import View, write_merged
from lmdbitmap.repository.repository import folders_of, folders_with_backups, known_backups
from lmdbitmap.repository.retention import Retention, kept
from lmdbitmap.repository.verify import require_sound
from lmdbitmap.system import atomic_files
from lmdbitmap.work.disks_failed import DisksFailed
from lmdbitmap.work.failures import Failures
from lmdbitmap.work.patience import Patience
from lmdbitmap.work.progress import Progress, Report


@dataclass(frozen=True, slots=True)
class PruneResult:
    """What a prune does, or would do, to one disk's backups.

    A backup is removed if no rule keeps it, or if it is dropped. Removed entries are as they were, the others as they
    are now. `rewritten` are the ids of the backups that are merged with removed ones.
    """

    disk: str
    kept: tuple[BackupEntry, ...]
    removed: tuple[BackupEntry, ...]
    rewritten: tuple[str, ...]
    bytes_before: int
    bytes_after: int | None
    """Bytes of images; None if nothing was done."""
    seconds: float


class PrunesFailed(DisksFailed):
    """Some of several disks were not pruned, or not completely; those in `results` are."""

    def __init__(self, results: Sequence[PruneResult], failures: Mapping[str, LmdbitmapError]) -> None:
        super().__init__("pruned", len(results), failures)
        self.results = tuple(results)


class _Wish(NamedTuple):
    """Which backups stay: all that the rules keep, or all without rules, but never a dropped one."""

    keep: Retention | None
    drop: frozenset[str]
    zone: tzinfo | None

    def stay(self, manifest: Manifest) -> set[str]:
        for backup_id in sorted(self.drop):
            chain_to(manifest, backup_id)  # `NotFound` if there is none
        left = [entry for entry in manifest.backups if entry.id not in self.drop]
        if not left or (self.keep is None and not self.drop):
            raise InvalidArgument(
                "no backup would be kept", next_step="keep at least one, or make a full backup first"
            )
        return {entry.id for entry in left} if self.keep is None else kept(left, self.keep, self.zone)


class _Rewrite(NamedTuple):
    """A backup that stays and loses its parent, and the backup it will be stacked on."""

    entry: BackupEntry
    onto: BackupEntry | None


def prune(
    repository_path: str | os.PathLike[str],
    names: Sequence[str] | None = None,
    *,
    keep: Retention | None = None,
    drop: Sequence[str] = (),
    zone: tzinfo | None = None,
    dry_run: bool = False,
    lock_wait_s: float = 0.0,
    progress: Progress | None = None,
) -> list[PruneResult]:
    """Remove all backups but those that `keep` wants, of the disks called `names` or of all; durable on return.

    Only None stands for all disks: an empty list is nothing to do, so that a list that was filtered is safe.
    `drop` names backups of one disk, by their ids, that are removed in any case; without `keep` all others stay.
    `dry_run` returns what would be done and touches nothing. What `progress` raises ends the work, also while images
    are proven; finished merges stay.
    Raises `NotFound` without such a disk or backup, or if an image to be merged has digests that need a missing
    package; `Busy` if another run uses a folder for longer than `lock_wait_s`, which is for all folders together;
    `FormatError` for images that are not what they were when they were made. Nothing is done to that disk then. If one
    of several disks fails for such a reason it is left out, and `PrunesFailed` reports it in the end.
    """
    wish = _Wish(keep, _dropped(drop, names), zone)
    folders = folders_of(repository_path, names)
    failures, patience = Failures(at_once=len(folders) == 1), Patience(lock_wait_s)
    known = folders_with_backups(folders, failures, named=names is not None)
    bytes_to_read = [_bytes_to_read(each, wish.stay(each)) for _, each in known]
    report, passed, results = Report(failures.heeding(progress), sum(bytes_to_read)), 0, []
    for (folder, manifest), count in zip(known, bytes_to_read, strict=True):
        with failures.of(folder.disk_name):
            if dry_run:
                results.append(_would_prune(folder, manifest, wish))
            else:
                results.append(_prune(folder, wish, patience, report))
        passed += count
        report.reach(passed)
    if failures.errors:
        raise PrunesFailed(results, failures.errors)
    return results


def _dropped(drop: Sequence[str], names: Sequence[str] | None) -> frozenset[str]:
    """Return the ids to drop. One text in place of a list is refused: each of its digits would name a backup."""
    if isinstance(drop, str):
        raise InvalidArgument(f"{drop!r} is one backup where several may be", next_step=f"give [{drop!r}]")
    if drop and (names is None or len(names) != 1):
        raise InvalidArgument(
            f"the disk of backup {drop[0]} is not named", next_step="name that one disk, and no other"
        )
    for each in drop:
        if not isinstance(each, str):
            raise InvalidArgument(f"{each!r} is not the text of a backup's id", next_step="name it like '3'")
    return frozenset(drop)


def _would_prune(folder: BackupFolder, manifest: Manifest, wish: _Wish) -> PruneResult:
    started, stay = time.monotonic(), wish.stay(manifest)
    require_algorithms(folder, _to_merge(manifest, stay))
    return _told(folder, manifest, None, stay, started)


def _prune(folder: BackupFolder, wish: _Wish, patience: Patience, report: Report) -> PruneResult:
    with folder.locked(patience):
        started = time.monotonic()
        before = manifest = known_backups(folder)
        folder.check_names(before.backups)
        stay = wish.stay(before)
        require_algorithms(folder, _to_merge(before, stay))
        try:
            manifest = _let_go(folder, manifest, stay)
            for group in _groups(manifest, stay):
                merged = [_written(folder, manifest, rewrite, report) for rewrite in group]
                manifest = _let_go(folder, _with(manifest, merged), stay, changed=True)
        except BaseException:
            with contextlib.suppress(LmdbitmapError):
                folder.settle()  # images that were written and not decided take space
            raise
        return _told(folder, before, manifest, stay, started)


# --- what is removed, and what is written anew ---


def _needed(backups: Sequence[BackupEntry], stay: Iterable[str]) -> set[str]:
    """Return the ids of the backups that stay, and of all that they are stacked on."""
    needed = set(stay)
    for entry in reversed(backups):
        if entry.id in needed and entry.parent is not None:
            needed.add(entry.parent)
    return needed


def _let_go(folder: BackupFolder, manifest: Manifest, stay: set[str], *, changed: bool = False) -> Manifest:
    """Remove from manifest and folder what no remaining backup is stacked on. `changed`: the manifest is new."""
    needed = _needed(manifest.backups, stay)
    remaining = tuple(entry for entry in manifest.backups if entry.id in needed)
    gone = tuple(entry.checkpoint for entry in manifest.backups if entry.id not in needed)
    if gone or changed:
        released, last = (*manifest.released, *gone), manifest.last_sequence
        if remaining[-1] is not manifest.backups[-1]:  # no other backup may get its number: copies have it
            last = manifest.newest_sequence
        manifest = dataclasses.replace(manifest, backups=remaining, released=released, last_sequence=last)
        folder.succeed(manifest)
    return manifest


def _with(manifest: Manifest, changed: Sequence[BackupEntry]) -> Manifest:
    by_id = {entry.id: entry for entry in changed}
    return dataclasses.replace(
        manifest, backups=tuple(by_id.get(entry.id, entry) for entry in manifest.backups)
    )


def _groups(manifest: Manifest, stay: set[str]) -> list[list[_Rewrite]]:
    """Return the backups to write anew, in groups that have to take effect together.

    There is one group for each removed full backup, whose images all of the group are read from, and one for each other
    backup.
    """
    groups: list[list[_Rewrite]] = []
    heirs: dict[str, list[_Rewrite]] = {}
    for entry in manifest.backups:
        if entry.id not in stay or entry.parent is None or entry.parent in stay:
            continue
        chain = chain_to(manifest, entry.id)
        onto = next((below for below in reversed(chain[:-1]) if below.id in stay), None)
        if onto is not None:
            groups.append([_Rewrite(entry, onto)])
        elif chain[0].id in heirs:
            heirs[chain[0].id].append(_Rewrite(entry, heirs[chain[0].id][0].entry))
        else:
            heirs[chain[0].id] = [_Rewrite(entry, None)]
            groups.append(heirs[chain[0].id])
    return groups


def _merged_of(manifest: Manifest, rewrite: _Rewrite) -> Sequence[BackupEntry]:
    """Return the images that a backup is merged of: its own and those below, or those down to its new parent."""
    chain = chain_to(manifest, rewrite.entry.id)
    ids = [entry.id for entry in chain]
    if rewrite.onto is None or rewrite.onto.id not in ids:
        return chain
    return chain[ids.index(rewrite.onto.id) + 1 :]


def _to_merge(manifest: Manifest, stay: set[str]) -> Iterator[BackupEntry]:
    """Yield all images that are read, as often as they are."""
    for rewrite in itertools.chain(*_groups(manifest, stay)):
        yield from _merged_of(manifest, rewrite)


def _bytes_to_read(manifest: Manifest, stay: set[str]) -> int:
    """Return the bytes that are read: each image twice, to be proven and to be copied."""
    return 2 * sum(entry.bytes_stored for entry in _to_merge(manifest, stay))


# --- merging ---


def _written(folder: BackupFolder, manifest: Manifest, rewrite: _Rewrite, report: Report) -> BackupEntry:
    """Merge a backup with those that are removed. Its image is durable beside the one that it will replace."""
    entry, onto = rewrite
    merged = _merged_of(manifest, rewrite)
    require_sound(folder, manifest, merged, report)
    chain = chain_to(manifest, entry.id)
    path = folder.successor_path(entry.file)
    with FilePool() as pool, atomic_files.replacing(path, follow=False) as file:
        view = View(pool, folder, chain, down_to=len(chain) - len(merged))
        over = _over(pool, folder, manifest, onto, is_below=len(merged) < len(chain))
        copied, compression = write_merged(file.fileno(), path, view, over, report)
        with ChunkHasher(file.fileno(), folder.path, entry.digest_algorithm) as hasher:
            chunks = synced_digests(folder, entry.file, file.fileno(), hasher)
    merged_entry = _entry(entry, onto, merged, copied, chunks)
    return dataclasses.replace(merged_entry, compression=compression)


def _over(
    pool: FilePool, folder: BackupFolder, manifest: Manifest, onto: BackupEntry | None, *, is_below: bool
) -> View | None:
    """Return what the new parent reads as. If it is below the merged backup, all of it is one place."""
    if onto is None:
        return None
    chain = chain_to(manifest, onto.id)
    return View(pool, folder, chain, down_to=len(chain) if is_below else 0)


def _entry(
    entry: BackupEntry,
    onto: BackupEntry | None,
    merged: Sequence[BackupEntry],
    copied: Copied,
    chunks: ChunkDigests,
) -> BackupEntry:
    is_superset = onto is not None and any(each.trust is Trust.SUPERSET for each in merged)
    changed = dataclasses.replace(
        entry, parent=None if onto is None else onto.id, trust=Trust.SUPERSET if is_superset else Trust.EXACT,
        bytes_changed=copied.bytes_changed, bytes_zero=copied.bytes_zero, bytes_stored=copied.bytes_stored,
        sha256=None, chunks=chunks,
    )  # fmt: skip
    if onto is not None:
        return changed
    reason = Reason("merged", "merged with the backups that it was stacked on, when those were pruned")
    return dataclasses.replace(changed, type_actual=BackupType.FULL, reason=reason)


def _told(
    folder: BackupFolder, before: Manifest, after: Manifest | None, stay: set[str], started: float
) -> PruneResult:
    entries: Mapping[str, BackupEntry] = {entry.id: entry for entry in (after or before).backups}
    rewrites = [rewrite.entry.id for group in _groups(before, stay) for rewrite in group]
    return PruneResult(
        disk=folder.disk_name,
        kept=tuple(entries[entry.id] for entry in before.backups if entry.id in stay),
        removed=tuple(entry for entry in before.backups if entry.id not in stay),
        rewritten=tuple(rewrites),
        bytes_before=sum(entry.bytes_stored for entry in before.backups),
        bytes_after=None if after is None else sum(entry.bytes_stored for entry in after.backups),
        seconds=time.monotonic() - started,
    )
