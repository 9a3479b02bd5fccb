"""Undoes what unfinished backups left.

A run that died may have asked an owner for a checkpoint that is made later, when nobody waits for it any more. A backup
that starts in between does not find that checkpoint yet. So work whose checkpoint is not there to be undone stays noted
until the backup's own checkpoint is taken, and is undone after it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Final

from lmdbitmap.access.access import Access
from lmdbitmap.notes.checkpoint_names import Maker
from lmdbitmap.repository.backup_folder import BackupFolder
from lmdbitmap.repository.unfinished import Unfinished
from lmdbitmap.storage.schema import Checkpoint, Disk

_MOST_LATE: Final = 16
"""At most this many late requests can be outstanding: as many as may ask an owner at once."""


def undo_unfinished(
    route: Access, disk: Disk, folder: BackupFolder, late: Collection[str] | None = None
) -> list[Unfinished]:
    """Undo what runs made that the manifest does not know. Return the work that stays noted, to be undone later.

    It stays noted if its checkpoint cannot be forgotten, as the only one that records or one that is still held, or if
    the checkpoint may still be made. The latter applies to the names in `late`, or to all if `late` is None.
    """
    abandoned = folder.unfinished()
    names = {work.checkpoint for work in abandoned}
    seen: set[str] = set()

    def is_abandoned(member: Checkpoint) -> bool:
        if member.name in names:
            seen.add(member.name)
        return member.name in seen

    stay = set(forget(route, disk, is_abandoned)) if names else set()
    if route.may_be_behind:
        stay |= (names - seen) & set(names if late is None else late)
    if not stay:
        folder.drop_note()
    return [work for work in abandoned if work.checkpoint in stay][-_MOST_LATE:]


def forget(route: Access, disk: Disk, is_unneeded: Callable[[Checkpoint], bool]) -> list[str]:
    """Merge checkpoints of backups, and no others, into the ones before. Return the names of those that stay."""
    return route.forget(disk, lambda member: Maker.BACKUP.named(member.name) and is_unneeded(member))
