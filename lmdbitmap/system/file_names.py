"""What the names of our files are made of, as patterns; those of files on their way to their names too (files.py)."""

from __future__ import annotations

import os
import re
from typing import Final

UUID_FORM: Final = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
UNFINISHED_FORM: Final = r"\.[0-9a-f]{16}\.partial"
"""What comes behind the name that a file will have when it is complete."""

_SUFFIX = ".partial"
_UUID = re.compile(UUID_FORM)
_UNFINISHED = re.compile(rf"(.+){UNFINISHED_FORM}", re.DOTALL)


def new_unfinished(path: str) -> str:
    """A new name for a file on its way to `path`."""
    return f"{path}.{os.urandom(8).hex()}{_SUFFIX}"


def finished_name(name: str) -> str | None:
    """How a file on its way will be called; None where a file of that name is on no way of ours."""
    if not name.endswith(_SUFFIX):  # as of almost all: folders with thousands of names are looked through
        return None
    found = _UNFINISHED.fullmatch(name)
    return None if found is None else found[1]


def is_uuid(name: str) -> bool:
    """Whether it is one, as we write it."""
    return _UUID.fullmatch(name) is not None
