"""Metadata contexts: what a server can say about the blocks of a disk, under the names that clients know.

A `StatusSource` takes (offset, length) and yields (length, status) without a gap. In some contexts status 0 means
*clean*, so a source that does not know raises; it never answers 0 for an error.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final, TypeAlias

from lmdbitmap.interfaces import ServedDisk
from lmdbitmap.nbd import protocol as nbd

StatusSource: TypeAlias = Callable[[int, int], Iterable[tuple[int, int]]]
ContextsOf: TypeAlias = Callable[[str, ServedDisk], Mapping[str, StatusSource]]
"""Returns the contexts of the disk served under a name, by their names on the wire."""

_asking = threading.local()

MAX_DESCRIPTORS: Final = 1 << 17
"""Descriptors in one reply, for all its contexts together; QEMU allows as many for each. Clients ask for the rest."""


class Consequential:
    """A source whose every answer has a consequence, so the client has to receive all of it, and be entitled to it.

    Only for connections that the disk's owner handed over, and only if no other context is selected.
    """

    def __init__(self, source: StatusSource) -> None:
        self._source = source

    def __call__(self, offset: int, length: int) -> Iterable[tuple[int, int]]:
        return self._source(offset, length)


@contextlib.contextmanager
def one_question() -> Iterator[None]:
    """All sources this thread asks in the block answer one request; they may answer as of the moment it began."""
    _asking.question = object()
    try:
        yield
    finally:
        _asking.question = None


def question() -> object | None:
    """A token for the question that this thread asks now; None outside of `one_question`."""
    return getattr(_asking, "question", None)


class Later(Mapping[str, StatusSource]):
    """Contexts that are looked up when first used: for a disk with many, that reads the store. For one thread."""

    def __init__(self, look_up: Callable[[], Mapping[str, StatusSource]]) -> None:
        self._look_up = look_up
        self._looked_up: Mapping[str, StatusSource] | None = None

    @property
    def _found(self) -> Mapping[str, StatusSource]:
        if self._looked_up is None:
            self._looked_up = self._look_up()
        return self._looked_up

    def __getitem__(self, name: str) -> StatusSource:
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


def for_strangers(contexts: Mapping[str, StatusSource]) -> Mapping[str, StatusSource]:
    """The contexts that may be offered to any client."""
    return {name: source for name, source in contexts.items() if not isinstance(source, Consequential)}


def base_contexts(name: str, disk: ServedDisk) -> Mapping[str, StatusSource]:
    """The contexts of every disk: its allocation."""
    return {nbd.NBD_META_BASE_ALLOCATION: allocation_source(disk)}


def allocation_source(disk: ServedDisk) -> StatusSource:
    def source(offset: int, length: int) -> Iterator[tuple[int, int]]:
        for extent in disk.allocation(offset, length):
            hole = nbd.NBD_STATE_HOLE if extent.hole else 0
            zero = nbd.NBD_STATE_ZERO if extent.zero else 0
            yield extent.length, hole | zero

    return source


def descriptors(source: StatusSource, offset: int, length: int, limit: int) -> list[tuple[int, int]]:
    """Return at most `limit` descriptors of [offset, offset + length), none empty, the last clipped to the range."""
    found: list[tuple[int, int]] = []
    left = length
    for extent_length, status in source(offset, length):
        if left == 0 or len(found) == limit:
            break
        if extent_length:
            found.append((min(extent_length, left), status))
            left -= found[-1][0]
    return found
