"""Proof of continuity: can the bitmap of a disk still be believed, given its image now?

An image that was written outside the filter has changed blocks that no bitmap names. So an attach, and each question of
what changed, compares the image with what its last owner saw:

- after a clean detach: the identity recorded then must be the identity now, mtime included;
- after a crash: the image may have been written until the owner's last moment, and not later. The owner's
  last sign of life is at most `_BEAT_GRACE_NS` older than that moment. So the image's mtime is the one that
  the sign of life names, or lies between the sign of life and the end of that grace. If the clock was set back since,
  times come twice: then the mtime must be the very one;
- after a crash of the whole machine the image's and the owner file's last seconds may be missing from the
  disk, each for itself: `_POWER_CUT_GRACE_NS` covers it, and nothing may be newer than this boot;
- while an owner holds the disk, its signs of life vouch for the image in the same way. Its lock alone vouches
  for nothing: the owner may be about to attach or to adopt, and not have looked at the image yet.

A block device has no mtime. It has the counters that kernel.py describes, which count within one boot only:

- it must be the same device still, by number, size, label and, within a boot, by `diskseq`;
- after a clean detach, in the same boot: as many sectors were written as then;
- after a crash, in the same boot: as many as at the last sign of life. More may be the owner's own sectors, which were
  still in memory when it died. That is believed for `_RESTART_GRACE_NS`, for an owner that is restarted at once, and
  no longer, also by the clock that nobody can set: later it is unknown who wrote them;
- in another boot: none were written in this one. Nothing is known of the time between the owner's last moment and the
  boot's end. As nothing in the image would show that the store is an older copy, the store must be the very file that
  the last sign of life names.

A sign of life also names its session. One of a session before, as in an owner's file that was put back from a copy,
says nothing of the last: what else its owner wrote there, such as that it lost track, is missing too.

It also names the store's file and its newest transaction. A store with an older transaction was put back from a copy,
and lacks what was recorded since, so that it can say nothing after a crash. (After a clean detach the image itself
shows whether anything happened since the copy.)

A copy passes for complete once it has gone on for as many transactions as it lacks. So after a death, unless the image
was not written since the session began, the store must be the very file that the last sign of life names. So it must
after a detach from a far image, which shows nothing.

ctime is ignored, even beside an unchanged mtime: a chown (libvirt does two for each run of a guest), a rename or a new
label change it just as setting the mtime back does. A program that sets the mtime back to the nanosecond goes
unnoticed; see docs/store.md.

Anything that cannot be compared counts as broken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from lmdbitmap.interfaces import DeviceTrace, ImageIdentity, StoreMark
from lmdbitmap.storage.owner_file import Beat
from lmdbitmap.storage.schema import DEFERRED, Disk

_SECTOR_BYTES = 512
_SECOND_NS = 1_000_000_000
_BEAT_GRACE_NS = 2 * _SECOND_NS
_MTIME_STEP_NS = 2 * _SECOND_NS
"""How far an mtime may lie before the write that set it: the longest step of any file system's clock."""
_SLEWED_NS = _SECOND_NS
"""How far a clock that is only made to run slower for a while may fall behind."""
_POWER_CUT_GRACE_NS = 60 * _SECOND_NS
_RESTART_GRACE_NS = 60 * _SECOND_NS

OWNER_DIED = "its owner died: whatever was being written then counts as dirty"
STORE_PUT_BACK = "the store was put back from a copy that is older than its owner's last sign of life"
_NO_BEAT = "it was not closed cleanly, and its owner's last sign of life cannot be read"
_UNCOUNTED = (
    "the kernel does not tell, or did not tell before, whether this block device was written"
    " (Linux 5.15 or newer does, where the device's queue/iostats in /sys is 1)"
)
_MADE_ANEW = "the block device was taken away and made anew, so that it is not known what is behind it now"


class Moment(NamedTuple):
    """The present to compare with: the boot and when it began, the time (Unix nanoseconds), the store's mark, and the
    nanoseconds since the boot."""

    boot_id: str
    boot_time_ns: int
    time_ns: int
    store: StoreMark
    awake_ns: int


class Verdict(NamedTuple):
    """`broken` says why the bitmap cannot be believed; `superset` why it may over-report; else it is exact."""

    broken: str | None = None
    superset: str | None = None


Judge: TypeAlias = Callable[[Disk, ImageIdentity, "Beat | None", Moment], Verdict]


