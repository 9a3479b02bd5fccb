"""Waits for disks that another program has for itself, such as another backup.

**A waiting run holds no disk.** So no runs wait for each other in a circle. Meanwhile another process can begin to
serve a disk; that ends the wait too, as the disk is then read through its server. Each attempt decides anew, for all
disks, how to get at them.

An attempt ends at the first busy disk, and goes in the order of the disks' names (routes.py): of several runs that want
the same disks, one gets them all. Between attempts we only ask who has them: an attempt owns disks for a moment, during
which others would find them busy.
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
    """The disks that a job wants, and how it opens their images."""

    store: Store
    names: Sequence[str]
    open_device: OpenDevice


def patiently(
    attempt: Callable[[Failures], _Route], wanted: Wanted, patience: Patience, failures: Failures
) -> _Route:
    """Return what `attempt` returns once no disk is busy. When patience ends, a busy disk fails like any other failure.

    `attempt` gets a `Failures` to set disks aside in. Those of the attempt that counts are in `failures` afterwards.
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
    """Return when each of the disks has been free or served at some time since, or patience is at its end."""
    for name in sorted(wanted.names):
        while (busy := _who_has(wanted, name)) is not None and patience.left_s:
            if name not in told:
                log.warning("%s: waiting for %g s at most", busy.problem, round(patience.left_s, 1))
                told.add(name)
            patience.pause()


def _who_has(wanted: Wanted, name: str) -> Busy | None:
    """Return the `Busy` that says who has the disk, or None. Other problems are left to the next attempt to report."""
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
