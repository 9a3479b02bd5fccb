"""Proof of continuity: may the bitmap of a disk still be believed, given what its image looks like now?

An image that was written behind our back has changed blocks that no bitmap names. So whoever attaches a
disk, and whoever only asks what changed, compares the image with what its last rightful owner saw:

- after a clean detach: the identity recorded then must be the identity now, mtime included;
- after a crash: the image may have been written until the owner's last moment, and not later. The owner's
  last sign of life is at most `_BEAT_GRACE_NS` older than that moment;
- after a crash of the whole machine the image's and the owner file's last seconds may be missing from the
  disk, each for itself: `_POWER_CUT_GRACE_NS` covers it, and nothing may be newer than this boot.

Whatever cannot be compared counts as broken. A block device has no useful mtime: a write to it behind our
back cannot be noticed, and the documentation says so.
"""

from __future__ import annotations

from typing import NamedTuple

from lmdbitmap.interfaces import ImageIdentity
from lmdbitmap.owner import Beat
from lmdbitmap.schema import DEFERRED, Disk

_BEAT_GRACE_NS = 2_000_000_000
_POWER_CUT_GRACE_NS = 60_000_000_000


class Moment(NamedTuple):
    """The boot in which a judgement is made, and when that boot began in Unix nanoseconds."""

    boot_id: str
    boot_time_ns: int


class Verdict(NamedTuple):
    """`broken` says why the bitmap cannot be believed; `superset` why it may over-report; else it is exact."""

    broken: str | None = None
    superset: str | None = None


def judge(disk: Disk, image: ImageIdentity, beat: Beat | None, now: Moment) -> Verdict:
    """Whether tracking of `disk` continued without a gap until now."""
    if disk.identity is None:
        return Verdict(broken="it was never detached cleanly, nor seen when it was added")
    if (image.device, image.inode) != (disk.identity.device, disk.identity.inode):
        return Verdict(broken="the image is another file than the one that was tracked")
    if disk.session is None:
        return _after_detach(disk.identity, image)
    return _after_crash(disk, image, beat, now)


def _after_detach(before: ImageIdentity, image: ImageIdentity) -> Verdict:
    if image.size != before.size:
        return Verdict(
            broken=f"the image's size went from {before.size} to {image.size} bytes while nobody tracked it"
        )
    if image.mtime_ns != before.mtime_ns:
        return Verdict(broken="the image was written while nobody tracked it")
    return Verdict()


def _after_crash(disk: Disk, image: ImageIdentity, beat: Beat | None, now: Moment) -> Verdict:
    if disk.durability == DEFERRED:
        return Verdict(
            broken="it was not closed cleanly, and in deferred mode the bits are written at a clean close only"
        )
    if image.size not in (disk.size, disk.resizing_from):
        return Verdict(broken=f"the image has {image.size} bytes, and {disk.size} were tracked")
    if beat is None:
        return Verdict(broken="it was not closed cleanly, and its owner's last sign of life cannot be read")
    if image.mtime_ns and not _within_last_moment(image, beat, now):
        return Verdict(broken="the image was written, or replaced by an older one, after its owner had died")
    return Verdict(superset="its owner died: whatever was being written then counts as dirty")


def _within_last_moment(image: ImageIdentity, beat: Beat, now: Moment) -> bool:
    if beat.boot_id == now.boot_id:
        return beat.mtime_ns <= image.mtime_ns <= max(beat.time_ns + _BEAT_GRACE_NS, beat.mtime_ns)
    earliest = beat.mtime_ns - _POWER_CUT_GRACE_NS
    return earliest <= image.mtime_ns <= min(beat.time_ns + _POWER_CUT_GRACE_NS, now.boot_time_ns)
