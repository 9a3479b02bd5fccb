"""Applies a stream in the format of `rbd export-diff` (rbd_diff.py), ours or Ceph's, to make a disk of it.

| the stream | the target | what happens |
|---|---|---|
| full (no `f`) | no file, or an empty one | a new file, sparse, that gets its name when all of it is durable |
| full | a block device or an NBD export of the size | written over; what the stream does not name becomes zero |
| full | a file with something in it | refused: it may be the wrong one |
| a diff (`f`) | a file | changed in place, after it got the stream's size |
| a diff | a block device or an NBD export of the size | changed in place |
| a diff | nothing | refused: it needs the disk that it counts from |
| any | the image of a disk that is tracked | refused: its next backup would not know of it |
| any | a place inside a store or among a disk's backups | refused |

"Of the size" means the size of the disk. With `larger`, an existing target, also a file that a diff changes, may be
larger than the disk, and keeps its size. Everything behind the disk becomes zero then (target.py says why).

A target that is changed in place by an incomplete stream is neither the old disk nor the new one: the same stream has
to be applied again, which does all of it again. The bytes of a disk do not show whether it is the disk that a diff
counts from: the caller has to know.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from lmdbitmap.errors import (
    AlreadyExists,
    InvalidArgument,
    LmdbitmapError,
    NotFound,
    StorageError,
    os_errors_at,
)
from lmdbitmap.images.image import is_far, open_image
from lmdbitmap.interfaces import BlockDevice
from lmdbitmap.notes.copies import given_up
from lmdbitmap.repository.repository import refuse_beside_backups
from lmdbitmap.storage import creating
from lmdbitmap.store import Store
from lmdbitmap.streams.rbd_diff import Data, Decoder, Event, Head, Zeroes
from lmdbitmap.targets.differences import Mender
from lmdbitmap.targets.target import (
    Target,
    holds_something,
    is_block_device,
    new_file,
    refuse_tracked,
    unless_larger,
)
from lmdbitmap.work.buffers import new_buffer
from lmdbitmap.work.progress import Progress, Report

_PLACE = "the stream"
_READ_BYTES = 1 << 20


class ByteInput(Protocol):
    """A binary file or a pipe; reading 0 bytes means its end."""

    def readinto(self, buffer: memoryview, /) -> int | None: ...


@dataclass(frozen=True, slots=True)
class AppliedResult:
    """`bytes_written` bytes of the disk came as data, `bytes_zero` as zeroes."""

    head: Head
    path: str
    bytes_written: int
    bytes_zero: int
    seconds: float
    bytes_behind: int = 0
    """Bytes of the target behind the disk's end: they are zeroes."""


def apply_stream(
    stream: ByteInput,
    target_path: str | os.PathLike[str],
    *,
    larger: bool = False,
    store: Store | None = None,
    progress: Progress | None = None,
) -> AppliedResult:
    """Read a stream to its end and make the target, durably, what it says, as the module's table tells.

    The target is the path of a file or a block device, or an NBD URI. It must not be the image of a disk in `store`
    (`AlreadyExists`): its tracker would not know what was changed. Raises `FormatError` for an incomplete or damaged
    stream, `NotFound`, `AlreadyExists` and `InvalidArgument` for a target that does not fit, `Busy` for one in use,
    `StorageError` if the system refuses.
    """
    started = time.monotonic()
    place = os.fspath(target_path)
    if store is not None:
        refuse_tracked(store, place)
    if not is_far(place):
        creating.refuse_inside(place)
        refuse_beside_backups(place)
    events = _events(stream)
    head = next(events)
    assert isinstance(head, Head)
    with _target(place, head, larger, store) as target:
        applying = _Applying(target, head, Report(progress, target.size))
        for event in events:
            applying.put(event)
        applying.finish()
    return AppliedResult(
        head, place, applying.bytes_written, applying.bytes_zero, time.monotonic() - started,
        target.size - head.size,
    )  # fmt: skip


