"""What becomes of a disk's synced copy (notes/sync_note.py) that a restore or a stream is about to write.

An export shows no foreign write, and neither does any target of a sync that was killed. So the note forgets, before the
first byte is written, that the target is a copy: the next sync compares it, as if it were the first.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

from lmdbitmap.images.image import is_same_image
from lmdbitmap.notes import sync_note
from lmdbitmap.notes.sync_note import NoteFile
from lmdbitmap.store import Store


@contextlib.contextmanager
def given_up(store: Store | None, out: str) -> Iterator[None]:
    """Let no sync count from what `out` held, if it is the copy of a disk in `store`, nor write it inside the block.

    Raises `Busy` while a sync writes it.
    """
    known = [] if store is None else list(sync_note.notes(store.path))
    with contextlib.ExitStack() as locks:
        for path, note in known:
            if note.is_of_a_copy and is_same_image(note.target, out):
                file = NoteFile(path, note)
                locks.enter_context(file.locked())
                _give_up(file)
        yield


def _give_up(file: NoteFile) -> None:
    note = file.note
    unneeded = note.unneeded if note.at is None else (*note.unneeded, note.at.name)
    file.replace(dataclasses.replace(note, at=None, under_way=False, mark=None, unneeded=unneeded))
