"""What a forked child must let go of.

A child inherits every lock, map and descriptor of its parent, and none of its threads. Whatever cannot stand
that is named here, and lets go of it in the child before anything else runs there.
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class Heirloom(Protocol):
    """What is of one process only."""

    def forsake(self) -> None:
        """Called in a forked child: be dead there, and leave the parent's alone. No lock can be waited for."""


_heirlooms: weakref.WeakSet[Heirloom] = weakref.WeakSet()
_watching: list[int] = []
"""The processes, this one or one that it was forked from, that asked to be told of forks: one or none."""


def is_not_for_children(thing: Heirloom) -> None:
    """Have `thing.forsake()` called in every child that this process forks, for as long as it lives."""
    if not _watching:
        _watching.append(os.getpid())
        os.register_at_fork(after_in_child=_forsake_all)
    _heirlooms.add(thing)


def _forsake_all() -> None:
    for thing in list(_heirlooms):
        thing.forsake()
    _heirlooms.clear()
