"""Room for newly armed extents: what is disarmed or left out, and that it is no more than the limits ask for."""

from __future__ import annotations

from unittest import mock

from hypothesis import given
from hypothesis import strategies as st

from lmdbitmap.geometry import REGION_EXTENTS
from lmdbitmap.tracker import arming
from lmdbitmap.tracker.armed import ArmedExtents
from lmdbitmap.tracker.masks import extents_of
from tests.property.test_armed import dirt_of

REGIONS = 6
DIRT = dirt_of(REGIONS, lambda region, extent: True)

Extent = tuple[int, int]
masks = st.one_of(
    st.just(0), st.integers(1, 31), st.sampled_from([1 << REGION_EXTENTS - 1, (1 << REGION_EXTENTS) - 1])
)
wishes = st.dictionaries(st.integers(0, REGIONS - 1), masks, max_size=4)


def extents(found: dict[int, int]) -> set[Extent]:
    return {(region, extent) for region, mask in found.items() for extent in extents_of(mask)}


def armed_by_region(armed: ArmedExtents) -> dict[int, int]:
    return {region: armed.mask(region) for region in range(REGIONS)}


def regions_of(found: set[Extent]) -> set[int]:
    return {region for region, _ in found}


@given(most=st.integers(0, 200), most_regions=st.integers(1, 5), commits=st.lists(wishes, max_size=20))
def test_limits_hold_and_nothing_goes_without_need(
    most: int, most_regions: int, commits: list[dict[int, int]]
) -> None:
    armed = ArmedExtents(most, DIRT)
    with mock.patch.object(arming, "MOST_REGIONS", most_regions):
        for wish in commits:
            left = {region: mask & ~armed.mask(region) for region, mask in wish.items()}
            before, wanted = extents(armed_by_region(armed)), extents(left)
            disarmed = arming.make_room(armed, left)
            after, granted = extents(armed_by_region(armed)), extents(left)

            assert granted <= wanted
            assert after <= before
            assert len(after) + len(granted) <= most
            assert len(regions_of(after | granted)) <= most_regions
            assert regions_of(before - after) <= disarmed | wish.keys(), "their records are written"
            if len(before | wanted) <= most and len(regions_of(before | wanted)) <= most_regions:
                assert (after, granted, disarmed) == (before, wanted, set())
            if granted < wanted:
                assert not after, "what is armed goes before what is to be armed"
            for region, mask in left.items():
                armed.arm(region, mask)
            armed.end_pass()


@given(quiet=st.permutations(range(REGIONS)), most_regions=st.integers(1, REGIONS))
def test_of_too_many_regions_the_quietest_go_whole(quiet: list[int], most_regions: int) -> None:
    armed = ArmedExtents(1000, DIRT)
    for region in quiet[:-1]:
        armed.arm(region, 0b111)
        armed.end_pass()
    with mock.patch.object(arming, "MOST_REGIONS", most_regions):
        gone = arming.make_room(armed, {quiet[-1]: 1})
    assert gone == set(quiet[: REGIONS - most_regions])
    assert armed.regions == set(quiet[REGIONS - most_regions : -1])
