"""What a recorded life must have kept at every moment: its milestones, and what its readers saw."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from tests.crash.power_cut.disk_states import File, History
from tests.crash.power_cut.recording import Node, Recording, Resize, Sync, Write
from tests.crash.power_cut.strace import NEVER


class Deed(NamedTuple):
    """Something that was begun, and `done` when it was acknowledged, if it was."""

    told: Mapping[str, Any]
    begun: int
    done: int
    thread: int

    @property
    def name(self) -> str:
        return str(self.told["name"])

    @property
    def disks(self) -> list[str]:
        return [self.told["disk"]] if "disk" in self.told else list(self.told.get("disks", ()))

    def is_on(self, disk: str) -> bool:
        return disk in self.disks


class Truth:
    """All that can be known of a life without asking the product."""

    def __init__(self, recording: Recording, history: History) -> None:
        self.recording = recording
        self.history = history
        self.deeds = _deeds(recording)
        self.born = next(m.tick for m in recording.milestones if m.told["what"] == "born")
        self.images = {
            name.removesuffix(".raw"): node
            for name, node in recording.folder.entries.items()
            if name.startswith("sd")
        }
        self.timed = {m.told["disk"] for m in recording.milestones if m.told["what"] == "mtime"}
        """Images whose mtimes were told: those of the disks, and copies."""
        self._seen: dict[tuple[str, int], File] = {}

    def of(self, what: str, disk: str | None = None) -> list[Deed]:
        return [deed for deed in self.deeds.get(what, ()) if disk is None or deed.is_on(disk)]

    def done(self, what: str, moment: int) -> list[Deed]:
        return [deed for deed in self.of(what) if deed.done <= moment]

    def seen(self, disk: str, tick: int) -> File:
        """The image as its readers saw it; not to be changed."""
        if (disk, tick) not in self._seen:
            self._seen[disk, tick] = self.history.seen(self.images[disk], tick)
        return self._seen[disk, tick]

    def at_checkpoint(self, disk: str, deed: Deed) -> File:
        """The image at the moment that a checkpoint stands for: when its transaction became durable.

        Nobody writes then (law 2), which is checked.
        """
        return self.seen(disk, self._commit(deed))

    def _commit(self, deed: Deed) -> int:
        """The last of its thread in it: what is quiet is written before, while others write. A deed that was not
        acknowledged has no end: its first."""
        commits = [
            operation.begin
            for operation in self.recording.operations
            if isinstance(operation, Write) and operation.synced and operation.thread == deed.thread
            if deed.begun < operation.begin < deed.done
        ]
        if not commits:
            return deed.begun
        return commits[0] if deed.done == NEVER else commits[-1]

    # -- the file's time ---------------------------------------------------------------------------------

    def mtimes(self, image: str, moment: int) -> list[int]:
        """What the disk may hold as the image's mtime, oldest first: fdatasync does not bring it there."""
        node = self.recording.node_at(f"{image}.raw")
        syncs = [
            op for op in self.recording.operations if isinstance(op, Sync) and op.node is node and op.whole
        ]
        told = [m for m in self.recording.milestones if m.told["what"] == "mtime" and m.told["disk"] == image]
        last_sync = max((sync.begin for sync in syncs if sync.end <= moment), default=-1)
        ticks = [m.tick for m in told]
        last = max(bisect_right(ticks, moment), 1)  # before the first one was told, it is under way
        first = bisect_right([self._last_change(node, tick) for tick in ticks[:last]], last_sync)
        if self._last_change(node, moment) > self._last_change(node, ticks[last - 1]):
            last += 1  # the change is under way, and its time is told only afterwards
            if last_sync > self._last_change(node, moment):
                first = last
        return [m.told["mtime_ns"] for m in told[max(first - 1, 0) : last]]

    def _last_change(self, node: Node, tick: int) -> int:
        changes = self._changes_of(node)
        position = bisect_right(changes, tick)
        return changes[position - 1] if position else -1

    def _changes_of(self, node: Node) -> list[int]:
        return [
            operation.begin
            for operation in self.recording.operations
            if isinstance(operation, Write | Resize) and operation.node is node
        ]

    # -- what the recording shows by itself --------------------------------------------------------------

    def complaints(self) -> Iterator[str]:
        """Promises that need no power cut to be seen broken."""
        for deed in self.of("flush"):
            if not self._is_synced(self.images[deed.told["disk"]], deed):
                yield f"the flush at tick {deed.begun} was acknowledged before the image was synced"
        for deed in self.of("checkpoint"):
            for disk in deed.told["disks"]:
                if self._is_written_at(self.images[disk], self._commit(deed)):
                    yield f"disk {disk} was written while checkpoint {deed.name!r} was committed"

    def _is_synced(self, node: Node, deed: Deed) -> bool:
        return any(
            isinstance(operation, Sync)
            and operation.node is node
            and deed.begun < operation.begin
            and operation.end < deed.done
            for operation in self.recording.operations
        )

    def _is_written_at(self, node: Node, tick: int) -> bool:
        return any(
            isinstance(operation, Write) and operation.node is node and operation.begin < tick < operation.end
            for operation in self.recording.operations
        )


def _deeds(recording: Recording) -> dict[str, list[Deed]]:
    found: dict[str, list[Deed]] = {}
    for milestone in recording.milestones:
        told = milestone.told
        siblings = found.setdefault(told["what"], [])
        if told.get("phase") == "begun":
            siblings.append(Deed(told, milestone.tick, NEVER, milestone.thread))
        elif told.get("phase") == "done":
            position = max(
                number
                for number, deed in enumerate(siblings)
                if deed.thread == milestone.thread and deed.done == NEVER
            )
            siblings[position] = siblings[position]._replace(done=milestone.tick)
    return found
