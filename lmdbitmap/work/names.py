"""What a caller may say for the names of several disks, and for one of several kinds.

Not every caller has a type checker.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from typing import TypeVar

from lmdbitmap.errors import InvalidArgument

Member = TypeVar("Member", bound=enum.Enum)


def require_names(names: Sequence[str]) -> None:
    """Raise `InvalidArgument` for a name that is given twice, and for one text in place of a list of names."""
    refuse_one_text(names)
    if len(set(names)) != len(names):
        raise InvalidArgument("a disk is named twice", next_step="name each disk once")


def refuse_one_text(names: Iterable[str]) -> None:
    """Raise `InvalidArgument` for one text in place of a list of names: each of its letters would be a name."""
    if isinstance(names, str):
        raise InvalidArgument(f"{names!r} is one name where several may be", next_step=f"give [{names!r}]")


def known_member(kinds: type[Member], told: object, what: str) -> Member:
    """Return the member of `kinds`, also for its value. Raise `InvalidArgument` for anything else: `what` is said."""
    try:
        return kinds(told)
    except ValueError:
        known = ", ".join(member.value for member in kinds)
        raise InvalidArgument(f"there is no {what}", next_step=f"use one of {known}") from None
