"""`lmdbitmap:kept`: what of a snapshot is not in the image any more, for whoever reads the image itself (direct.py).

Bit 0 of a status says that this was kept aside and has to be read through the export; without it, whoever asks has
read it rightly from the image before it asked. Where that is not known, as of a snapshot that broke or was released,
the answer is an error. Bit 1 says that guests are quiet (quiet.py): it goes with the question, as whoever copies a disk
wants to know it each time.

The question has a consequence: of a snapshot of which nothing is read twice, what is answered 0 is not kept any longer.
So it is `Consequential`: offered on connections that the owner handed over and on no others, and asked on one that has
selected no other context, without NBD_CMD_FLAG_REQ_ONE, and only of what was read or is not going to be.
"""

from __future__ import annotations

from collections.abc import Iterator

from lmdbitmap.nbd import protocol as nbd
from lmdbitmap.nbd.server.contexts import MAX_DESCRIPTORS, Consequential
from lmdbitmap.tracker.snapshot import Snapshot


def kept_source(snapshot: Snapshot) -> Consequential:
    """Answers no more at once than fits into one reply: what the client is not told, it has not asked."""
    most = MAX_DESCRIPTORS << snapshot.clusters.granularity_bits

    def source(offset: int, length: int) -> Iterator[tuple[int, int]]:
        unaligned = offset % snapshot.clusters.granularity
        quiet = nbd.LMDBITMAP_STATE_QUIET if snapshot.guests_are_quiet() else 0
        for size, is_kept in snapshot.kept(offset, min(length, most - unaligned)):
            yield size, quiet | (nbd.LMDBITMAP_STATE_KEPT if is_kept else 0)

    return Consequential(source)
