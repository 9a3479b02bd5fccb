"""A repository of backups: a folder that holds a folder for each disk (docs/backup.md).

    REPO/<disk>/manifest.json            what each image is; images that it does not name are nobody's backup
    REPO/<disk>/manifest.json.copy       the same once more (manifest_file.py)
    REPO/<disk>/000001-full.qcow2 ...    the images
    REPO/<disk>/….qcow2.<8 hex>.digests  the digest of each chunk of an image (digests.py)
    REPO/<disk>/manifest.next            while a prune or copy takes effect: the true manifest, and
    REPO/<disk>/….qcow2.next             images that take the place of those without `.next`, if there are any
    REPO/<disk>/lock                     held by the one backup, prune or copy that writes here
    REPO/<disk>/unfinished               while a backup is under way: its checkpoint, and its image

Invariants, which hold at every moment, also after a power cut:

1. An image that the manifest names is whole and durable: its file was renamed into place, synced, before.
2. The remains of a killed run are known for certain, and nothing else is ever removed. They are files with a `.partial`
   name that nobody holds locked, and images that `unfinished` names and the manifest does not, with their digests.
3. A manifest that is missing beside images, or cannot be read, stops a backup. It is never made anew. A full backup
   that is asked for begins another chain, numbered after all images that are there. The unreadable manifest stays
   beside it as `manifest.json.damaged-…`, and its second copy likewise.
4. If there is a `manifest.next`, it alone is true. It got its name when all its `.next` images were durable under
   theirs. Then, each durable before the next begins: the second copy is made to say the same, `.next` images are
   renamed over those that they replace, files that only the old manifest named are removed, and `manifest.next` is
   renamed over it. An image and its successor read the same at the file's place in every chain. So a reader finds the
   truth without a lock, and the holder of the lock carries on where a dead run stopped. Without a `manifest.next`,
   `.next` images belong to nobody. If an image that came with it is not there, as in a copy of the folder that was made
   file by file at that moment, nobody carries on: nothing is removed for what is not there.
5. An unreadable note of unfinished work is put aside too: the files that it named stay, and only take space.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from lmdbitmap.errors import (
    FormatError,
    InvalidArgument,
    LmdbitmapError,
    NotFound,
    StorageError,
    os_errors_at,
)
from lmdbitmap.notes.checkpoint_names import Maker
from lmdbitmap.repository.manifest import BackupEntry, BackupType, Manifest, has_room
from lmdbitmap.repository.manifest_file import COPY, MANIFEST, NEXT, ManifestFile, put_aside, remove
from lmdbitmap.storage import schema
from lmdbitmap.system import atomic_files, file_locks, files
from lmdbitmap.work.buffers import new_buffer
from lmdbitmap.work.failures import Failures
from lmdbitmap.work.names import require_names
from lmdbitmap.work.patience import NO_PATIENCE, Patience

log = logging.getLogger(__name__)

LOCK, UNFINISHED = "lock", "unfinished"
_NEXT_SUFFIX = ".next"
_NOTE_BYTES = 1 << 16
_LOCK_TRIES = 100
_HASHED_AT_ONCE = 1 << 20
_IMAGE_NAME = re.compile(r"([0-9]{6,15})-(?:full|incremental|differential|rescan)\.qcow2")
_DIGESTS_NAME = re.compile(rf"({_IMAGE_NAME.pattern})\.[0-9a-f]{{8}}\.digests")
_SUCCESSOR_NAME = re.compile(rf"({_IMAGE_NAME.pattern}){re.escape(_NEXT_SUFFIX)}")
_NOTE = re.compile(rf"(?:{Maker.BACKUP.form} {_IMAGE_NAME.pattern}\n)*")


class Unfinished(NamedTuple):
    """What a backup under way makes: a checkpoint of the disk, and an image in the folder."""

    checkpoint: str
    file: str


class BackupFolder:
    """The backups of one disk in the repository at `repository_path`. Making it touches nothing."""

    def __init__(self, repository_path: str | os.PathLike[str], disk_name: str) -> None:
        self.repository_path = os.path.abspath(repository_path)
        self.disk_name = disk_name
        self.path = os.path.join(self.repository_path, schema.check_disk_name(disk_name))
        self._manifest = ManifestFile(self.path)

    def path_of(self, file: str) -> str:
        return os.path.join(self.path, file)

    def image_path(self, file: str) -> str:
        """Return the path of an image that the manifest names: its own name, or its successor's beside it."""
        successor = self.path_of(file + _NEXT_SUFFIX)
        is_under_way = self._manifest.is_succession_decided and os.path.lexists(successor)
        return successor if is_under_way else self.path_of(file)

    @contextlib.contextmanager
    def locked(self, patience: Patience = NO_PATIENCE) -> Iterator[None]:
        """Hold the folder for the one run that may write here; make it if needed. Raise `Busy` if another run keeps it.

        Unfinished files of killed runs are removed, and a prune that was decided is carried on. Folders made for the
        lock are removed again if nothing has come into them.
        """
        made: list[str] = []
        with contextlib.ExitStack() as end:
            end.callback(files.remove_folders, made)  # last: on NFS an open file keeps its folder
            end.enter_context(self._lock(made, patience))
            end.callback(self._remove_lock_if_bare, made)
            atomic_files.remove_leftovers(self.path)
            self.settle()
            yield

    def _lock(self, made: list[str], patience: Patience) -> file_locks.LockedFile:
        """Lock the folder, which is made if needed. Folders that are made are added to `made`."""
        for _ in range(_LOCK_TRIES - 1):
            with contextlib.suppress(NotFound):  # another run made the folder and removed it just now
                return self._lock_in_folder(made, patience)
        return self._lock_in_folder(made, patience)

    def _lock_in_folder(self, made: list[str], patience: Patience) -> file_locks.LockedFile:
        made += files.make_folders(self.path)
        return file_locks.lock_file(self.path_of(LOCK), patience=patience)

    def _remove_lock_if_bare(self, made: Sequence[str]) -> None:
        """Remove the lock that we hold, if it is all there is in a folder that we made.

        A process that has opened that lock meanwhile finds that it has no name any more, and makes another
        (`lock_file`). So two processes never hold the lock at once.
        """
        with contextlib.suppress(OSError):
            if self.path in made and os.listdir(self.path) == [LOCK]:
                os.unlink(self.path_of(LOCK))

    # -- the manifest --------------------------------------------------------------------------------------

    def manifest(self) -> Manifest | None:
        """Return the manifest; None before the first backup. Raise `FormatError` if it cannot be known."""
        found = self._manifest.read()
        if found is None and self.has_images_of_old():
            found = self._manifest.read()  # again: a first backup may have ended between the two looks
            if found is None:
                raise self._manifest.missing()
        return found

    def known_backups(self) -> Manifest:
        """Return a manifest with at least one backup. Else raise `NotFound`, which names the disks that have any."""
        found = self.manifest() if os.path.isdir(self.path) else None
        if found is None or not found.backups:
            others = [name for name in disk_names(self.repository_path) if name != self.disk_name]
            step = (
                f"name another disk: the repository has backups of {', '.join(others)}"
                if others
                else "name another repository, or see whether its file system is mounted"
            )
            raise NotFound(
                f"{self.repository_path} has no backup of a disk called {self.disk_name!r}",
                next_step=step if others else _repository_instead_of(self.repository_path) or step,
            )
        return found

    def replace_manifest(self, new: Manifest, *, keep_old: bool = False) -> None:
        """Replace the manifest, durable on return; a death leaves the old or the new. An unreadable one can be kept."""
        self._manifest.replace(new, keep_old=keep_old)

    def require_room(self, known: Manifest) -> None:
        """Raise `StorageError` if the manifest has no room for one more backup: before that is copied."""
        if not has_room(known):
            raise StorageError(
                self.path_of(MANIFEST),
                OSError(f"{len(known.backups):,} backups leave no room for one more"),
                next_step="merge old ones with `lmdbitmap prune`, or use another repository",
            )

    # -- images --------------------------------------------------------------------------------------------

    def next_sequence(self, known: Manifest) -> int:
        """Return a number that no backup has or had, nor any image that the manifest does not know."""
        return max([known.newest_sequence, *(int(image[1]) for image in self._images())]) + 1

    def check_images(self, entries: Iterable[BackupEntry]) -> None:
        """Raise `NotFound` or `FormatError` unless every image is there with the length it was made with."""
        for entry in entries:
            path, status = self._image_status(entry.file)
            if not stat.S_ISREG(status.st_mode) or status.st_size != entry.bytes_stored:
                raise FormatError(
                    path,
                    expected=f"a regular file of {entry.bytes_stored} bytes",
                    found=f"{status.st_size} bytes" if stat.S_ISREG(status.st_mode) else "something else",
                    next_step=self.step_without(entry),
                )

    def step_without(self, damaged: BackupEntry) -> str:
        """Return the next step for a user who needs a damaged image: the newest backup without it, if there is one."""
        spare = self._newest_without(damaged)
        if spare is None:
            return "get the file from a copy of the repository, or use another repository"
        return (
            f"use backup {spare.id}, the newest that does without this file, "
            "or get the file from a copy of the repository"
        )

    def _newest_without(self, damaged: BackupEntry) -> BackupEntry | None:
        """Return the newest backup that can be restored without that one's image, as far as is known."""
        try:
            known = self.manifest()
        except LmdbitmapError:
            return None
        spare, needing = None, {damaged.id}
        for entry in known.backups if known else ():
            if entry.id in needing or entry.parent in needing:  # a parent comes before
                needing.add(entry.id)
            else:
                spare = entry
        return spare

    def _image_status(self, file: str) -> tuple[str, os.stat_result]:
        path = self.image_path(file)
        with contextlib.suppress(FileNotFoundError):
            return path, os.lstat(path)
        path = self.path_of(file)  # a successor is there if a prune ended at this very moment
        with os_errors_at(path):
            return path, os.lstat(path)

    def check_names(self, entries: Iterable[BackupEntry]) -> None:
        """Raise `FormatError` unless all files have names as we give them: no others are written or removed."""
        for entry in entries:
            digests = entry.chunks.file if entry.chunks else None
            if not _IMAGE_NAME.fullmatch(entry.file) or not (
                digests is None or _DIGESTS_NAME.fullmatch(digests)
            ):
                raise FormatError(
                    f"{self.path_of(MANIFEST)}: backup {entry.id}",
                    expected="names of files as this program gives them",
                    found=ascii((entry.file, digests)),
                    next_step="restore from it as it is",
                )

    def _images(self) -> list[re.Match[str]]:
        """Return the names of all images in the folder, known or not. The first group of each match is the number."""
        return self._names_like(_IMAGE_NAME)

    def _names_like(self, form: re.Pattern[str]) -> list[re.Match[str]]:
        with os_errors_at(self.path):
            matches = [form.fullmatch(name) for name in os.listdir(self.path)]
        return [match for match in matches if match is not None]

    def _digests_of(self, file: str) -> list[str]:
        """Return the files in the folder that hold digests of an image, named by the manifest or not."""
        return [match[0] for match in self._names_like(_DIGESTS_NAME) if match[1] == file]

    def has_images_of_old(self) -> bool:
        """Return whether there are images, apart from the one that a running or killed first backup is making."""
        images = [image[0] for image in self._images()]  # before the note, which is there before its image is
        unfinished = {work.file for work in self._noted() or ()} if images else set()
        return any(image not in unfinished for image in images)

    # -- succession ----------------------------------------------------------------------------------------

    def successor_path(self, file: str) -> str:
        """Return where to put the successor of an image."""
        return self.path_of(file + _NEXT_SUFFIX)

    def succeed(self, new: Manifest) -> None:
        """Let `new` replace the manifest, and durable successors their images. Remove what only the old manifest named.

        A death leaves the one or the other; the next run that locks the folder finishes it.
        """
        self._manifest.decide_succession(new)
        self._carry_on(new)

    def settle(self) -> None:
        """Carry on a succession that was decided; undo one that was not. The caller holds the lock."""
        try:
            found = self._manifest.read()
        except FormatError:
            return  # nothing is removed; reading the manifest will report it
        if found is not None and self._manifest.is_succession_decided:
            self._carry_on(found)
            return
        if found is not None:
            self._manifest.mend_copy()
        undecided = [match[0] for match in self._names_like(_SUCCESSOR_NAME)]
        for name in [*undecided, *self._stale_digests(found)]:
            remove(self.path_of(name))
        if undecided:  # they must not be back when there is a `manifest.next`
            files.fsync_folder(self.path)

    def _carry_on(self, new: Manifest) -> None:
        self._require_new_images(new)
        self._manifest.copy_successor()
        for name in [match[1] for match in self._names_like(_SUCCESSOR_NAME)]:
            with os_errors_at(self.path_of(name)):
                os.rename(self.successor_path(name), self.path_of(name))
        files.fsync_folder(self.path)
        for name in self._names_only_in_the_old(new):
            remove(self.path_of(name))
        files.fsync_folder(self.path)
        self._manifest.end_succession()

    def _require_new_images(self, new: Manifest) -> None:
        """Raise `FormatError` if an image that came with `new` is not there: nothing may be removed for it then.

        It was durable when that was decided. But this folder may be a copy, made file by file at that very moment.
        """
        try:
            old = _entries_of(self._manifest.read_predecessor())
        except FormatError:
            return  # it names nothing that could be removed
        known = {(entry.file, entry.digest) for entry in old}
        try:
            self.check_images(entry for entry in new.backups if (entry.file, entry.digest) not in known)
        except (FormatError, NotFound) as wrong:
            raise FormatError(
                self.path_of(NEXT),
                expected="the images that it names",
                found=wrong.problem,
                next_step="copy this folder once more, if it is a copy that was made while a prune took effect, or move"
                " that file away, to have what there was before",
            ) from wrong

    def _names_only_in_the_old(self, new: Manifest) -> list[str]:
        """Return the files that can go. Only names of our form: a manifest may name anything."""
        try:
            old = self._manifest.read_predecessor()
        except FormatError as damaged:
            log.error("%s; what it named besides stays, and takes space", damaged.problem)
            return []
        gone = _files_of(old) - _files_of(new)
        return sorted(name for name in gone if _IMAGE_NAME.fullmatch(name) or _DIGESTS_NAME.fullmatch(name))

    def _stale_digests(self, known: Manifest | None) -> list[str]:
        """Return unnamed digest files of images that the manifest names, and digest files without an image."""
        if known is None:
            return []
        named, images = _files_of(known), {image[0] for image in self._images()}
        others = [match for match in self._names_like(_DIGESTS_NAME) if match[0] not in named]
        return [match[0] for match in others if match[1] in named or match[1] not in images]

    # -- what is under way ---------------------------------------------------------------------------------

    def note_unfinished(self, works: Sequence[Unfinished]) -> None:
        """Note durably what is about to be made: after a death this note says what to undo."""
        text = "".join(f"{work.checkpoint} {work.file}\n" for work in works)
        atomic_files.replace(self.path_of(UNFINISHED), text.encode())

    def unfinished(self) -> list[Unfinished]:
        """Return the unfinished work that is not in the manifest. Remove its images and their digests."""
        noted = self._noted()
        if noted is None:
            noted = self._put_note_aside()
        known = {entry.file for entry in _entries_of(self._manifest.read())} if noted else set()
        abandoned = [work for work in noted if work.file not in known]
        for work in abandoned:
            for name in [work.file, *self._digests_of(work.file)]:
                remove(self.path_of(name))
        if noted:  # the manifest and what was removed must be durable before the note can go
            files.fsync_folder(self.path)
        return abandoned

    def drop_note(self) -> None:
        """Remove the note of unfinished work. Not synced: a note that comes back after a power cut does no harm."""
        remove(self.path_of(UNFINISHED))

    def _noted(self) -> list[Unfinished] | None:
        """Return the noted work; None if the note cannot be read. Changes nothing: readers without the lock ask too."""
        text = _note_text(self.path_of(UNFINISHED))
        if text is None or not _NOTE.fullmatch(text):
            return None
        return [Unfinished(*line.split(" ")) for line in text.splitlines()]

    def _put_note_aside(self) -> list[Unfinished]:
        kept = put_aside(self.path, UNFINISHED)
        path = self.path_of(UNFINISHED)
        remove(path)
        log.error("%s cannot be read, and is kept as %s: what it named stays, and takes space", path, kept)
        return []


