"""Images on top of each other: what the newest reads as, and which file each byte of it is in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lmdbitmap.errors import InvalidArgument
from lmdbitmap.qcow2.reader import Kind, Qcow2Reader, Run, joined


def chain_extents(readers: Sequence[Qcow2Reader], offset: int, length: int) -> Iterator[Run]:
    """Where each byte of the newest image comes from: stored in `readers[run.layer]`, or zero. Newest first.

    Past the end of a shorter backing image there are zeroes, whatever a still older one holds.
    """
    if not readers or any((reader.backing_file is None) != (reader is readers[-1]) for reader in readers):
        raise InvalidArgument(
            f"{len(readers)} images are not a chain",
            next_step="give every image, newest first, down to the full one",
        )
    return joined(_resolved(readers, readers[0].extents(offset, length)))


def chain_read_into(readers: Sequence[Qcow2Reader], buffer: memoryview, offset: int) -> None:
    """Fill `buffer` with what the newest image reads as."""
    for run in chain_extents(readers, offset, len(buffer)):
        readers[run.layer].fill(buffer[run.offset - offset : run.end - offset], run)


def _resolved(readers: Sequence[Qcow2Reader], newest: Iterator[Run]) -> Iterator[Run]:
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
            yield Run(run.offset, run.length, Kind.ZERO)
        else:
            end = min(max(readers[layer + 1].size, run.offset), run.end)
            if end < run.end:
                stack.append((layer, iter([Run(end, run.end - end, Kind.ZERO)])))
            if end > run.offset:
                stack.append((layer + 1, readers[layer + 1].extents(run.offset, end - run.offset)))
