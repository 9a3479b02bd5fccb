"""The folder of one disk in a repository (docs/backup.md).

    REPO/<disk>/manifest.json            what each image is; images that it does not name are nobody's backup
    REPO/<disk>/manifest.json.copy       the same once more (manifest_file.py)
    REPO/<disk>/000001-full.qcow2 ...    the images
    REPO/<disk>/….qcow2.<8 hex>.digests  the digest of each chunk of an image (digests.py)
    REPO/<disk>/manifest.next            while a prune or copy takes effect: the true manifest, and
    REPO/<disk>/….qcow2.next             images that take the place of those without `.next`, if there are any
    REPO/<disk>/lock                     held by the one backup, prune or copy that writes here
    REPO/<disk>/unfinished               while a backup is under way: its checkpoint, and its image (unfinished.py)

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
5. An unreadable note of unfinished work is put aside too: the files that it named stay, and only take space. So does a
   file that cannot be removed, as with `chattr +i` or a damaged inode.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
from collections.abc import Iterable, Iterator, Sequence

from lmdbitmap.errors import FormatError, LmdbitmapError, NotFound, StorageError, os_errors_at
from lmdbitmap.repository.backup_files import (
    LAST_NUMBER,
    SUCCESSOR_SUFFIX,
    digests_in,
    files_of,
    has_our_names,
    images_in,
    is_ours,
    succeeded_in,
)
from lmdbitmap.repository.manifest import BackupEntry, Manifest, has_room
from lmdbitmap.repository.manifest_file import MANIFEST, NEXT, ManifestFile, remove
from lmdbitmap.repository.unfinished import Unfinished, UnfinishedNote
from lmdbitmap.storage import schema
from lmdbitmap.system import atomic_files, file_locks, files
from lmdbitmap.work.patience import NO_PATIENCE, Patience

log = logging.getLogger(__name__)

LOCK = "lock"
_LOCK_TRIES = 100


class BackupFolder:
    """The backups of one disk in the repository at `repository_path`. Making it touches nothing."""

    def __init__(self, repository_path: str | os.PathLike[str], disk_name: str) -> None:
        self.repository_path = os.path.abspath(repository_path)
        self.disk_name = disk_name
        self.path = os.path.join(self.repository_path, schema.check_disk_name(disk_name))
        self._manifest = ManifestFile(self.path)
        self._note = UnfinishedNote(self.path)

    def path_of(self, file: str) -> str:
        return os.path.join(self.path, file)

    def image_path(self, file: str) -> str:
        """Return the path of an image that the manifest names: its own name, or its successor's beside it."""
        successor = self.path_of(file + SUCCESSOR_SUFFIX)
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
        """Return a number that no backup has or had, nor any image that the manifest does not know.

        Raises `FormatError` if an image's name could not hold it: before anything is made.
        """
        last = max([known.newest_sequence, *images_in(self.path).values()])
        if last >= LAST_NUMBER:
            raise FormatError(
                self.path,
                expected=f"numbers of backups below {LAST_NUMBER}",
                found=last,
                next_step="use another repository: something else than this program gave that number",
            )
        return last + 1

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
        with contextlib.suppress(NotFound), os_errors_at(path):
            return path, os.lstat(path)
        path = self.path_of(file)  # a successor is there if a prune ended at this very moment
        with os_errors_at(path):
            return path, os.lstat(path)

    def check_names(self, entries: Iterable[BackupEntry]) -> None:
        """Raise `FormatError` unless all files have names as we give them: no others are written or removed."""
        for entry in entries:
            if not has_our_names(entry):
                raise FormatError(
                    f"{self.path_of(MANIFEST)}: backup {entry.id}",
                    expected="names of files as this program gives them",
                    found=ascii((entry.file, entry.chunks.file if entry.chunks else None)),
                    next_step="restore from it as it is",
                )

    def _digests_of(self, file: str) -> list[str]:
        """Return the files in the folder that hold digests of an image, named by the manifest or not."""
        return [name for name, image in digests_in(self.path).items() if image == file]

    def has_images_of_old(self) -> bool:
        """Return whether there are images, apart from the one that a running or killed first backup is making."""
        images = images_in(self.path)  # before the note, which is there before its image is
        unfinished = {work.file for work in self._note.read() or ()} if images else set()
        return any(image not in unfinished for image in images)

    # -- succession ----------------------------------------------------------------------------------------

    def successor_path(self, file: str) -> str:
        """Return where to put the successor of an image."""
        return self.path_of(file + SUCCESSOR_SUFFIX)

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
        undecided = succeeded_in(self.path)
        for path in map(self.successor_path, undecided):
            remove(path)
        for path in map(self.path_of, self._stale_digests(found)):
            _remove_if_possible(path)
        if undecided:  # they must not be back when there is a `manifest.next`
            files.fsync_folder(self.path)

    def _carry_on(self, new: Manifest) -> None:
        self._require_new_images(new)
        self._manifest.copy_successor()
        for name in succeeded_in(self.path):
            with os_errors_at(self.path_of(name)):
                os.rename(self.successor_path(name), self.path_of(name))
        files.fsync_folder(self.path)
        for name in self._names_only_in_the_old(new):
            _remove_if_possible(self.path_of(name))
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
        gone = files_of(_entries_of(old)) - files_of(new.backups)
        return sorted(filter(is_ours, gone))

    def _stale_digests(self, known: Manifest | None) -> list[str]:
        """Return unnamed digest files of images that the manifest names, and digest files without an image."""
        if known is None:
            return []
        named, images = files_of(known.backups), images_in(self.path)
        others = [(name, image) for name, image in digests_in(self.path).items() if name not in named]
        return [name for name, image in others if image in named or image not in images]

    # -- what is under way ---------------------------------------------------------------------------------

    def note_unfinished(self, works: Sequence[Unfinished]) -> None:
        """Note durably what is about to be made: after a death this note says what to undo."""
        self._note.write(works)

    def unfinished(self) -> list[Unfinished]:
        """Return the unfinished work that is not in the manifest. Remove its images and their digests."""
        noted = self._note.read_or_put_aside()
        known = self._known_of(noted) if noted else set()
        abandoned = [work for work in noted if work.file not in known]
        for work in abandoned:
            for name in [work.file, *self._digests_of(work.file)]:
                _remove_if_possible(self.path_of(name))
        if noted:  # the manifest and what was removed must be durable before the note can go
            files.fsync_folder(self.path)
        return abandoned

    def _known_of(self, noted: Sequence[Unfinished]) -> set[str]:
        """Return the images that the manifest names. One that cannot be read names none that could be removed."""
        try:
            return {entry.file for entry in _entries_of(self._manifest.read())}
        except FormatError:
            if any(os.path.lexists(self.path_of(work.file)) for work in noted):
                raise
            return set()

    def drop_note(self) -> None:
        """Remove the note of unfinished work, once nothing of it is left to undo."""
        self._note.drop()


def _remove_if_possible(path: str) -> None:
    """Remove a file that nothing needs. One that is protected, or damaged itself, stays: no backup fails for that."""
    try:
        remove(path)
    except StorageError as refusal:
        if not refusal.is_of_bad_disk and refusal.errno not in (errno.EPERM, errno.EACCES):
            raise
        log.warning("%s; it is not needed any more: it stays, and takes space", refusal.problem)


def _entries_of(known: Manifest | None) -> Sequence[BackupEntry]:
    return known.backups if known is not None else ()
