"""Every verdict on an image that was out of our hands, or is in somebody's."""

from __future__ import annotations

import dataclasses
from typing import TypeAlias
from uuid import UUID

import pytest

from lmdbitmap.interfaces import DeviceTrace, ImageIdentity, StoreMark
from lmdbitmap.storage.owner_file import Beat
from lmdbitmap.storage.schema import DEFERRED, GUEST_FIRST, WRITE_AHEAD, Disk
from lmdbitmap.tracker.continuity import Moment, Verdict, judge, judge_held

S = 1_000_000_000
MIB = 1 << 20
THIS_BOOT, EARLIER_BOOT = "this boot", "an earlier boot"
BOOT_TIME = 1000 * S
STORE = StoreMark(inode=5, transaction=100, born_ns=7)
NOW = Moment(THIS_BOOT, BOOT_TIME, 2020 * S, STORE, awake_ns=1020 * S)
SESSION = UUID(int=7)

LEFT = ImageIdentity(device=1, inode=2, size=MIB, mtime_ns=2000 * S)
"""The image as it was at a clean detach, or when the session began."""
BLOCK_DEVICE = ImageIdentity(1, 0, MIB, 0, DeviceTrace(THIS_BOOT, 40, 1000, "vol-1"))
"""The same of a block device: 1000 sectors were written."""
BEFORE_BOOT = BLOCK_DEVICE._replace(trace=DeviceTrace(EARLIER_BOOT, 70, 90000, "vol-1"))


def disk(**changes: object) -> Disk:
    plain = Disk(
        uuid=UUID(int=1), name="sda", image="/sda.raw", size=MIB, granularity_bits=16, epoch=UUID(int=2),
        epoch_number=1, epoch_reason="", durability=WRITE_AHEAD, policy=GUEST_FIRST, created_ns=0,
        next_sequence=2, identity=LEFT,
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


def at(mtime_s: float, **changes: int) -> ImageIdentity:
    return LEFT._replace(mtime_ns=int(mtime_s * S), **changes)  # type: ignore[arg-type]


def beat(time_s: float, mtime_s: float, boot: str = THIS_BOOT, store: StoreMark = STORE) -> Beat:
    return Beat(boot, int(time_s * S), int(mtime_s * S), store=store, session=SESSION)


def device(**changes: object) -> ImageIdentity:
    """The block device as it is now."""
    assert BLOCK_DEVICE.trace is not None
    return BLOCK_DEVICE._replace(trace=BLOCK_DEVICE.trace._replace(**changes))  # type: ignore[arg-type]


def device_beat(sectors: int, time_s: float = 2010, boot: str = THIS_BOOT, store: StoreMark = STORE) -> Beat:
    return Beat(boot, int(time_s * S), 0, sectors, store, session=SESSION)


# --- after a clean detach ---


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (LEFT, None),
        (at(2000.000000001), "written"),
        (at(1999), "went back"),
        (at(0), "went back"),
        (at(9e9), "written"),
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
    (at(2010.3), beat(2010, 2500), False),  # it was set back just now
    (at(2007.9), beat(2010, 2005), False),  # written under a clock that was set back since the owner died
    (at(2008), beat(2010, 2005), True),  # or by the owner, on a file system whose clock goes in steps
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
    (at(640), beat(900, 700, EARLIER_BOOT), True),
    (at(800), beat(900, 700, EARLIER_BOOT), False),  # neither before the last beat nor after it
    (at(899), beat(900, 700, EARLIER_BOOT), True),
    (at(1001), beat(999, 999, EARLIER_BOOT), False),  # written in this boot, when nobody was attached
]


@pytest.mark.usefixtures("exact_grace")
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


@pytest.mark.parametrize("size", [MIB, 2 * MIB])
def test_either_size_is_right_while_a_resize_is_under_way(size: int) -> None:
    resizing = disk(session=SESSION, size=2 * MIB, resizing_from=MIB)
    assert judge(resizing, at(2010, size=size), beat(2010, 2010), NOW).broken is None
    assert judge(resizing, at(2010, size=3 * MIB), beat(2010, 2010), NOW).broken


def test_deferred_bits_do_not_survive_a_crash_and_live_while_their_owner_does() -> None:
    attached = disk(session=SESSION, durability=DEFERRED)
    assert "deferred" in str(judge(attached, LEFT, beat(2010, 2000), NOW).broken)
    assert judge_held(attached, at(2010), beat(2010, 2010), NOW) == Verdict()