def _events(stream: ByteInput) -> Iterator[Event]:
    """Yield all events of the stream. Raise `FormatError` if it is incomplete or something follows its end."""
    decoder = Decoder(_PLACE)
    buffer = memoryview(new_buffer(_READ_BYTES))
    while count := _read(stream, buffer):
        yield from decoder.feed(buffer[:count])
    decoder.finish()


def _read(stream: ByteInput, buffer: memoryview) -> int:
    with os_errors_at(_PLACE):
        count = stream.readinto(buffer)
        if count is None:
            unready = OSError(errno.EAGAIN, "it does not block")
            raise StorageError(_PLACE, unready, next_step="give a file or a pipe without O_NONBLOCK")
        return count


# --- the target ---


@contextlib.contextmanager
def _target(path: str, head: Head, larger: bool, store: Store | None) -> Iterator[Target]:
    """Open the target, of the stream's size or `larger`. Flushed data is durable after the block."""
    if not is_far(path) and not is_block_device(path):
        if head.from_name is None:
            with new_file(path, head.size, _is_not_empty(path)) as target:
                yield target
            return
        _require_disk(path, head)
    with contextlib.closing(open_image(path)) as existing:
        target = Target(path, existing)
        target.settle()
        with given_up(store, path, existing), _in_place(path, head):
            _fit(existing, path, head, larger)
            yield target


def _is_not_empty(path: str) -> AlreadyExists:
    return AlreadyExists(
        f"{path} is not empty, and a full stream makes a new disk", next_step="name a new file"
    )


def _require_disk(path: str, head: Head) -> None:
    if not os.path.isdir(path) and not holds_something(path):
        raise NotFound(
            f"the stream counts from {head.from_name!r}, and there is no disk at {path}",
            next_step=f"apply the full stream first, and those that lead to {head.from_name!r}",
        )


def _fit(device: BlockDevice, path: str, head: Head, larger: bool) -> None:
    if device.size == head.size or (larger and device.size > head.size):
        return
    if is_far(path) or is_block_device(path):
        step = unless_larger("give it that size, or name another target", device.size, head.size)
        raise InvalidArgument(
            f"{path} has {device.size} bytes, and the stream's disk has {head.size}", next_step=step
        )
    with os_errors_at(path):
        device.resize(head.size)


@contextlib.contextmanager
def _in_place(path: str, head: Head) -> Iterator[None]:
    """Add to an error what state the target is in."""
    try:
        yield
    except InvalidArgument:
        raise  # from `_fit`, before anything was written
    except LmdbitmapError as error:
        error.next_step += f"; {path} is unusable until the same stream is applied again"
        raise


class _Applying:
    """Writes the stream's ranges to the target. Ranges may come in any order; the last one counts."""

    def __init__(self, target: Target, head: Head, report: Report) -> None:
        self._target = target
        self._head = head
        self._report = report
        self._position = 0
        """How far the stream has come; nothing after it was ever named."""
        self.bytes_written = 0
        self.bytes_zero = 0

    def put(self, event: Event) -> None:
        if isinstance(event, Data):
            self._pass_over(event.offset)
            self._target.write_many([(event.offset, memoryview(event.data))])
            self.bytes_written += len(event.data)
            self._come_to(event.offset + len(event.data))
        elif isinstance(event, Zeroes):
            self._pass_over(event.offset)
            self._zero(event.offset, event.length)
            self.bytes_zero += event.length
            self._come_to(event.offset + event.length)

    def finish(self) -> None:
        self._pass_over(self._head.size)
        self._come_to(self._head.size)
        behind = self._target.size - self._head.size
        if behind:
            Mender(self._target, self._report.advance).mend_zeroes(self._head.size, behind)
        self._target.flush()

    def _pass_over(self, offset: int) -> None:
        """Zero the bytes that a full stream leaves out."""
        if self._head.from_name is None and offset > self._position:
            self._zero(self._position, offset - self._position)

    def _zero(self, offset: int, length: int) -> None:
        if length == 0 or (self._target.is_fresh and offset >= self._position):
            return
        self._target.write_zeroes(offset, length)

    def _come_to(self, offset: int) -> None:
        if offset > self._position:
            self._report.advance(offset - self._position)
            self._position = offset
