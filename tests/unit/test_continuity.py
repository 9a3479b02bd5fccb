"""Every verdict on an image that was out of our hands, or is in somebody's."""

from __future__ import annotations

import dataclasses
from typing import TypeAlias
from uuid import UUID

import pytest

from lmdbitmap.continuity import Moment, Verdict, judge, judge_held
from lmdbitmap.interfaces import ImageIdentity
from lmdbitmap.owner import Beat
from lmdbitmap.schema import DEFERRED, GUEST_FIRST, WRITE_AHEAD, Disk

S = 1_000_000_000
MIB = 1 << 20
THIS_BOOT, EARLIER_BOOT = "this boot", "an earlier boot"
BOOT_TIME = 1000 * S
NOW = Moment(THIS_BOOT, BOOT_TIME)
SESSION = UUID(int=7)

LEFT = ImageIdentity(device=1, inode=2, size=MIB, mtime_ns=2000 * S)
"""The image as it was at a clean detach, or when the session began."""
BLOCK_DEVICE = ImageIdentity(device=1, inode=0, size=MIB, mtime_ns=0)


def disk(**changes: object) -> Disk:
    plain = Disk(
        uuid=UUID(int=1), name="sda", image="/sda.raw", size=MIB, granularity_bits=16, epoch=UUID(int=2),
        epoch_number=1, epoch_reason="", durability=WRITE_AHEAD, policy=GUEST_FIRST, created_ns=0,
        next_sequence=2, identity=LEFT,
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


def at(mtime_s: float, **changes: int) -> ImageIdentity:
    return LEFT._replace(mtime_ns=int(mtime_s * S), **changes)


def beat(time_s: float, mtime_s: float, boot: str = THIS_BOOT) -> Beat:
    return Beat(boot, int(time_s * S), int(mtime_s * S))


# --- after a clean detach ---


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (LEFT, None),
        (at(2000.000000001), "written"),
        (at(1999), "written"),
        (LEFT._replace(size=MIB + 1), "size"),
        (LEFT._replace(size=0), "size"),
        (LEFT._replace(inode=3), "another file"),
        (LEFT._replace(device=3), "another file"),
    ],
)
@pytest.mark.parametrize("durability", [WRITE_AHEAD, DEFERRED])
@pytest.mark.parametrize("judge", [judge, judge_held])
def test_after_a_clean_detach_nothing_may_differ(
    judge: object, durability: str, image: ImageIdentity, said: str | None
) -> None:
    assert callable(judge)
    verdict = judge(disk(durability=durability), image, None, NOW)
    assert (verdict.broken is None) == (said is None)
    assert said is None or said in verdict.broken
    assert verdict.superset is None


def test_image_that_was_never_seen_cannot_be_trusted() -> None:
    for session in (None, SESSION):
        assert "never" in str(judge(disk(identity=None, session=session), LEFT, None, NOW).broken)


def test_block_device_shows_its_number_and_size_only() -> None:
    tracked = disk(identity=BLOCK_DEVICE)
    assert judge(tracked, BLOCK_DEVICE, None, NOW) == Verdict()
    assert judge(tracked, BLOCK_DEVICE._replace(device=9), None, NOW).broken
    assert judge(tracked, BLOCK_DEVICE._replace(size=512), None, NOW).broken


# --- after a crash, and while somebody holds the disk ---

Case: TypeAlias = tuple[ImageIdentity, "Beat | None", bool]

SAME_BOOT: list[Case] = [
    # image, beat, holds
    (at(2010), beat(2010, 2010), True),
    (at(2012), beat(2010, 2010), True),  # written within the grace after the last beat
    (at(2012.1), beat(2010, 2010), False),  # and later
    (at(2005), beat(2010, 2005), True),  # idle when it died
    (at(2005), beat(2010, 2006), False),  # replaced by an older one
    (at(2500), beat(2010, 2500), True),  # the clock was set back while it was attached
    (at(2501), beat(2010, 2500), False),
    (at(2010), None, False),
    (at(2010, size=MIB + 1), beat(2010, 2010), False),
    (at(2010, inode=3), beat(2010, 2010), False),
    (LEFT, None, True),  # nobody wrote since the session began, and its first beat never came
    (LEFT, beat(1000, 900), True),  # the last beat is of the session before
    (LEFT, beat(2010, 2008), False),  # an older image, put back
    (at(2001), beat(1000, 900), False),  # written after the session began, and nobody vouched for it
    (at(2001), None, False),
]
AFTER_A_POWER_CUT: list[Case] = [
    (at(900), beat(900, 900, EARLIER_BOOT), True),
    (at(955), beat(900, 900, EARLIER_BOOT), True),  # the beat's last seconds are missing from the disk
    (at(961), beat(900, 900, EARLIER_BOOT), False),
    (at(845), beat(900, 900, EARLIER_BOOT), True),  # the image's are
    (at(839), beat(900, 900, EARLIER_BOOT), False),
    (at(1001), beat(999, 999, EARLIER_BOOT), False),  # written in this boot, when nobody was attached
]


@pytest.mark.parametrize(("image", "last_beat", "holds"), SAME_BOOT + AFTER_A_POWER_CUT)
def test_image_must_be_what_the_last_sign_of_life_vouches_for(
    image: ImageIdentity, last_beat: Beat | None, holds: bool
) -> None:
    tracked = disk(session=SESSION)
    for verdict, holding in (
        (judge(tracked, image, last_beat, NOW), "after a crash"),
        (judge_held(tracked, image, last_beat, NOW), "held"),
    ):
        assert (verdict.broken is None) == holds
        assert (verdict.superset is not None) == (holds and holding == "after a crash")


@pytest.mark.parametrize(
    ("last_beat", "holds"), [(beat(2010, 0), True), (beat(900, 0, EARLIER_BOOT), True), (None, False)]
)
def test_crash_on_a_block_device_is_believed_if_there_was_a_beat(last_beat: Beat | None, holds: bool) -> None:
    verdict = judge(disk(session=SESSION, identity=BLOCK_DEVICE), BLOCK_DEVICE, last_beat, NOW)
    assert (verdict.broken is None) == holds


@pytest.mark.parametrize("size", [MIB, 2 * MIB])
def test_either_size_is_right_while_a_resize_is_under_way(size: int) -> None:
    resizing = disk(session=SESSION, size=2 * MIB, resizing_from=MIB)
    assert judge(resizing, at(2010, size=size), beat(2010, 2010), NOW).broken is None
    assert judge(resizing, at(2010, size=3 * MIB), beat(2010, 2010), NOW).broken


def test_deferred_bits_do_not_survive_a_crash_and_live_while_their_owner_does() -> None:
    attached = disk(session=SESSION, durability=DEFERRED)
    assert "deferred" in str(judge(attached, LEFT, beat(2010, 2000), NOW).broken)
    assert judge_held(attached, at(2010), beat(2010, 2010), NOW) == Verdict()
