"""What connections carried: a snapshot of one, and the sum of many.

A connection counts in plain integers that only its own thread writes; any thread may read them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

from lmdbitmap.nbd import protocol as nbd
from lmdbitmap.work import latencies
from lmdbitmap.work.latencies import Latencies

KINDS: Final = ("reads", "writes", "zeroes", "flushes", "block_status", "other")
"""Kinds of requests; `zeroes` are WRITE_ZEROES and TRIM."""
READS, WRITES, ZEROES, FLUSHES, BLOCK_STATUS, OTHER = range(len(KINDS))

_KIND_OF: Final = {
    nbd.NBD_CMD_READ: READS,
    nbd.NBD_CMD_WRITE: WRITES,
    nbd.NBD_CMD_TRIM: ZEROES,
    nbd.NBD_CMD_WRITE_ZEROES: ZEROES,
    nbd.NBD_CMD_FLUSH: FLUSHES,
    nbd.NBD_CMD_BLOCK_STATUS: BLOCK_STATUS,
}


def kind_of(request_type: int) -> int:
    return _KIND_OF.get(request_type, OTHER)


class Traffic(NamedTuple):
    """`counts` are the requests answered, by kind.

    `batches` are the times from receiving a batch of requests to answering it, for one batch in sixteen; `flushes` are
    the times of all flushes.
    """

    connections: int
    counts: tuple[int, ...]
    bytes_received: int
    bytes_sent: int
    batches: Latencies
    flushes: Latencies

    @property
    def requests(self) -> int:
        return sum(self.counts)


NO_TRAFFIC: Final = Traffic(0, (0,) * len(KINDS), 0, 0, Latencies(), Latencies())


def summed(parts: Iterable[Traffic]) -> Traffic:
    connections, counts, received, sent, batches, flushes = zip(NO_TRAFFIC, *parts, strict=True)
    return Traffic(
        sum(connections),
        tuple(sum(column) for column in zip(*counts, strict=True)),
        sum(received),
        sum(sent),
        latencies.together(batches),
        latencies.together(flushes),
    )
