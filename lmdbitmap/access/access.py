"""Gives a job access to disks by one of the routes of routes.py, the same route for all of its disks.

So one point in time can be taken of all of them, or of none.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

from lmdbitmap.access import owners, waiting
from lmdbitmap.access.routes import (
    FREEZE_LIMIT_S,
    OWNER_LIMIT_S,
    AtRest,
    Attached,
    PointInTime,
    Quiesced,
    ServedElsewhere,
)
from lmdbitmap.errors import InvalidArgument, LmdbitmapError, os_errors_at
from lmdbitmap.filter import Filter
from lmdbitmap.images.image import open_image
from lmdbitmap.interfaces import TrackableDevice
from lmdbitmap.storage.schema import Checkpoint, Disk
from lmdbitmap.store import Store
from lmdbitmap.tracker import chain
from lmdbitmap.tracker.scratch import Scratch
from lmdbitmap.tracker.session import OpenDevice
from lmdbitmap.work.failures import Failures
from lmdbitmap.work.patience import NO_PATIENCE, Patience, require_limits
from lmdbitmap.work.progress import is_of_a_listener


class Access(Protocol):
    """Disks whose checkpoints can be taken, read and forgotten, until `close`."""

    @property
    def disks(self) -> Sequence[Disk]:
        """The disks as they are described now. Getting at a disk may have begun a new epoch."""

    def take_point(
        self,
        name: str,
        since: Sequence[Checkpoint | None],
        quiesced: Quiesced = contextlib.nullcontext,
        *,
        once: bool = False,
    ) -> list[PointInTime]:
        """Take a checkpoint on all disks at one moment, or on none: that is done inside of `quiesced()`, and no more.

        For a disk with a checkpoint in `since`, the caller reads only what changed since then, and the last block. With
        `once` it reads nothing twice, so what was read need not be kept any longer.
        """

    def leave_out(self, disk: Disk) -> None:
        """Take no point of that disk. Only before points are taken, and if no checkpoint of it is to be forgotten."""

    def prove(self, point: PointInTime) -> None:
        """Return if all that was read is the disk at that point; else raise the reason. Read nothing afterwards."""

    def let_go(self, point: PointInTime) -> None:
        """Release what is held for a point that will not be proved. Does not raise."""

    def end_reading(self) -> None:
        """Release what is held for all points that were not proved. Does not raise."""

    def forget(self, disk: Disk, is_unneeded: Callable[[Checkpoint], bool]) -> list[str]:
        """Merge checkpoints into the ones before. One has to record, so some may stay: return their names."""

    def room_for_old_data(self) -> int:
        """Return how many bytes of a disk's old data can be kept while a point is read, as far as is known."""

    @property
    def holds_alone(self) -> bool:
        """Whether nobody else writes to the disks or their records."""

    @property
    def may_be_behind(self) -> bool:
        """Whether a checkpoint may still be made that a run which is gone by now had asked for."""

    def close(self) -> None: ...


class AccessTerms(NamedTuple):
    """How a job is to get at its disks."""

    open_device: OpenDevice
    """Opens the image of a disk that no process has."""
    attached: Mapping[str, Filter] | None = None
    """Filters of this process, by the names of their disks."""
    scratch: Scratch | None = None
    """Where these filters keep old data; None means the store's folder."""
    owner_limit_s: float = OWNER_LIMIT_S
    """How long a process that serves the disks may send nothing of what is read."""
    freeze_limit_s: float = FREEZE_LIMIT_S
    """How long that process may take to take a point in time."""
    patience: Patience = NO_PATIENCE
    """How long to wait for a program that has a disk for itself."""

    def require_sense(self) -> None:
        """Raise `InvalidArgument` for an unusable limit, and for a filter or a folder by itself."""
        require_limits(self.owner_limit_s, self.freeze_limit_s)
        if self.attached is not None and not isinstance(self.attached, Mapping):
            raise InvalidArgument(
                "the attached disks are no mapping", next_step="give each filter by the name of its disk"
            )
        if self.scratch is not None and not isinstance(self.scratch, Scratch):
            raise InvalidArgument(
                f"{self.scratch!r} is not where to keep old data",
                next_step="give Scratch(folder, limit_bytes)",
            )


@contextlib.contextmanager
def access(
    store: Store, names: Sequence[str], terms: AccessTerms, failures: Failures | None = None
) -> Iterator[Access]:
    """Get access to the disks. With `failures`, a disk that is inaccessible is set aside there and the others go on.

    Raises `Busy` if only some of the disks are served, or not all by one process, or if a process takes longer than its
    limits; `NotFound` without such a disk or image; `InvalidArgument` for an unusable limit.
    """
    terms.require_sense()
    wanted = waiting.Wanted(store, names, terms.open_device)
    attempt = functools.partial(_attempt, store, names, terms)
    route = waiting.patiently(attempt, wanted, terms.patience, failures or Failures(at_once=True))
    with contextlib.closing(route):
        yield route


def _attempt(store: Store, names: Sequence[str], terms: AccessTerms, apart: Failures) -> Access:
    attached = terms.attached or {}
    there = owners.tracked(store, names, apart)
    ours = [name for name in there if name in attached]
    elsewhere = [] if ours else owners.attached_elsewhere(store, there, apart)
    there = [name for name in there if name not in apart]
    owners.require_all_or_none(there, ours + elsewhere)
    if ours:
        filters = [_of_that_disk(store, name, attached[name]) for name in ours]
        return Attached(filters, terms.scratch or Scratch(store.path))
    if elsewhere:
        return ServedElsewhere(store, elsewhere, terms.owner_limit_s, terms.freeze_limit_s)
    return AtRest(store, there, terms.open_device, apart)


def _of_that_disk(store: Store, name: str, attached: Filter) -> Filter:
    """The filter, if it is of the disk that the store calls so: else another one's data would go by that name."""
    disk = chain.disk_called(store, name)
    if attached.disk.uuid != disk.uuid:
        raise InvalidArgument(
            f"the filter that is given as disk {name!r} of {store.path} is attached to another disk,"
            f" {attached.disk.name!r} of {attached.store.path}",
            next_step="give each filter under the name of its disk, with the store that it was attached from",
        )
    return attached


def open_to_read(image: str) -> TrackableDevice:
    """Open an image read-only. Other readers are allowed; writers are kept out."""
    return open_image(image, read_only=True)


@contextlib.contextmanager
def reading(route: Access, point: PointInTime) -> Iterator[None]:
    """Raise system errors of the block as errors of the disk's image, or as the reason why its snapshot broke.

    A process that reads another process's snapshot sees a broken snapshot only as an error of the disk. The process
    that holds the snapshot knows the reason, and is asked.
    """
    try:
        yield
    except LmdbitmapError:
        raise
    except OSError as refusal:
        if is_of_a_listener(refusal):
            raise
        with os_errors_at(point.disk.image):
            if not route.holds_alone:
                route.prove(point)
            raise
