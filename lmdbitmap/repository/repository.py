"""A repository of backups: a folder that holds a folder for each disk (backup_folder.py; docs/backup.md)."""

from __future__ import annotations

import os
from collections.abc import Sequence

from lmdbitmap.errors import InvalidArgument, NotFound, StorageError, os_errors_at
from lmdbitmap.repository.backup_folder import BackupFolder
from lmdbitmap.repository.manifest import Manifest
from lmdbitmap.repository.manifest_file import COPY, MANIFEST
from lmdbitmap.work.failures import Failures
from lmdbitmap.work.names import require_names


def refuse_folder_of_disk(repository_path: str | os.PathLike[str]) -> None:
    """Raise `InvalidArgument` for what is itself a disk's folder in a repository, as REPO/sda: a slip, that would make
    one repository inside of another, with a chain that begins anew."""
    place = os.path.abspath(repository_path)
    step = _repository_instead_of(place)
    if step is not None:
        raise InvalidArgument(f"{place} is no repository", next_step=step)


def _repository_instead_of(place: str) -> str | None:
    """The next step of somebody who named a disk's folder in a repository; None if it is none."""
    if not any(os.path.isfile(os.path.join(place, file)) for file in (MANIFEST, COPY)):
        return None  # a disk may be called as these are, and has a folder of that name
    return f"it is the folder of one disk; name the repository, {os.path.dirname(place)}"


def refuse_beside_backups(place: str) -> None:
    """Raise `InvalidArgument` for a file in a folder that holds a disk's backups: its name may be a backup's."""
    folder = os.path.dirname(os.path.realpath(place))
    if all(os.path.isfile(os.path.join(folder, file)) for file in (MANIFEST, COPY)):
        raise InvalidArgument(
            f"{place} is among the backups in {folder}", next_step="name a place outside of the repository"
        )


def disk_names(repository_path: str | os.PathLike[str]) -> list[str]:
    """Return the names of the disks that have backups in a repository, sorted.

    A folder that may not be looked into counts, and one with images whose manifests are both lost: whoever reads it
    reports what is wrong with it.
    """
    place = os.path.abspath(repository_path)
    with os_errors_at(place):
        return sorted(name for name in os.listdir(place) if _may_have_backups(place, name))


def _may_have_backups(repository_path: str, name: str) -> bool:
    folder = os.path.join(repository_path, name)
    for file in (MANIFEST, COPY):
        try:
            os.lstat(os.path.join(folder, file))
        except PermissionError:
            return name != "lost+found" and not name.startswith(".")  # root's, at the top of a file system
        except OSError:
            continue
        return True
    try:
        return os.path.isdir(folder) and BackupFolder(repository_path, name).has_images_of_old()
    except (InvalidArgument, NotFound):  # no disk can be called so, or it was taken back just now
        return False
    except StorageError:
        return True


def folders_of(
    repository_path: str | os.PathLike[str], names: Sequence[str] | None = None
) -> list[BackupFolder]:
    """Return the folders of the disks called `names`, or of all. Raise `NotFound` if there are no backups at all.

    Raises `InvalidArgument` for one text in place of a list, and for a name that is given twice.
    """
    if names is not None:
        require_names(names)
    known = disk_names(repository_path)
    if not known:
        place = os.path.abspath(repository_path)
        raise NotFound(f"{place} has no backups", next_step=_elsewhere(place))
    return [BackupFolder(repository_path, name) for name in (known if names is None else names)]


def known_backups(folder: BackupFolder) -> Manifest:
    """Return its manifest, with at least one backup. Else raise `NotFound`, which names the disks that have any."""
    found = folder.manifest() if os.path.isdir(folder.path) else None
    if found is None or not found.backups:
        raise _no_backups_of(folder)
    return found


def _no_backups_of(folder: BackupFolder) -> NotFound:
    place = folder.repository_path
    others = [name for name in disk_names(place) if name != folder.disk_name]
    step = (
        f"name another disk: the repository has backups of {', '.join(others)}"
        if others
        else _elsewhere(place)
    )
    return NotFound(f"{place} has no backup of a disk called {folder.disk_name!r}", next_step=step)


def _elsewhere(place: str) -> str:
    """The next step of somebody who named a folder without backups."""
    return (
        _repository_instead_of(place) or "name another repository, or see whether its file system is mounted"
    )


def folders_with_backups(
    folders: Sequence[BackupFolder], failures: Failures, *, named: bool
) -> list[tuple[BackupFolder, Manifest]]:
    """Return the folders with their manifests. If `named`, each must have backups; else folders without are left out.

    A manifest that cannot be read is set aside. A named disk without backups is a typing error and ends the run.
    """
    known = []
    for folder in folders:
        with failures.of(folder.disk_name):
            found = known_backups(folder) if named else folder.manifest()
            if found is not None and found.backups:
                known.append((folder, found))
    for error in failures.errors.values():
        if named and isinstance(error, NotFound):
            raise error
    return known
