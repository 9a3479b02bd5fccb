"""`lmdbitmap:kept`: which blocks of a snapshot are no longer in the image, for clients that read the image (direct.py).

Bit 0 of a status means: this block was kept aside and has to be read through the export. Without bit 0, what the client
read from the image before it asked is right. Where that is not known, because the snapshot broke or was released, the
answer is an error. Bit 1 means that guests are quiet (quiet.py). It is part of this answer because a client that copies
a disk needs it each time.

The question has a consequence: if nothing of the snapshot is read twice, a block answered 0 is kept no longer. So the
source is `Consequential`. It is offered only on connections that the owner handed over. It must be asked on a
connection that has selected no other context, without NBD_CMD_FLAG_REQ_ONE, and only about blocks that were read or
will not be.
"""

from __future__ import annotations

from collections.abc import Iterator

from lmdbitmap.nbd import protocol as nbd
from lmdbitmap.nbd.server.contexts import MAX_DESCRIPTORS, Consequential
from lmdbitmap.tracker.snapshot import Snapshot


def kept_source(snapshot: Snapshot) -> Consequential:
    """The source, limited to what fits into one reply: a part that the client is not told counts as not asked."""
    most = MAX_DESCRIPTORS << snapshot.clusters.granularity_bits

    def source(offset: int, length: int) -> Iterator[tuple[int, int]]:
        unaligned = offset % snapshot.clusters.granularity
        quiet = nbd.LMDBITMAP_STATE_QUIET if snapshot.guests_are_quiet() else 0
        for size, is_kept in snapshot.kept(offset, min(length, most - unaligned)):
            yield size, quiet | (nbd.LMDBITMAP_STATE_KEPT if is_kept else 0)

    return Consequential(source)
