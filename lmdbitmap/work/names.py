"""What a caller may say for the names of several disks, and for one of several kinds.

Not every caller has a type checker.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from lmdbitmap.errors import InvalidArgument

Member = TypeVar("Member", bound=enum.Enum)


def require_text(name: object, what: str) -> str:
    """Return the name of a `what`. Raise `InvalidArgument` if it is no text."""
    if not isinstance(name, str):
        raise InvalidArgument(f"{what} name {name!r} is not text", next_step="give it as a str")
    return name


def require_names(names: Sequence[str]) -> None:
    """Raise `InvalidArgument` for a name that is no text or is given twice, and for what is no list of names."""
    refuse_one_text(names)
    if isinstance(names, Iterator):  # nobody after us would find a name in it
        raise _no_list(names)
    told = [require_text(name, "disk") for name in names]
    if len(set(told)) != len(told):
        raise InvalidArgument("a disk is named twice", next_step="name each disk once")


def refuse_one_text(names: object) -> None:
    """Raise `InvalidArgument` for one text in place of several names: each of its letters would be a name.

    Raise it for anything else too that is not several names.
    """
    if isinstance(names, str):
        raise InvalidArgument(f"{names!r} is one name where several may be", next_step=f"give [{names!r}]")
    if isinstance(names, bytes) or not isinstance(names, Iterable):
        raise _no_list(names)


def _no_list(names: object) -> InvalidArgument:
    return InvalidArgument(f"{names!r} is no list of names", next_step="give a list of str")


def known_member(kinds: type[Member], told: object, what: str) -> Member:
    """Return the member of `kinds`, also for its value. Raise `InvalidArgument` for anything else: `what` is said."""
    try:
        return kinds(told)
    except ValueError:
        known = ", ".join(member.value for member in kinds)
        raise InvalidArgument(f"there is no {what}", next_step=f"use one of {known}") from None
