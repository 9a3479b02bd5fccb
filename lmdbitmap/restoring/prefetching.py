"""Prepares a backup's runs ahead of their use: proves them by their digests, reads and decompresses them.

As many threads as there are processors do that: hashing and decompressing release Python's lock. One thread takes the
results in order and writes them, so that the target is written by one thread alone:

    chain.extents ─▶ batches ─▶ threads: prove, read ─▶ in order ─▶ (run, data) ─▶ the target

A batch is 4 MiB of data or many small runs, and a few are under way: some 10 MiB for each processor are in memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Generator, Iterable, Iterator
from concurrent.futures import Future
from typing import NamedTuple

from lmdbitmap.copying.hashing import thread_count
from lmdbitmap.qcow2 import Kind, MappedRun
from lmdbitmap.repository.backup_chain import BackupChain
from lmdbitmap.work.buffers import new_buffer
from lmdbitmap.work.crew import Threads

BATCH_BYTES = 4 << 20
_BATCH_RUNS = 256


class Ready(NamedTuple):
    """A run, proven if its image can prove it. `data` has its bytes, if its kind was to be read."""

    run: MappedRun
    data: bytearray | None = None


def made_ready(
    chain: BackupChain, runs: Iterable[MappedRun], read: Collection[Kind]
) -> Generator[Ready, None, None]:
    """Yield the runs in order, in pieces of at most a batch. An error is raised in place of the run, or before.

    Close it if it is left before its end.
    """
    with Threads(max_workers=thread_count()) as threads:
        pending: deque[tuple[list[MappedRun], Future[list[Ready]]]] = deque()
        for batch in batches(runs):
            claimed = [run for run in batch if chain.claim(run)]
            pending.append((batch, threads.submit(_made_ready, chain, batch, claimed, read)))
            if len(pending) > 2 * thread_count():
                yield from _taken(chain, *pending.popleft())
        while pending:
            yield from _taken(chain, *pending.popleft())


def _made_ready(
    chain: BackupChain, batch: Iterable[MappedRun], claimed: Iterable[MappedRun], read: Collection[Kind]
) -> list[Ready]:
    for run in claimed:
        chain.prove(run)
    return [Ready(run, _data(chain, run) if run.kind in read else None) for run in batch]


def _data(chain: BackupChain, run: MappedRun) -> bytearray:
    data = new_buffer(run.length)
    chain.fill(memoryview(data), run)
    return data


def _taken(chain: BackupChain, batch: Iterable[MappedRun], made: Future[list[Ready]]) -> Iterator[Ready]:
    """Yield a finished batch once all of its runs are proven: another batch may have claimed their chunks."""
    ready = made.result()
    for run in batch:
        chain.prove(run)
    yield from ready


def batches(runs: Iterable[MappedRun]) -> Iterator[list[MappedRun]]:
    """Yield the runs in batches of `BATCH_BYTES`, or up to where a batch of their file ends."""
    batch: list[MappedRun] = []
    length = 0
    for run in runs:
        for piece in _pieces(run):
            batch.append(piece)
            length += piece.length if piece.is_stored else 0
            ends = piece.kind is Kind.DATA and (piece.host_offset + piece.length) % BATCH_BYTES == 0
            if ends or length >= BATCH_BYTES or len(batch) >= _BATCH_RUNS:
                yield batch
                batch, length = [], 0
    if batch:
        yield batch


def _pieces(run: MappedRun) -> Iterator[MappedRun]:
    """Yield the run in pieces that end on whole batches of its file, so that no two share a chunk of digests."""
    if run.kind is not Kind.DATA:
        yield run
        return
    start = run.offset
    while start < run.end:
        place = run.host_offset + start - run.offset
        stop = min(run.end, start + BATCH_BYTES - place % BATCH_BYTES)
        yield run.part(start, stop)
        start = stop
