"""Functions for all notes: files in a folder of the store, named for their disk, of JSON that may be wrong."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, Final
from uuid import UUID

from lmdbitmap.errors import os_errors_at

MAX_NOTE_BYTES: Final = 1 << 20


def paths_of(folder: str, disk: UUID | None, disk_of: Callable[[str], str | None]) -> list[str]:
    """Return the files in a folder that belong to a disk, or to any, sorted; `disk_of` reads the uuid in a name."""
    spelt = "" if disk is None else str(disk)
    with os_errors_at(folder):
        try:
            names = sorted(os.listdir(folder))
        except FileNotFoundError:
            names = []
    found = ((name, disk_of(name)) for name in names if name.startswith(spelt))
    return [os.path.join(folder, name) for name, of in found if of is not None and spelt in ("", of)]


def remove_all(paths: Iterable[str]) -> None:
    """Remove a removed disk's files. A file that stays does no harm: no other disk will ever have its uuid."""
    for path in paths:
        with suppress(OSError):
            os.unlink(path)


def typed(kind: type, value: Any) -> Any:
    """Return the value if it has exactly that type (a bool is not a number); else raise `TypeError`."""
    if type(value) is not kind:
        raise TypeError(f"expected {kind.__name__}, found {type(value).__name__}")
    return value
