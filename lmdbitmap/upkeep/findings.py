"""What a check reports: findings, and the steps that several of them advise."""

from __future__ import annotations

import enum
from typing import Final, NamedTuple

START_ANEW: Final = (
    "make a full backup; if this stays, stop what uses the store, move its folder lmdb aside, and the next command"
    " makes it anew"
)
DISK_FAILS: Final = (
    "look at the disk under the store; stop what uses it, move its folder lmdb aside, and the next command makes it"
    " anew, all dirty"
)
COUNTS_AS_DIRTY: Final = "what they stand for counts as dirty; look at the disk under the store"
LOST_STEP: Final = f"{COUNTS_AS_DIRTY}, and make a full backup"


class Gravity(enum.IntEnum):
    """How bad a finding is."""

    NOTE = 0
    """Good to know; nothing is lost."""
    DISTRUST = 1
    """A disk needs a full backup; the store itself is sound."""
    DAMAGE = 2
    """Bytes of the store are not what was written."""


class Finding(NamedTuple):
    """Something that is wrong with a store or worth knowing, where it is, and what to do about it."""

    gravity: Gravity
    place: str
    problem: str
    next_step: str

    def __str__(self) -> str:
        return f"{self.place}: {self.problem}; {self.next_step}"


def damage(place: str, problem: str, next_step: str = START_ANEW) -> Finding:
    return Finding(Gravity.DAMAGE, place, problem, next_step)


def orphan(place: str, problem: str) -> Finding:
    return Finding(Gravity.NOTE, place, problem, "nothing needs it; it only takes space")
