"""Reads images stacked in a chain: what the newest reads as, and which file each byte of it is in.

There are two ways. A range of about a cluster is walked down: the first image that has it ends the walk. A longer range
is swept: all images are read side by side, each run once, whatever their number. Asking the images one after the other
about each gap of those above would take minutes for a gigabyte in a chain of a thousand.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence

from lmdbitmap.errors import InvalidArgument
from lmdbitmap.geometry import check_range
from lmdbitmap.qcow2.reader import Kind, MappedRun, Qcow2Reader, joined


def chain_extents(readers: Sequence[Qcow2Reader], offset: int, length: int) -> Iterator[MappedRun]:
    """Yield where each byte of the newest image comes from: stored in `readers[run.layer]`, or zero.

    `readers` come newest first. Past the end of a shorter backing image there are zeroes, whatever a still older one
    holds.
    """
    if not readers or any((reader.backing_file is None) != (reader is readers[-1]) for reader in readers):
        raise InvalidArgument(
            f"{len(readers)} images are not a chain",
            next_step="give every image, newest first, down to the full one",
        )
    if length <= readers[0].cluster_size:
        return joined(_walked(readers, readers[0].extents(offset, length)))
    check_range(offset, length, readers[0].size)
    end = offset + length
    return overlaid(merged(stored(readers, offset, end)), offset, end)


def chain_read_into(readers: Sequence[Qcow2Reader], buffer: memoryview, offset: int) -> None:
    """Fill `buffer` with what the newest image reads as."""
    for run in chain_extents(readers, offset, len(buffer)):
        readers[run.layer].fill(buffer[run.offset - offset : run.end - offset], run)


# --- walked down ---


def _walked(readers: Sequence[Qcow2Reader], newest: Iterator[MappedRun]) -> Iterator[MappedRun]:
    """Follow unallocated runs down, with a stack of our own: a chain may be deeper than Python's calls."""
    stack = [(0, newest)]
    while stack:
        layer, runs = stack[-1]
        run = next(runs, None)
        if run is None:
            stack.pop()
        elif run.is_stored:
            yield run._replace(layer=layer)
        elif run.kind is Kind.ZERO or layer + 1 == len(readers):
            yield MappedRun(run.offset, run.length, Kind.ZERO)
        else:
            end = min(max(readers[layer + 1].size, run.offset), run.end)
            if end < run.end:
                stack.append((layer, iter([MappedRun(end, run.end - end, Kind.ZERO)])))
            if end > run.offset:
                stack.append((layer + 1, readers[layer + 1].extents(run.offset, end - run.offset)))


# --- swept ---


def stored(readers: Sequence[Qcow2Reader], start: int, end: int) -> list[Iterator[MappedRun]]:
    """Return the runs of each image in bytes [start, end), ascending, without what it leaves to those below.

    A shorter image hides what is below its missing part.
    """
    return [_stored_in(reader, layer, start, end) for layer, reader in enumerate(readers)]


def _stored_in(reader: Qcow2Reader, layer: int, start: int, end: int) -> Iterator[MappedRun]:
    stop = max(min(reader.size, end), start)
    if start < stop:
        for run in reader.extents(start, stop - start):
            if run.kind is not Kind.UNALLOCATED:
                yield run._replace(layer=layer)
    if stop < end:
        yield MappedRun(stop, end - stop, Kind.ZERO, layer=layer)


def merged(streams: Iterable[Iterator[MappedRun]]) -> Iterator[MappedRun]:
    """Yield runs of several layers in the order of their offsets."""
    return heapq.merge(*streams, key=lambda run: run.offset)


def overlaid(runs: Iterable[MappedRun], start: int, end: int) -> Iterator[MappedRun]:
    """Yield what [start, end) reads as: of the runs that cover a byte, the one of the lowest layer number; else zeroes.

    `runs` come in the order of their offsets, and lie inside. Each is looked at once.
    """
    return joined(_overlaid(runs, start, end))


def _overlaid(runs: Iterable[MappedRun], start: int, end: int) -> Iterator[MappedRun]:
    position, covering = start, _Covering()
    for run in runs:
        yield from covering.seen(position, run.offset)
        position = run.offset
        covering.add(run)
    yield from covering.seen(position, end)


_MOST_COVERING = 1024


class _Covering:
    """Runs that have begun, uppermost first. Ended ones are dropped when they come to the top."""

    def __init__(self) -> None:
        self._runs: list[tuple[int, int, MappedRun]] = []
        self._most = _MOST_COVERING

    def add(self, run: MappedRun) -> None:
        if len(self._runs) > self._most:  # some may have ended under a long one
            self._runs = [each for each in self._runs if each[2].end > run.offset]
            heapq.heapify(self._runs)
            self._most = max(_MOST_COVERING, 2 * len(self._runs))
        heapq.heappush(self._runs, (run.layer, run.offset, run))

    def seen(self, position: int, stop: int) -> Iterator[MappedRun]:
        while position < stop:
            while self._runs and self._runs[0][2].end <= position:
                heapq.heappop(self._runs)
            if not self._runs:
                yield MappedRun(position, stop - position, Kind.ZERO)
                return
            top = self._runs[0][2]
            end = min(top.end, stop)
            yield top.part(position, end) if top.is_stored else MappedRun(position, end - position, Kind.ZERO)
            position = end