@pytest.mark.parametrize(
    ("image", "last_beat", "said"),
    [
        (at(2010), beat(2010, 2010, store=StoreMark(6, 100)), "put back from a copy, or moved"),
        (at(2010), beat(2010, 2010, store=StoreMark(5, 100, born_ns=8)), "put back from a copy, or moved"),
        (at(2010), beat(2010, 2010, store=StoreMark(5, 100, born_ns=7)), None),
        (LEFT, beat(2010, 2000, store=StoreMark(6, 100)), None),  # moved, and nothing is missing
        (at(2010), beat(2010, 2010, store=StoreMark(5, 99)), None),
        (at(2010), beat(2010, 2010, store=StoreMark(5, 101)), "put back from a copy"),
        (LEFT, beat(2010, 2000, store=StoreMark(5, 101)), "put back from a copy"),
    ],
)
def test_store_that_has_seen_less_than_its_owner_knows_nothing(
    image: ImageIdentity, last_beat: Beat, said: str | None
) -> None:
    verdict = judge(disk(session=SESSION), image, last_beat, NOW)
    assert (said is None and verdict.broken is None) or str(said) in str(verdict.broken)
    assert (
        judge(disk(), LEFT, last_beat, NOW) == Verdict()
    )  # after a clean detach the image itself says enough


# --- block devices ---


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (device(), None),
        (
            device(sectors_written=1008),
            "4096 bytes of the block device were written while it was not tracked",
        ),
        (device(disk_sequence=41), "made anew"),
        (device(sectors_written=992), "made anew"),
        (device(label="vol-2"), "is 'vol-2' now, and 'vol-1' was tracked"),
        (device(label=""), "is one without a name now"),
        (BLOCK_DEVICE._replace(device=9), "another block device"),
        (BLOCK_DEVICE._replace(size=512), "size"),
        (BLOCK_DEVICE._replace(trace=None), "the kernel does not tell"),
        (LEFT, "another file"),
    ],
)
@pytest.mark.parametrize("judge", [judge, judge_held])
def test_block_device_may_not_have_been_written_since_a_clean_detach(
    judge: object, image: ImageIdentity, said: str | None
) -> None:
    assert callable(judge)
    broken = judge(disk(identity=BLOCK_DEVICE), image, None, NOW).broken
    assert (said is None and broken is None) or str(said) in str(broken)


def test_block_device_that_nobody_counted_then_is_not_trusted() -> None:
    """As the store of an older version describes it."""
    uncounted = BLOCK_DEVICE._replace(trace=None)
    for session in (None, SESSION):
        assert "does not tell" in str(
            judge(disk(identity=uncounted, session=session), device(), None, NOW).broken
        )


@pytest.mark.parametrize(
    ("image", "last_beat", "said"),
    [
        (device(), None, None),  # nobody wrote since the session began
        (device(sectors_written=1008), None, "cannot be read"),
        (device(sectors_written=1008), device_beat(1000, boot=EARLIER_BOOT), "cannot be read"),
        (device(sectors_written=1008), device_beat(1008, 100), None),  # all had reached the device by then
        (device(sectors_written=1008), device_beat(1000, 2010), None),  # its owner is started again at once
        (device(sectors_written=1008), device_beat(1000, 1960), None),
        (
            device(sectors_written=1008),
            device_beat(1000, 1959),
            "61 s ago, and it is not known by which program",
        ),
        (
            device(sectors_written=1008),
            device_beat(1000, 2021),
            "it is not known by which program",
        ),  # the clock was set back
        (device(sectors_written=1008), device_beat(2000, 2010), "made anew"),
        (device(disk_sequence=41), device_beat(1000), "made anew"),
        (device(label="vol-2"), device_beat(1000), "'vol-2'"),
        (device(sectors_written=1008), device_beat(1008, store=StoreMark(5, 101)), "put back from a copy"),
        (device(sectors_written=1008), device_beat(1008, store=StoreMark(6, 100)), "put back from a copy"),
        (device(sectors_written=1008), device_beat(1000, store=StoreMark(6, 100)), "put back from a copy"),
        (device(), device_beat(1000, store=StoreMark(6, 100)), None),
        (BLOCK_DEVICE._replace(trace=None), device_beat(1000), "does not tell"),
    ],
)
def test_crash_on_a_block_device_is_believed_if_nothing_or_its_restarted_owner_wrote(
    image: ImageIdentity, last_beat: Beat | None, said: str | None
) -> None:
    tracked = disk(session=SESSION, identity=BLOCK_DEVICE)
    for verdict in (judge(tracked, image, last_beat, NOW), judge_held(tracked, image, last_beat, NOW)):
        assert (said is None and verdict.broken is None) or str(said) in str(verdict.broken)


