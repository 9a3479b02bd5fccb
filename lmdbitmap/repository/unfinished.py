"""The note of what a backup under way makes: after its death it says what to undo.

It has a line for each try of the running backup, `<checkpoint> <image>`, and is there, durable, before they are.
"""

from __future__ import annotations

import errno
import logging
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

from lmdbitmap.errors import FormatError, NotFound, StorageError
from lmdbitmap.notes.checkpoint_names import Maker
from lmdbitmap.repository.backup_files import IMAGE_FORM
from lmdbitmap.repository.manifest_file import put_aside, remove
from lmdbitmap.system import atomic_files, files

log = logging.getLogger(__name__)

UNFINISHED = "unfinished"
_NOTE_BYTES = 1 << 16
_NOTE = re.compile(rf"(?:{Maker.BACKUP.form} {IMAGE_FORM}\n)*")


class Unfinished(NamedTuple):
    """What a backup under way makes: a checkpoint of the disk, and an image in the folder."""

    checkpoint: str
    file: str


class UnfinishedNote:
    """The note in one folder. Making the object touches nothing; all but `read` want the folder's lock held."""

    def __init__(self, folder_path: str) -> None:
        self._folder_path = folder_path
        self._path = os.path.join(folder_path, UNFINISHED)

    def write(self, works: Sequence[Unfinished]) -> None:
        """Note durably what is about to be made."""
        text = "".join(f"{work.checkpoint} {work.file}\n" for work in works)
        atomic_files.replace(self._path, text.encode(), follow=False)

    def read(self) -> list[Unfinished] | None:
        """Return the noted work; None if the note cannot be read. Changes nothing: readers without the lock ask too."""
        text = self._text()
        if text is None or not _NOTE.fullmatch(text):
            return None
        return [Unfinished(*line.split(" ")) for line in text.splitlines()]

    def read_or_put_aside(self) -> list[Unfinished]:
        """Return the noted work: none, if the note cannot be read. That one is kept beside."""
        noted = self.read()
        return self._put_aside() if noted is None else noted

    def drop(self) -> None:
        """Remove the note. Not synced: a note that comes back after a power cut does no harm."""
        remove(self._path)

    def _put_aside(self) -> list[Unfinished]:
        kept = put_aside(self._folder_path, UNFINISHED)
        remove(self._path)
        log.error(
            "%s cannot be read, and is kept as %s: what it named stays, and takes space", self._path, kept
        )
        return []

    def _text(self) -> str | None:
        """Return its text, which is empty without a note; None if it cannot be read: it is a folder, or too long."""
        try:
            return files.read_bounded(self._path, _NOTE_BYTES).decode(errors="replace")
        except NotFound:
            return None if os.path.lexists(self._path) else ""  # a link to nothing, or dropped just now
        except FormatError:
            return None
        except StorageError as refusal:
            if refusal.errno not in (errno.EISDIR, errno.ELOOP):
                raise
            return None
