"""Patterns for the names of our files, and for the temporary names that atomic_files.py gives to unfinished ones."""

from __future__ import annotations

import os
import re
from typing import Final

UUID_FORM: Final = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
UNFINISHED_FORM: Final = r"\.[0-9a-f]{16}\.partial"
"""The suffix of a temporary name; the file's final name stands before it."""

_SUFFIX = ".partial"
_UUID = re.compile(UUID_FORM)
_UNFINISHED = re.compile(rf"(.+){UNFINISHED_FORM}", re.DOTALL)


def new_unfinished(path: str) -> str:
    """Return a new temporary name for a file that will be `path`."""
    return f"{path}.{os.urandom(8).hex()}{_SUFFIX}"


def finished_name(name: str) -> str | None:
    """Return the final name of the file with the temporary name `name`; None if `name` is not a temporary name."""
    if not name.endswith(_SUFFIX):  # quick, and enough for almost every name: folders may hold thousands
        return None
    found = _UNFINISHED.fullmatch(name)
    return None if found is None else found[1]


def is_uuid(name: str) -> bool:
    """Return whether `name` is a uuid as we write it."""
    return _UUID.fullmatch(name) is not None
