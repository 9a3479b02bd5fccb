"""Keeps a folder's manifest twice, and three times while a succession (backup_folder.py, 4) takes effect.

    manifest.json         the manifest
    manifest.json.copy    the same once more, for the day when that file is damaged or lost
    manifest.next         while it exists it alone is true

The second copy is written before the manifest is. In a succession it is written once that is decided, and before any
file goes. So it never names what a prune removed: it is never older than the manifest, and if it cannot be written it
is removed. It may be newer after a death between the two writes, until a run locks the folder. A damaged manifest is
brought back from it by hand, as its error says: a person should know of the damage.

Each of the three is read without a lock. `manifest.next` may be renamed to `manifest.json` meanwhile, and says the
same.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shlex
import time

from lmdbitmap.errors import FormatError, LmdbitmapError, NotFound, os_errors_at
from lmdbitmap.repository import manifest
from lmdbitmap.repository.manifest import Manifest, NewerManifest
from lmdbitmap.system import atomic_files, files

log = logging.getLogger(__name__)

MANIFEST, COPY, NEXT = "manifest.json", "manifest.json.copy", "manifest.next"


class ManifestFile:
    """The manifest of one folder. Making the object touches nothing; writers hold the folder's lock."""

    def __init__(self, folder_path: str) -> None:
        self._folder_path = folder_path

    def path_of(self, name: str) -> str:
        return os.path.join(self._folder_path, name)

    # -- reading -------------------------------------------------------------------------------------------

    @property
    def is_succession_decided(self) -> bool:
        return files.is_there(self.path_of(NEXT))

    def read(self) -> Manifest | None:
        """Return the true manifest; None if there is none. `FormatError` says how to bring it back."""
        found = self._read(NEXT)
        return found if found is not None else self._read(MANIFEST)

    def read_predecessor(self) -> Manifest | None:
        """Return the manifest from before the succession that was decided."""
        return self._read(MANIFEST)

    def missing(self) -> FormatError:
        """Return the error for a missing manifest."""
        return self._refusal(self._folder_path, f"{MANIFEST} beside the images", "none", MANIFEST)

    def _read(self, name: str) -> Manifest | None:
        path = self.path_of(name)
        if not files.is_there(path):
            return None
        try:
            if os.path.islink(path) or (not os.path.isfile(path) and os.path.lexists(path)):
                found = "a link" if os.path.islink(path) else "something else"
                raise _no_manifest(path, "a regular file", found)
            return manifest.decode(files.read_bounded(path, manifest.MAX_MANIFEST_BYTES))
        except NotFound:
            if os.path.lexists(path):
                raise
            return None  # renamed at this very moment
        except NewerManifest as newer:
            raise NewerManifest(
                f"{path}: {newer.place}",
                expected=newer.expected,
                found=newer.found,
                next_step=newer.next_step,
            ) from newer
        except FormatError as refused:
            if refused.place.startswith(path):
                raise
            place = f"{path}: {refused.place}"
            raise self._refusal(place, refused.expected, refused.found, name) from refused

    def _refusal(self, place: str, expected: str, found: object, name: str) -> FormatError:
        refusal = _no_manifest(place, expected, found)
        copy = self._copy_for(name)
        if copy is None or not copy.backups:
            return refusal
        newest = copy.backups[-1]
        moment = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(newest.time_ns // 1_000_000_000))
        command = shlex.join(["cp", self.path_of(COPY), self.path_of(name)])
        step = f"bring it back with `{command}`, up to backup {newest.id} of {moment}, or {refusal.next_step}"
        return FormatError(place, expected=expected, found=found, next_step=step)

    def _copy_for(self, name: str) -> Manifest | None:
        """Return the second copy, if it can take that file's place."""
        try:
            if name == NEXT and self._bytes_of(COPY) == self._bytes_of(MANIFEST):
                return None  # the copy is from before the succession
            data = self._bytes_of(COPY)
            return None if data is None else manifest.decode(data)
        except LmdbitmapError:
            return None

    def _bytes_of(self, name: str) -> bytes | None:
        """Return the file's bytes; None if there is no file that could be a manifest, or if it cannot be read."""
        with contextlib.suppress(LmdbitmapError):
            return files.read_bounded(self.path_of(name), manifest.MAX_MANIFEST_BYTES)
        return None

    # -- writing -------------------------------------------------------------------------------------------

    def replace(self, new: Manifest, *, keep_old: bool = False) -> None:
        """Replace the manifest, durable on return; a death leaves the old or the new. An unreadable one can be kept."""
        data = manifest.encode(new)
        for name in (COPY, MANIFEST) if keep_old else ():
            if files.is_there(self.path_of(name)):
                put_aside(self._folder_path, name)
        self._keep_copy(data)
        atomic_files.replace(self.path_of(MANIFEST), data, follow=False)
        if keep_old and self.is_succession_decided:  # unreadable too
            put_aside(self._folder_path, NEXT)
            remove(self.path_of(NEXT))

    def decide_succession(self, new: Manifest) -> None:
        """Make `new` the true manifest; durable on return."""
        atomic_files.replace(self.path_of(NEXT), manifest.encode(new), follow=False)

    def copy_successor(self) -> None:
        """Copy the successor. Must be done before any file is removed that only the manifest names."""
        self._keep_copy(self._bytes_of(NEXT))

    def end_succession(self) -> None:
        with os_errors_at(self.path_of(NEXT)):
            os.rename(self.path_of(NEXT), self.path_of(MANIFEST))
        files.fsync_folder(self._folder_path)

    def mend_copy(self) -> None:
        """Make the second copy equal to the manifest, which can be read."""
        self._keep_copy(self._bytes_of(MANIFEST))

    def _keep_copy(self, data: bytes | None) -> None:
        """Write the second copy. If that fails, as on a full disk, remove it: an older one could name what is gone."""
        if data is not None and self._bytes_of(COPY) == data:
            return
        try:
            if data is not None:
                atomic_files.replace(self.path_of(COPY), data, follow=False)
                return
        except LmdbitmapError as refused:
            log.warning("the manifest is not kept a second time: %s", refused.problem)
        with contextlib.suppress(LmdbitmapError):
            remove(self.path_of(COPY))


def put_aside(folder_path: str, name: str) -> str:
    """Keep a file under another name, which is returned. With hard links the old name stays until it is replaced."""
    kept = f"{name}.damaged-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{os.urandom(3).hex()}"
    old, new = os.path.join(folder_path, name), os.path.join(folder_path, kept)
    with os_errors_at(old):
        try:
            if os.path.islink(old):
                raise OSError(errno.ELOOP, "a link")
            os.link(old, new)
        except OSError:  # a folder, or a file system without hard links
            os.rename(old, new)
    files.fsync_folder(folder_path)
    return kept


def remove(path: str) -> None:
    """Remove a file; a missing one is fine."""
    with contextlib.suppress(NotFound), os_errors_at(path):
        os.unlink(path)


def _no_manifest(place: str, expected: str, found: object) -> FormatError:
    step = "restore the manifest from a copy of the repository, or begin a new chain with `backup --full`"
    return FormatError(place, expected=expected, found=found, next_step=step)
