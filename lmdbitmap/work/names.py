"""What a caller may say for the names of several disks."""

from __future__ import annotations

from collections.abc import Sequence

from lmdbitmap.errors import InvalidArgument


def require_names(names: Sequence[str]) -> None:
    """Raise `InvalidArgument` for a name that is given twice, and for one text in place of a list of names."""
    if isinstance(names, str):
        raise InvalidArgument(f"{names!r} is one name where several may be", next_step=f"give [{names!r}]")
    if len(set(names)) != len(names):
        raise InvalidArgument("a disk is named twice", next_step="name each disk once")