def judge(disk: Disk, image: ImageIdentity, beat: Beat | None, now: Moment) -> Verdict:
    """Judge whether tracking of `disk`, which has no owner, continued without a gap until now."""
    if disk.session is None:
        return Verdict(broken=_gap_since_detach(disk, image, beat, now))
    if disk.durability == DEFERRED:
        return Verdict(
            broken="it was not closed cleanly, and in deferred mode the bits are written at a clean close only"
        )
    gap = _gap_since_sign_of_life(disk, image, beat, now)
    if gap is not None:
        return Verdict(broken=gap)
    return Verdict(superset=OWNER_DIED)


def judge_held(disk: Disk, image: ImageIdentity, beat: Beat | None, now: Moment) -> Verdict:
    """Judge the same for a disk that has an owner now."""
    if disk.session is None:
        return Verdict(broken=_gap_since_detach(disk, image, beat, now))
    return Verdict(broken=_gap_since_sign_of_life(disk, image, beat, now))


# --- reasons against the bitmap; None if there is none. DESIGN.md has the evidence as a table ---


def _gap_since_detach(disk: Disk, image: ImageIdentity, beat: Beat | None, now: Moment) -> str | None:
    """Apply that table's column 'after a clean detach'."""
    before = disk.identity
    if before is None:
        return _never_seen(disk)
    if not is_same_file(before, image):
        return _other_file(image)
    if image.size != before.size:
        return f"the image's size went from {before.size} to {image.size} bytes while it was not tracked"
    if image.is_block_device:
        return _exchange(before, image) or _device_gap_since_detach(before, image, beat, now)
    if image.mtime_ns > before.mtime_ns:
        return "the image was written while it was not tracked"
    if image.mtime_ns < before.mtime_ns:
        return (
            "the image was written while it was not tracked, and its time of change went back,"
            " perhaps because an older copy was put back or the clock was changed"
        )
    # as long as there is only the first checkpoint, everything is dirty, and nobody may have had it yet
    return None if image.mtime_ns or disk.next_sequence <= 2 else _other_store(beat, now)


def _gap_since_sign_of_life(disk: Disk, image: ImageIdentity, beat: Beat | None, now: Moment) -> str | None:
    """Apply its columns 'after a death' and, if that was in another boot, 'after a restart of the machine'."""
    begun = disk.identity
    if begun is None:
        return _never_seen(disk)
    if not is_same_file(begun, image):
        return _other_file(image)
    if image.size not in (disk.size, disk.resizing_from):
        return f"the image has {image.size} bytes, and {disk.size} were tracked"
    if beat is not None and now.store.transaction < beat.store.transaction:
        return STORE_PUT_BACK
    went_back = (
        beat is not None and beat.mtime_ns > image.mtime_ns == begun.mtime_ns
    )  # whichever session's it is
    if beat is not None and not _is_of_the_session(beat, disk, image):
        beat = None
    if image.is_block_device:
        return _exchange(begun, image) or _device_gap_since_sign_of_life(begun, image, beat, now)
    if 0 != image.mtime_ns == begun.mtime_ns and not went_back:
        return None  # unwritten since the session began, whose owner may not have beaten yet
    if beat is None:
        return "its owner's last sign of life cannot be read, and nothing else shows what the store lacks"
    if not _within_last_moment(image, beat, now):
        return "the image was written, or replaced by an older one, after its owner's last sign of life"
    return _other_store(beat, now)


def _is_of_the_session(beat: Beat, disk: Disk, image: ImageIdentity) -> bool:
    """Whether the sign of life is not of a session before, as in an owner's file that was put back from a copy.

    One of an older version does not tell. It is believed about an image whose mtime shows what was written since.
    """
    return beat.session == disk.session or (beat.session is None and image.mtime_ns != 0)


def _other_store(beat: Beat | None, now: Moment) -> str | None:
    """For an image in which nothing would show that the store is an older copy."""
    if beat is None:
        return _NO_BEAT
    if not now.store.is_of_the_file_of(beat.store) or now.store.transaction < beat.store.transaction:
        return "the store was put back from a copy, or moved, and nothing shows what it lacks"
    return None


def is_same_file(before: ImageIdentity, image: ImageIdentity) -> bool:
    """Whether the image has the same number as before, whatever was written to it."""
    return (image.device, image.inode) == (before.device, before.inode)


def _never_seen(disk: Disk) -> str:
    """Return the reason for an image that was not seen since its epoch began: the reason of the epoch still holds."""
    is_first = disk.epoch_number == 1
    return "it was never detached cleanly, nor seen when it was added" if is_first else disk.epoch_reason


