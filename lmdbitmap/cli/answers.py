"""Reports about disks and bitmaps: gathered once, printed as JSON for programs or in words for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from lmdbitmap.access.owners import is_attached
from lmdbitmap.access.questions import Owners
from lmdbitmap.backups import consumers
from lmdbitmap.backups.consumers import Holder
from lmdbitmap.cli.holders import hold_facts, holder_facts
from lmdbitmap.cli.options import Session
from lmdbitmap.cli.output import say, say_json
from lmdbitmap.cli.sizes import format_latency, format_size, iso_time
from lmdbitmap.errors import LmdbitmapError
from lmdbitmap.extents import Trust
from lmdbitmap.geometry import Geometry
from lmdbitmap.images.whereabouts import WHILE_THERE_IS_TIME
from lmdbitmap.notes.holds import Hold
from lmdbitmap.storage.schema import Bitmap, Checkpoint, Disk
from lmdbitmap.store import Store
from lmdbitmap.tracker import standalone
from lmdbitmap.tracker.changes import Standing, Summary, dirty_bytes_of_period
from lmdbitmap.work.failures import Failures


@dataclass(frozen=True)
class DiskReport:
    """The state of a disk at this moment."""

    disk: Disk
    attached: bool
    newest: Checkpoint
    dirt: Summary
    """Since the newest checkpoint."""
    holds: Sequence[Hold]
    """The holds of repositories, ended ones included."""

    def facts(self) -> dict[str, object]:
        standing = self.dirt.standing
        return {
            **_description(self.disk),
            "attached": self.attached,
            "trust": standing.trust.value,
            "reason": standing.reason,
            "dirty_bytes": self.dirt.dirty_bytes,
            "since": self.newest.name,
            "holds": [hold_facts(hold) for hold in self.holds],
        }


@dataclass(frozen=True)
class UnknownDisk:
    """A disk of which something cannot be read: all of it may have changed."""

    disk: Disk
    why: LmdbitmapError

    def facts(self) -> dict[str, object]:
        return {
            **_description(self.disk),
            "attached": None,
            "trust": Trust.UNTRUSTED.value,
            "reason": self.why.problem,
            "dirty_bytes": self.disk.size,
            "since": None,
            "holds": None,
        }


def _description(disk: Disk) -> dict[str, object]:
    return {
        "name": disk.name,
        "uuid": str(disk.uuid),
        "image": disk.image,
        "size": disk.size,
        "granularity": disk.geometry.granularity,
        "durability": disk.durability,
        "policy": disk.policy,
    }


def report_on(owners: Owners, disk: Disk) -> DiskReport:
    asked = owners.changes(disk.name)
    holds = consumers.holds_of(owners.store, disk.name)
    return DiskReport(disk, is_attached(owners.store, disk), asked.since, asked.summary, holds)


def report_apart(owners: Owners, disk: Disk, apart: Failures) -> DiskReport | UnknownDisk:
    """As `report_on`, where what cannot be read of one disk must not hide the others; it is set `apart`."""
    known: list[DiskReport] = []
    with apart.of(disk.name):
        known.append(report_on(owners, disk))
    return known[0] if known else UnknownDisk(disk, apart.errors[disk.name])


def served_words(served: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (label, words) for the facts that the serving process reports of a disk; see docs/control.md."""
    rates, latencies = served["rates"], served["latencies"]
    connections, carried = served["connections"], served["bytes"]
    yield "served by", f"process {served['pid']}, lmdbitmap {served['version']}"
    if served["image_lost"] is not None:
        yield "image lost", f"{served['image_lost']}; {WHILE_THERE_IS_TIME}"
    yield "clients", f"{connections['now']} now, {connections['ever']} ever"
    yield "requests", _listed(served["requests"], "{:d} {}") or "none"
    yield "traffic", f"{format_size(carried['received'])} in, {format_size(carried['sent'])} out"
    now = _listed(rates["requests"], "{:.1f} {}/s")
    bytes_now = f"{format_size(round(rates['received']))}/s in, {format_size(round(rates['sent']))}/s out"
    yield "at present", f"{now or 'no requests'}, {rates['commits']:.1f} commits/s, {bytes_now}"
    for kind, label in (("commit", "commits"), ("flush", "flushes"), ("batch", "batches")):
        yield label, _latency_words(latencies[kind])
    yield "armed", f"{served['armed']} extents"
    for held in served["snapshots"]:
        room = f"{format_size(held['kept_bytes'])} of old data, room for {format_size(held['limit_bytes'])}"
        yield "held", f"as at {held['checkpoint']}: {held['broken'] or room}"


