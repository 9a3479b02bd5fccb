"""Objects that a forked child must let go of.

A child inherits every lock, map and descriptor of its parent, and none of its threads. Objects that cannot work like
that register here and are abandoned in the child before anything else runs there.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from typing import Protocol


class Heirloom(Protocol):
    """An object that belongs to one process only."""

    def forsake(self) -> None:
        """Become unusable in a forked child without touching the parent's resources. Must not wait for any lock."""


_heirlooms: weakref.WeakSet[Heirloom] = weakref.WeakSet()
_watching: list[int] = []
"""The pid, at most one, that registered for forks: this process or one that it was forked from."""


def is_not_for_children(thing: Heirloom) -> None:
    """Call `thing.forsake()` in every child that this process forks while `thing` is alive."""
    if not _watching:
        _watching.append(os.getpid())
        os.register_at_fork(after_in_child=_forsake_all)
    _heirlooms.add(thing)


def _forsake_all() -> None:
    with contextlib.ExitStack() as each:  # each is forsaken even if another fails, as NFS may at a close
        each.callback(_heirlooms.clear)
        for thing in list(_heirlooms):
            each.callback(thing.forsake)