def _other_file(image: ImageIdentity) -> str:
    if image.is_block_device:
        return "the image is another block device than the one that was tracked"
    return "the image is another file than the one that was tracked: replaced, restored or moved here"


def _within_last_moment(image: ImageIdentity, beat: Beat, now: Moment) -> bool:
    """Whether nothing was written after the sign of life, or only so soon after it that the owner wrote."""
    earliest_write = max(beat.mtime_ns, beat.time_ns - _MTIME_STEP_NS)
    if beat.boot_id == now.boot_id:
        is_unwritten = image.mtime_ns == beat.mtime_ns
        latest_write = beat.time_ns + _BEAT_GRACE_NS
        if _was_set_back(beat, now):
            return is_unwritten
    else:
        is_unwritten = 0 <= beat.mtime_ns - image.mtime_ns <= _POWER_CUT_GRACE_NS
        latest_write = beat.time_ns + _POWER_CUT_GRACE_NS
        if image.mtime_ns > now.boot_time_ns:
            return False
    return is_unwritten or earliest_write <= image.mtime_ns <= latest_write


def _was_set_back(beat: Beat, now: Moment) -> bool:
    """Whether the clock was set back since the sign of life, in the same boot: then times after it came twice."""
    if not beat.awake_ns:
        return False
    return (now.awake_ns - beat.awake_ns) - (now.time_ns - beat.time_ns) > _SLEWED_NS


# --- block devices ---


def _exchange(before: ImageIdentity, image: ImageIdentity) -> str | None:
    """Return why this is another block device than before, or another one is behind it."""
    if before.trace is None or image.trace is None:
        return _UNCOUNTED
    if image.trace.label != before.trace.label:
        return f"the block device is {_named(image.trace)} now, and {_named(before.trace)} was tracked under its number"
    if _same_boot(before, image) and (
        image.trace.disk_sequence != before.trace.disk_sequence or _sectors(image) < _sectors(before)
    ):
        return _MADE_ANEW
    return None


def _device_gap_since_detach(
    before: ImageIdentity, image: ImageIdentity, beat: Beat | None, now: Moment
) -> str | None:
    if not _same_boot(before, image):
        return _gap_since_boot(image, beat, now)
    written = _sectors(image) - _sectors(before)
    return (
        f"{_amount(written)} of the block device were written while it was not tracked" if written else None
    )


def _device_gap_since_sign_of_life(
    begun: ImageIdentity, image: ImageIdentity, beat: Beat | None, now: Moment
) -> str | None:
    if not _same_boot(begun, image):
        return _gap_since_boot(image, beat, now)
    if _sectors(image) == _sectors(begun):
        return None
    if beat is None or beat.boot_id != now.boot_id:
        return _NO_BEAT
    written, ages_ns = _sectors(image) - beat.sectors_written, _ages_ns(beat, now)
    if written < 0:
        return _MADE_ANEW
    if written == 0 or all(0 <= age_ns <= _RESTART_GRACE_NS for age_ns in ages_ns):
        return _other_store(beat, now)
    return (
        f"{_amount(written)} of the block device were written since its owner's last sign of life,"
        f" {ages_ns[0] // _SECOND_NS} s ago, and it is not known by which program"
    )


def _ages_ns(beat: Beat, now: Moment) -> list[int]:
    """Return how old the sign of life of this boot is, by each clock: the first cannot be set, if it is known."""
    by_clock = now.time_ns - beat.time_ns
    return [now.awake_ns - beat.awake_ns, by_clock] if beat.awake_ns else [by_clock]


def _gap_since_boot(image: ImageIdentity, beat: Beat | None, now: Moment) -> str | None:
    """Apply the column 'after a restart of the machine' for a block device, after a clean detach too."""
    if _sectors(image):
        return (
            f"{_amount(_sectors(image))} of the block device were written since this machine was started,"
            " while it was not tracked"
        )
    return _other_store(beat, now)


def _same_boot(before: ImageIdentity, image: ImageIdentity) -> bool:
    return (
        before.trace is not None and image.trace is not None and before.trace.boot_id == image.trace.boot_id
    )


def _sectors(image: ImageIdentity) -> int:
    return image.last_change[1]


def _amount(sectors: int) -> str:
    return f"{sectors * _SECTOR_BYTES} bytes"


def _named(trace: DeviceTrace) -> str:
    return repr(trace.label) if trace.label else "one without a name"