def _entries_of(known: Manifest | None) -> Sequence[BackupEntry]:
    return known.backups if known is not None else ()


def _files_of(known: Manifest | None) -> set[str]:
    entries = _entries_of(known)
    return {entry.file for entry in entries} | {entry.chunks.file for entry in entries if entry.chunks}


def _note_text(path: str) -> str | None:
    """Return the note's text, which is empty without a note; None if it cannot be read: it is a folder, or too long."""
    try:
        return files.read_bounded(path, _NOTE_BYTES).decode(errors="replace")
    except NotFound:
        return None if os.path.lexists(path) else ""  # a link to nothing, or dropped just now
    except FormatError:
        return None
    except StorageError as refusal:
        if refusal.errno not in (errno.EISDIR, errno.ELOOP):
            raise
        return None


def image_name(sequence: int, kind: BackupType) -> str:
    return f"{sequence:06d}-{kind.value}.qcow2"


def digests_name(file: str) -> str:
    """Return a new name for an image's digests. Those of an image and of its successor lie beside each other."""
    return f"{file}.{os.urandom(4).hex()}.digests"


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
        step = _repository_instead_of(place) or (
            "name another repository, or see whether its file system is mounted"
        )
        raise NotFound(f"{place} has no backups", next_step=step)
    return [BackupFolder(repository_path, name) for name in (known if names is None else names)]


def known_backups_of(
    folders: Sequence[BackupFolder], failures: Failures, *, named: bool
) -> list[tuple[BackupFolder, Manifest]]:
    """Return the folders with their manifests. If `named`, each must have backups; else folders without are left out.

    A manifest that cannot be read is set aside. A named disk without backups is a typing error and ends the run.
    """
    known = []
    for folder in folders:
        with failures.of(folder.disk_name):
            found = folder.known_backups() if named else folder.manifest()
            if found is not None and found.backups:
                known.append((folder, found))
    for error in failures.errors.values():
        if named and isinstance(error, NotFound):
            raise error
    return known


def sha256_of(fd: int, stopped: Callable[[], bool] = lambda: False) -> str:
    """Return the SHA-256 of a file in hexadecimal; of its beginning only, if `stopped` returns True meanwhile."""
    digest, buffer, offset = hashlib.sha256(), new_buffer(_HASHED_AT_ONCE), 0
    view = memoryview(buffer)
    while not stopped() and (count := os.preadv(fd, [buffer], offset)):
        digest.update(view[:count])
        offset += count
    return digest.hexdigest()