def _listed(numbers: Mapping[str, float], form: str) -> str:
    return ", ".join(
        form.format(number, kind.replace("_", " ")) for kind, number in numbers.items() if number
    )


def _latency_words(latencies: Mapping[str, int]) -> str:
    if not latencies["count"]:
        return "none"
    half, most, longest = (format_latency(latencies[name]) for name in ("p50_ns", "p99_ns", "max_ns"))
    return f"{latencies['count']}: half of them within {half}, 99% within {most}, the longest {longest}"


@dataclass(frozen=True)
class Period:
    """A checkpoint and the dirty bytes from it to the next one, which are None (unknown) for an older epoch."""

    checkpoint: Checkpoint
    dirty_bytes: int | None
    holders: Sequence[Holder]

    def facts(self) -> dict[str, object]:
        return {
            "name": self.checkpoint.name,
            "uuid": str(self.checkpoint.uuid),
            "time": iso_time(self.checkpoint.time_ns),
            "epoch": str(self.checkpoint.epoch),
            "dirty_bytes": self.dirty_bytes,
            "held_by": [holder_facts(holder) for holder in self.holders],
        }


def periods_of(owners: Owners, disk: Disk) -> Iterator[Period]:
    """Yield the periods of the disk's checkpoints, oldest first, older epochs included."""
    with owners.store.read() as reader:
        checkpoints = reader.checkpoints(disk.uuid)
    holders = consumers.holders_of(owners.store, disk)
    for checkpoint, following in zip_longest(checkpoints, checkpoints[1:]):
        dirty_bytes = _dirty_bytes(owners, disk, checkpoint, following)
        yield Period(checkpoint, dirty_bytes, holders(checkpoint))


def _dirty_bytes(owners: Owners, disk: Disk, since: Checkpoint, until: Checkpoint | None) -> int | None:
    if since.epoch != disk.epoch:
        return None
    if until is not None:
        return dirty_bytes_of_period(owners.store, disk, since, until)
    return owners.changes(disk.name, since=since.name).summary.dirty_bytes


@dataclass(frozen=True)
class BitmapReport:
    """A stand-alone bitmap."""

    bitmap: Bitmap
    dirty_bytes: int
    standing: Standing

    def facts(self) -> dict[str, object]:
        bitmap, standing = self.bitmap, self.standing
        return {
            "name": bitmap.name,
            "uuid": str(bitmap.uuid),
            "size": bitmap.size,
            "granularity": bitmap.geometry.granularity,
            "origin_disk": None if bitmap.origin_disk is None else str(bitmap.origin_disk),
            "trust": standing.trust.value,
            "reason": standing.reason,
            "dirty_bytes": self.dirty_bytes,
        }


def report_on_bitmap(store: Store, bitmap: Bitmap) -> BitmapReport:
    dirty_bytes = sum(bitmap.geometry.bytes_of(*run)[1] for run in standalone.runs(store, bitmap))
    with store.read() as reader:
        loose = standalone.why_loose(reader, bitmap)
    return BitmapReport(bitmap, dirty_bytes, Standing(Trust.SUPERSET if loose else Trust.EXACT, loose))


def standing_words(standing: Standing) -> str:
    """`exact`, `superset: its owner died`, …"""
    return standing.trust.value + (f": {standing.reason}" if standing.reason else "")


def size_words(geometry: Geometry) -> str:
    return f"{format_size(geometry.size)} in blocks of {format_size(geometry.granularity)}"


def confirm(asked: Session, words: str, **facts: object) -> None:
    """Report success: `words` for people, or `facts` as JSON."""
    if asked.as_json:
        say_json(facts)
    else:
        say(words)
