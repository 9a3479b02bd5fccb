"""Proof of continuity: may the bitmap of a disk still be believed, given what its image looks like now?

An image that was written behind our back has changed blocks that no bitmap names. So whoever attaches a
disk, and whoever only asks what changed, compares the image with what its last rightful owner saw:

- after a clean detach: the identity recorded then must be the identity now, mtime included;
- after a crash: the image may have been written until the owner's last moment, and not later. The owner's
  last sign of life is at most `_BEAT_GRACE_NS` older than that moment;
- after a crash of the whole machine the image's and the owner file's last seconds may be missing from the
  disk, each for itself: `_POWER_CUT_GRACE_NS` covers it, and nothing may be newer than this boot;
- while somebody holds the disk, his signs of life vouch for the image in the same way. His lock alone vouches
  for nothing: he may be about to attach or to adopt, and not have looked at the image yet.

Whatever cannot be compared counts as broken. A block device has no useful mtime: a write to it behind our
back cannot be noticed, and the documentation says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

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


Judge: TypeAlias = Callable[[Disk, ImageIdentity, "Beat | None", Moment], Verdict]


def judge(disk: Disk, image: ImageIdentity, beat: Beat | None, now: Moment) -> Verdict:
    """Whether tracking of `disk`, which nobody holds, continued without a gap until now."""
    if disk.session is None:
        return Verdict(broken=_gap_since_detach(disk.identity, image))
    if disk.durability == DEFERRED:
        return Verdict(
            broken="it was not closed cleanly, and in deferred mode the bits are written at a clean close only"
        )
    gap = _gap_since_sign_of_life(disk, image, beat, now)
    if gap is not None:
        return Verdict(broken=gap)
    return Verdict(superset="its owner died: whatever was being written then counts as dirty")


def judge_held(disk: Disk, image: ImageIdentity, beat: Beat | None, now: Moment) -> Verdict:
    """The same for a disk that somebody holds at this moment."""
    if disk.session is None:
        return Verdict(broken=_gap_since_detach(disk.identity, image))
    return Verdict(broken=_gap_since_sign_of_life(disk, image, beat, now))


def _gap_since_detach(before: ImageIdentity | None, image: ImageIdentity) -> str | None:
    if before is None or not _is_same_file(before, image):
        return _other_file(before)
    if image.size != before.size:
        return f"the image's size went from {before.size} to {image.size} bytes while nobody tracked it"
    if image.mtime_ns != before.mtime_ns:
        return "the image was written while nobody tracked it"
    return None


def _gap_since_sign_of_life(disk: Disk, image: ImageIdentity, beat: Beat | None, now: Moment) -> str | None:
    begun = disk.identity
    if begun is None or not _is_same_file(begun, image):
        return _other_file(begun)
    if image.size not in (disk.size, disk.resizing_from):
        return f"the image has {image.size} bytes, and {disk.size} were tracked"
    if 0 != image.mtime_ns == begun.mtime_ns and (beat is None or beat.mtime_ns <= begun.mtime_ns):
        return None  # nobody wrote since the session began: its owner may not have come to his first beat
    if beat is None:
        return "it was not closed cleanly, and its owner's last sign of life cannot be read"
    if image.mtime_ns and not _within_last_moment(image, beat, now):
        return "the image was written, or replaced by an older one, after its owner's last sign of life"
    return None


def _is_same_file(before: ImageIdentity, image: ImageIdentity) -> bool:
    return (image.device, image.inode) == (before.device, before.inode)


def _other_file(before: ImageIdentity | None) -> str:
    if before is None:
        return "it was never detached cleanly, nor seen when it was added"
    return "the image is another file than the one that was tracked"


def _within_last_moment(image: ImageIdentity, beat: Beat, now: Moment) -> bool:
    if beat.boot_id == now.boot_id:
        return beat.mtime_ns <= image.mtime_ns <= max(beat.time_ns + _BEAT_GRACE_NS, beat.mtime_ns)
    earliest = beat.mtime_ns - _POWER_CUT_GRACE_NS
    return earliest <= image.mtime_ns <= min(beat.time_ns + _POWER_CUT_GRACE_NS, now.boot_time_ns)
