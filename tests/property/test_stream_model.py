"""A receiver that gets streams only holds what the disk held, whatever happened to the disk in between."""

from __future__ import annotations

import io
import random

import pytest

from lmdbitmap.streams.restore import apply_stream
from lmdbitmap.streams.stream import stream_backup
from lmdbitmap.tracker import chain
from tests.helpers import naive_rbd_diff
from tests.helpers.backed_up import BackedUpDisk
from tests.helpers.tracked import NAME, quick_folder

ROUNDS = 25
SIZES = (1, 511, 70_000, 200_000, 200_704)


class Receiver:
    """Two copies of the disk: a file that we make, and bytes that the plain reader makes."""

    def __init__(self, disk: BackedUpDisk, granularity: str) -> None:
        self._disk = disk
        self._file = disk.folder / f"received-{granularity}.raw"
        self._bytes = b""
        self.holds: str | None = None

    def catch_up(self, checkpoint: str, version: int, *, cut_first: bool) -> int:
        """What changed since the checkpoint that it holds; `cut_first`, once in vain. Answers the ranges."""
        out = io.BytesIO()
        stream_backup(self._disk.store, NAME, out, since=self.holds, checkpoint=checkpoint, version=version)
        if cut_first:
            with pytest.raises(ValueError, match="the stream, byte "):
                apply_stream(io.BytesIO(out.getvalue()[:-1]), self._file)
        apply_stream(io.BytesIO(out.getvalue()), self._file)
        stream = naive_rbd_diff.read(out.getvalue())
        self._bytes = naive_rbd_diff.applied(stream, self._bytes)
        self.holds = checkpoint
        assert self._file.read_bytes() == self._bytes == self._disk.content()
        return len(stream.ranges)


def live_on(disk: BackedUpDisk, randomness: random.Random) -> None:
    """Writes, zeroes, another size, a crash, a checkpoint of somebody else's."""
    size = disk.disk().size
    attached = disk.attach(max_armed=4)
    for _ in range(randomness.randrange(4)):
        offset = randomness.randrange(size)
        length = randomness.randrange(min(30_000, size - offset) + 1)
        if randomness.random() < 0.6:
            attached.pwrite(randomness.randbytes(length), offset)
        else:
            attached.write_zeroes(offset, length)
    deed = randomness.randrange(5)
    if deed == 0:
        attached.resize(randomness.choice(SIZES))
    elif deed == 1:
        attached.checkpoint(f"other-{randomness.random()}")
    if deed == 2:
        attached.flush()
        attached.abandon()
    else:
        attached.detach()


@pytest.mark.parametrize("granularity_bits", [9, 12, 16])
def test_a_receiver_of_streams_holds_what_the_disk_held(granularity_bits: int) -> None:
    randomness = random.Random(granularity_bits)
    named = 0
    with quick_folder() as folder:
        disk = BackedUpDisk(folder, SIZES[-1], granularity_bits)
        receivers = [Receiver(disk, name) for name in ("often", "seldom")]
        for number in range(ROUNDS):
            live_on(disk, randomness)
            for receiver in receivers[: 1 if randomness.random() < 0.6 else 2]:
                cut_first = receiver.holds is not None and randomness.random() < 0.3
                checkpoint = f"{number}-{receivers.index(receiver)}"
                named += receiver.catch_up(checkpoint, 1 + number % 2, cut_first=cut_first)
            forget_all_but(disk, {receiver.holds for receiver in receivers}, randomness)
        assert named > ROUNDS
        disk.close()


def forget_all_but(disk: BackedUpDisk, needed: set[str | None], randomness: random.Random) -> None:
    for name in disk.checkpoints()[1:-1]:
        if name not in needed and randomness.random() < 0.7:
            disk.store.update(lambda writer, name=name: chain.forget(writer, disk.disk(), name))  # type: ignore[misc]