@pytest.mark.parametrize("session", [None, SESSION])
@pytest.mark.parametrize(
    ("image", "last_beat", "said"),
    [
        (device(sectors_written=0), device_beat(90000, 900, EARLIER_BOOT), None),
        (device(sectors_written=8), device_beat(90000, 900, EARLIER_BOOT), "since this machine was started"),
        (device(sectors_written=0, label="vol-2"), device_beat(90000, 900, EARLIER_BOOT), "'vol-2'"),
        (device(sectors_written=0), None, "cannot be read"),
        (
            device(sectors_written=0),
            device_beat(9, 900, EARLIER_BOOT, StoreMark(6, 100)),
            "put back from a copy",
        ),
        (
            device(sectors_written=0),
            device_beat(9, 900, EARLIER_BOOT, StoreMark(5, 101)),
            "put back from a copy",
        ),
    ],
)
def test_block_device_after_a_reboot_must_be_unwritten_in_this_boot(
    session: UUID | None, image: ImageIdentity, last_beat: Beat | None, said: str | None
) -> None:
    broken = judge(disk(identity=BEFORE_BOOT, session=session), image, last_beat, NOW).broken
    assert (said is None and broken is None) or str(said) in str(broken)


# --- images behind an NBD server ---

FAR = ImageIdentity(8, 9, MIB, 0)


@pytest.mark.parametrize(
    ("image", "last_beat", "in_its_session", "in_another", "not_known"),
    [
        (at(2010), beat(2010, 2010), True, False, True),  # an older version's, but the mtime tells
        (LEFT, beat(2010, 2000), True, True, True),  # unwritten since the session began
        (LEFT, beat(2010, 2008), False, False, False),  # an older image, put back with it
        (FAR, beat(2010, 0), True, False, False),
        (device(sectors_written=1008), device_beat(1008), True, False, False),
        (device(), device_beat(1000), True, True, True),
    ],
)
def test_sign_of_life_of_a_session_before_tells_nothing_of_the_last_one(
    image: ImageIdentity, last_beat: Beat, *, in_its_session: bool, in_another: bool, not_known: bool
) -> None:
    """An owner's file that was put back from a copy may lack distrust."""
    begun = {FAR: FAR, LEFT._replace(mtime_ns=image.mtime_ns): LEFT}.get(image, BLOCK_DEVICE)
    tracked = disk(identity=begun, session=SESSION)
    for session, holds in ((SESSION, in_its_session), (UUID(int=8), in_another), (None, not_known)):
        given = last_beat._replace(session=session)
        for each in (judge, judge_held):
            assert (each(tracked, image, given, NOW).broken is None) == holds


@pytest.mark.parametrize("session", [None, SESSION])
@pytest.mark.parametrize(
    ("store", "said"),
    [
        (STORE, None),
        (StoreMark(5, 99), None),
        (StoreMark(6, 100), "put back from a copy, or moved"),
        (StoreMark(5, 100, born_ns=8), "put back from a copy, or moved"),
        (StoreMark(5, 101), "put back from a copy"),
    ],
)
def test_far_image_shows_nothing_so_the_store_must_be_the_very_same(
    session: UUID | None, store: StoreMark, said: str | None
) -> None:
    tracked = disk(identity=FAR, session=session, next_sequence=3)
    broken = judge(tracked, FAR, beat(2010, 0, store=store), NOW).broken
    assert (said is None and broken is None) or str(said) in str(broken)


def test_far_image_lacks_no_sign_of_life_until_something_of_it_is_clean() -> None:
    """Until there is a second checkpoint nobody may have had it. Later, its owner's file was put back."""
    assert judge(disk(identity=FAR, next_sequence=2), FAR, None, NOW) == Verdict()
    assert "cannot be read" in str(judge(disk(identity=FAR, next_sequence=3), FAR, None, NOW).broken)


# --- the clock ---


@pytest.mark.parametrize(
    ("awake_s", "holds"),
    [(1010, True), (960, True), (959, False), (410, False), (1021, False), (0, True)],
    ids=["right", "a minute", "more", "set back by ten minutes", "impossible", "unknown"],
)
def test_clock_that_was_set_back_makes_no_owner_of_a_block_device_restarted_at_once(
    awake_s: int, holds: bool
) -> None:
    """By the clock ten seconds have passed."""
    last_beat = device_beat(1000, 2010)._replace(awake_ns=awake_s * S)
    tracked = disk(session=SESSION, identity=BLOCK_DEVICE)
    assert (judge(tracked, device(sectors_written=1008), last_beat, NOW).broken is None) == holds


@pytest.mark.parametrize(
    ("image", "awake_s", "holds"),
    [
        (at(2011), 1010, True),
        (at(2011), 1009, True),
        (at(2011), 1007, False),
        (at(2009), 1007, True),
        (at(2011), 1600, True),
        (at(2011), 0, True),
    ],
    ids=["right", "a little slow", "set back", "set back, unwritten", "set forward", "unknown"],
)
def test_what_was_written_after_the_clock_was_set_back_is_not_taken_for_the_owners(
    image: ImageIdentity, awake_s: int, holds: bool
) -> None:
    last_beat = beat(2010, 2009)._replace(awake_ns=awake_s * S)
    assert (judge(disk(session=SESSION), image, last_beat, NOW).broken is None) == holds
