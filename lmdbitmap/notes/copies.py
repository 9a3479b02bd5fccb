"""What becomes of a disk's synced copy (sync_note.py) that a restore, a stream or a guest is about to write.

An export shows no foreign write, and neither does any target of a sync that was killed. So the note forgets, before the
first byte is written or the copy becomes a disk that is tracked, that the target is a copy: the next sync compares it,
as if it were the first.

A file or a device is known by the identity in the note, or by its name: a disk that is plugged in anew may have another
number, and have its old one back at the next sync. The names of other copies are not followed: they may lead to a file
server that does not answer, and a restore should not wait for that.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator

from lmdbitmap.images.device import FileDevice
from lmdbitmap.images.image import is_far, is_same_image
from lmdbitmap.interfaces import BlockDevice
from lmdbitmap.notes import sync_note
from lmdbitmap.notes.sync_note import Note, NoteFile
from lmdbitmap.store import Store


@contextlib.contextmanager
def given_up(store: Store | None, out: str, device: BlockDevice) -> Iterator[None]:
    """Let no sync count from what `out` held, if it is the copy of a disk in `store`, nor write it inside the block.

    It is open as `device`. Raises `Busy` while a sync writes it.
    """
    known = [] if store is None else list(sync_note.notes(store.path))
    with contextlib.ExitStack() as locks:
        for path, note in known:
            if _is_of(note, out, device):
                file = NoteFile(path, note)
                locks.enter_context(file.locked())
                _give_up(file)
        yield


def _is_of(note: Note, out: str, device: BlockDevice) -> bool:
    """Return whether the note is of what is there. A sync under way to an export counts on nothing yet, but will."""
    if is_far(out):
        return is_same_image(note.target, out)
    if note.at is None:  # the next sync compares in any case; one that is under way has locked the file
        return False
    if os.fsencode(os.path.realpath(out)) == note.target.encode():
        return True
    before = note.at.identity
    if before is None or not isinstance(device, FileDevice):
        return False
    now = device.identity()
    return (before.device, before.inode) == (now.device, now.inode)


def _give_up(file: NoteFile) -> None:
    note = file.note
    unneeded = note.unneeded if note.at is None else (*note.unneeded, note.at.name)
    file.replace(dataclasses.replace(note, at=None, under_way=False, mark=None, unneeded=unneeded))
