"""Waiting for disks that others have for themselves: another backup, or whoever holds one for a moment.

**Who waits holds no disk.** So nobody waits for disks in a circle. And whoever serves a disk can have it meanwhile:
that ends the wait too, as the disk is read through its server then. How the disks can be got at is decided anew each
time, of all of them.

An attempt ends at the first disk that is busy, and goes in the order of the disks' names (routes.py): of several
runs that want the same disks, one has them all. Between attempts it is only asked who has them: an attempt owns disks
for a moment, in which others would find them busy.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from lmdbitmap.access import owners
from lmdbitmap.errors import Busy, LmdbitmapError
from lmdbitmap.store import Store
from lmdbitmap.tracker import chain
from lmdbitmap.tracker.session import OpenDevice
from lmdbitmap.work.failures import Failures
from lmdbitmap.work.patience import Patience

log = logging.getLogger(__name__)

_Route = TypeVar("_Route")


class Wanted(NamedTuple):
    """The disks that a job is to have, and how it opens their images."""

    store: Store
    names: Sequence[str]
    open_device: OpenDevice


def patiently(
    attempt: Callable[[Failures], _Route], wanted: Wanted, patience: Patience, failures: Failures
) -> _Route:
    """What `attempt` answers, once no disk is busy or patience is at its end: then a busy disk fails as any other.

    It is given what to set failures aside in: those of the attempt that counts are in `failures` afterwards.
    """
    told: set[str] = set()
    while patience.left_s:
        aside = Failures(at_once=failures.at_once, never=(Busy,))
        try:
            route = attempt(aside)
        except owners.NotTogether:
            raise
        except Busy:
            patience.pause()
            _wait(wanted, patience, told)
        else:
            failures.errors.update(aside.errors)
            return route
    return attempt(failures)


def _wait(wanted: Wanted, patience: Patience, told: set[str]) -> None:
    """Return when each of the disks was free or served at some time since, or patience is at its end."""
    for name in sorted(wanted.names):
        while (busy := _who_has(wanted, name)) is not None and patience.left_s:
            if name not in told:
                log.warning("%s: waiting for %.3g s at most", busy.problem, patience.left_s)
                told.add(name)
            patience.pause()


def _who_has(wanted: Wanted, name: str) -> Busy | None:
    """Who keeps the disk from us. What else is wrong with it the next attempt tells."""
    with contextlib.suppress(LmdbitmapError, OSError):
        try:
            _look_at(wanted, name)
        except Busy as busy:
            return busy
    return None


def _look_at(wanted: Wanted, name: str) -> None:
    disk = chain.disk_called(wanted.store, name)
    if owners.is_attached(wanted.store, disk):
        owners.owner_of(wanted.store, disk).close()
    else:
        wanted.open_device(disk.image).close()
