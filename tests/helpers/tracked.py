"""A tracked disk to try things on: a store, an image, and what the store says of it in block numbers."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from lmdbitmap import bits
from lmdbitmap.extents import Trust
from lmdbitmap.filter import Filter
from lmdbitmap.geometry import REGION_BLOCKS
from lmdbitmap.storage import schema
from lmdbitmap.store import Store
from lmdbitmap.tracker import chain, session
from lmdbitmap.tracker.changes import Changes, changes
from tests.helpers.support import make_raw_image

NAME = "sda"
LATER_NS = 3_600_000_000_000
"""An hour: later than any grace that continuity gives."""


@dataclass
class TrackedDisk:
    """A disk called `sda` of a store of its own. `attach` as often as you like; `close` at the end."""

    folder: Path
    size: int
    granularity_bits: int = 12
    durability: str = schema.WRITE_AHEAD
    policy: str = schema.GUEST_FIRST
    store: Store = field(init=False)
    image: Path = field(init=False)

    def __post_init__(self) -> None:
        self.store = Store.create(str(self.folder / "store"))
        self.image = make_raw_image(self.folder / "disk.raw", self.size)
        session.add(
            self.store, NAME, str(self.image), granularity_bits=self.granularity_bits,
            durability=self.durability, policy=self.policy,
        )  # fmt: skip

    def attach(self, *, max_armed: int = 1024) -> Filter:
        """Beats and passes are the caller's."""
        return Filter.attach(self.store, NAME, max_armed=max_armed, background=False)

    def clean(self, checkpoint: str = "start") -> TrackedDisk:
        """Begin with a checkpoint after which nothing is dirty."""
        with self.attach() as attached:
            attached.checkpoint(checkpoint)
        return self

    def changes(self, since: str | None = None, until: str | None = None) -> Changes:
        """As somebody else would ask: of the store, without the owner's help."""
        return changes(self.store, NAME, since=since, until=until)

    def disk(self) -> schema.Disk:
        with self.store.read() as reader:
            return chain.find_disk(reader, NAME)

    def checkpoints(self) -> list[str]:
        with self.store.read() as reader:
            return [checkpoint.name for checkpoint in reader.checkpoints(self.disk().uuid)]

    def stored_dirt(self) -> set[int]:
        """The recording bitmap's blocks, exact or armed: what is known if everybody dies now."""
        with self.store.read() as reader:
            current = chain.current_checkpoint(reader, chain.find_disk(reader, NAME))
            if reader.bitmap(current.bitmap_id).all_dirty:
                return set(range(self.disk().geometry.block_count))
            return {
                number * REGION_BLOCKS + block
                for number, region in reader.regions(current.bitmap_id)
                for run in bits.runs(bits.dirty_bits(region.armed, region.bits))
                for block in range(*run)
            }

    def write_behind_our_back(self, data: bytes, offset: int, *, shift_ns: int = LATER_NS) -> None:
        """As a stranger, at a time that no sign of life of an owner vouches for."""
        with self.image.open("r+b") as image:
            image.seek(offset)
            image.write(data)
        status = self.image.stat()
        os.utime(self.image, ns=(status.st_atime_ns, status.st_mtime_ns + shift_ns))

    def close(self) -> None:
        self.store.close()


def changed_blocks(before: bytes, now: bytes, granularity: int) -> set[int]:
    """Those whose bytes differ: what must be dirty, whatever anybody says."""
    assert len(before) == len(now)
    return {
        offset // granularity
        for offset in range(0, len(before), granularity)
        if before[offset : offset + granularity] != now[offset : offset + granularity]
    }


def blocks_of(answer: Changes) -> set[int]:
    return {block for run in answer.runs() for block in range(*run)}


def trust_of(answer: Changes) -> Trust:
    return answer.summary.standing.trust


@contextmanager
def quick_folder() -> Iterator[Path]:
    """A folder in memory where there is one: for tests that commit thousands of times."""
    in_memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=in_memory, prefix="lmdbitmap-test-") as folder:
        yield Path(folder)
