"""Stand-alone bitmaps: kept under a name, combined by the rules of sets, and never in the unsafe direction."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from uuid import UUID

import pytest

from lmdbitmap.errors import AlreadyExists, Busy, InvalidArgument, LmdbitmapError, NotFound, Untrusted
from lmdbitmap.extents import Trust
from lmdbitmap.geometry import MAX_SIZE, REGION_BLOCKS, Geometry
from lmdbitmap.storage.lmdb_errors import FullMapError
from lmdbitmap.storage.schema import ALL_DIRTY_BITS, Bitmap
from lmdbitmap.store import Store, Writer
from lmdbitmap.tracker import standalone
from lmdbitmap.tracker.slices import SLICE_REGIONS
from lmdbitmap.tracker.standalone import Operation, Origin
from tests.helpers.tracked import NAME, TrackedDisk, quick_folder

GEOMETRY = Geometry((3 * REGION_BLOCKS - 100) * 4096 - 7, 12)
LAST = GEOMETRY.block_count - 1
A, B = {0, 1, 5, REGION_BLOCKS - 1, REGION_BLOCKS, LAST}, {1, 2, REGION_BLOCKS, 2 * REGION_BLOCKS, LAST}
SET_OPERATIONS: dict[Operation, Callable[[set[int], set[int]], set[int]]] = {
    Operation.OR: lambda left, right: left | right,
    Operation.AND: lambda left, right: left & right,
    Operation.AND_NOT: lambda left, right: left - right,
    Operation.XOR: lambda left, right: left ^ right,
}
ORIGIN = Origin(UUID(int=1), UUID(int=2), UUID(int=3), UUID(int=4), 5)


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory: these tests commit often."""
    with quick_folder() as folder:
        yield folder


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.create(str(tmp_path / "store")) as store:
        yield store


def keep(
    store: Store,
    name: str,
    blocks: Iterable[int] = (),
    geometry: Geometry = GEOMETRY,
    *,
    origin: Origin = standalone.NO_ORIGIN,
    superset: str | None = None,
    all_dirty: str | None = None,
) -> Bitmap:
    runs = [(block, block + 1) for block in sorted(blocks)]

    def change(writer: Writer) -> Bitmap:
        dirt = standalone.dirt_of_runs(runs, geometry)
        return standalone.create(
            writer, name, geometry, dirt, origin=origin, superset=superset, all_dirty=all_dirty
        )

    return store.update(change)


def combine(store: Store, target: str, operation: Operation, *sources: str) -> Bitmap:
    return standalone.combine(store, target, operation, sources)


def bitmap_of(store: Store, name: str) -> Bitmap:
    with store.read() as reader:
        return standalone.find(reader, name)


def blocks_of(store: Store, name: str) -> set[int]:
    runs = standalone.runs(store, bitmap_of(store, name))
    return {block for run in runs for block in range(*run)}


def damage(store: Store, name: str, region: int = 0) -> None:
    bitmap = bitmap_of(store, name)
    store.update(lambda writer: writer._put("regions", _key(bitmap.id, region), b"\xff" * 100))


def _key(bitmap_id: int, region: int) -> bytes:
    return bitmap_id.to_bytes(8, "big") + region.to_bytes(8, "big")


def contents(store: Store) -> list[tuple[str | None, set[int], Bitmap]]:
    """Everything that a refused operation must leave as it was."""
    with store.read() as reader:
        bitmaps = reader.bitmaps()
    return [(bitmap.name, blocks_of(store, bitmap.name or ""), bitmap) for bitmap in bitmaps]


# --- kept, listed, removed ---


def test_what_is_kept_is_found_by_name_with_its_blocks_and_its_origin(store: Store) -> None:
    kept = keep(store, "monday", A, origin=ORIGIN)
    assert bitmap_of(store, "monday") == kept
    assert blocks_of(store, "monday") == A
    assert (kept.size, kept.granularity_bits) == (GEOMETRY.size, 12)
    assert (kept.origin_disk, kept.origin_epoch, kept.origin_since, kept.origin_until) == ORIGIN[:4]
    assert standalone.trust(kept) is Trust.EXACT


def test_bitmaps_are_listed_by_name_and_those_of_checkpoints_are_not(tmp_path: Path) -> None:
    with closing(TrackedDisk(tmp_path, 1 << 20)) as tracked:
        keep(tracked.store, "b")
        keep(tracked.store, "a")
        with tracked.store.read() as reader:
            assert [bitmap.name for bitmap in reader.bitmaps()] == ["a", "b"]


def test_a_bitmap_without_blocks_is_all_clean(store: Store) -> None:
    keep(store, "empty")
    assert list(standalone.slices(store, bitmap_of(store, "empty"))) == []


def test_an_all_dirty_bitmap_ends_with_its_disk(store: Store) -> None:
    keep(store, "unknown", all_dirty="nobody knows")
    assert blocks_of(store, "unknown") == set(range(GEOMETRY.block_count))
    assert standalone.trust(bitmap_of(store, "unknown")) is Trust.SUPERSET


def test_a_name_is_given_once_to_disks_and_bitmaps_together(tmp_path: Path) -> None:
    with closing(TrackedDisk(tmp_path, 1 << 20)) as tracked:
        keep(tracked.store, "monday", A)
        for name in (NAME, "monday"):
            with pytest.raises(AlreadyExists, match=name):
                keep(tracked.store, name, B)
        assert blocks_of(tracked.store, "monday") == A


@pytest.mark.parametrize("name", ["", "x" * 1024, "new\nline", "\udc80"])
def test_a_name_that_is_none_is_refused(store: Store, name: str) -> None:
    with pytest.raises(InvalidArgument, match="bitmap name"):
        keep(store, name)


def test_a_removed_bitmap_leaves_nothing_and_its_name_is_free(store: Store) -> None:
    gone = keep(store, "monday", A)
    keep(store, "other", B)
    store.update(lambda writer: standalone.remove(writer, "monday"))
    with pytest.raises(NotFound, match="monday"):
        bitmap_of(store, "monday")
    with store.read() as reader:
        assert list(reader.regions(gone.id)) == []
    keep(store, "monday", B)
    assert blocks_of(store, "monday") == blocks_of(store, "other") == B


@pytest.mark.parametrize(
    "runs", [[(0, GEOMETRY.block_count + 1)], [(5, 6), (4, 5)], [(5, 7), (6, 8)], [(3, 2)]]
)
def test_runs_that_are_not_sorted_on_the_disk_are_refused(runs: list[tuple[int, int]]) -> None:
    with pytest.raises(InvalidArgument):
        list(standalone.dirt_of_runs(runs, GEOMETRY))


def test_a_long_run_becomes_whole_regions() -> None:
    dirt = dict(standalone.dirt_of_runs([(1, GEOMETRY.block_count)], GEOMETRY))
    assert list(dirt) == [0, 1, 2]
    assert dirt[1] == ALL_DIRTY_BITS


def test_a_bitmap_that_is_changed_or_removed_while_it_is_read_is_not_read_on(store: Store) -> None:
    far = Geometry(1 << 40, 12)
    blocks = {0, (SLICE_REGIONS + 1) * REGION_BLOCKS}
    keep(store, "b", blocks, far)
    for change, refusal in (
        (lambda: combine(store, "a", Operation.XOR, "b"), Busy),
        (lambda: store.update(lambda writer: standalone.remove(writer, "a")), NotFound),
    ):
        keep(store, "a", blocks, far)
        slices = standalone.slices(store, bitmap_of(store, "a"))
        next(slices)
        change()
        with pytest.raises(refusal):
            next(slices)
        if refusal is Busy:
            store.update(lambda writer: standalone.remove(writer, "a"))


# --- combined ---


@pytest.mark.parametrize("operation", Operation)
def test_bitmaps_are_combined_as_sets_are(store: Store, operation: Operation) -> None:
    before = keep(store, "a", A)
    keep(store, "b", B)
    after = combine(store, "a", operation, "b")
    assert blocks_of(store, "a") == SET_OPERATIONS[operation](A, B)
    assert blocks_of(store, "b") == B
    assert standalone.trust(after) is Trust.EXACT
    assert after.uuid != before.uuid
    with store.read() as reader:
        assert after.id == before.id or list(reader.regions(before.id)) == []


@pytest.mark.parametrize("operation", Operation)
def test_several_sources_come_one_after_the_other(store: Store, operation: Operation) -> None:
    sets = {"a": A, "b": B, "c": {1, 2, 3}}
    for name, blocks in sets.items():
        keep(store, name, blocks)
    combine(store, "a", operation, "b", "c")
    step = SET_OPERATIONS[operation]
    assert blocks_of(store, "a") == step(step(A, B), sets["c"])


@pytest.mark.parametrize("operation", Operation)
@pytest.mark.parametrize("others", [["a"], ["b", "a"]])
def test_no_bitmap_changes_while_it_is_put_to_itself(
    store: Store, operation: Operation, others: list[str]
) -> None:
    keep(store, "a", A)
    keep(store, "b", B)
    before = contents(store)
    with pytest.raises(
        InvalidArgument, match=r"'a' would be combined with itself.*; do not name it .* under another name"
    ):
        combine(store, "a", operation, *others)
    assert contents(store) == before


def test_what_is_combined_forgets_from_where_to_where_but_may_still_be_of_one_disk(store: Store) -> None:
    keep(store, "a", A, origin=ORIGIN)
    keep(store, "b", B, origin=ORIGIN._replace(since=UUID(int=9)))
    keep(store, "c", B, origin=ORIGIN._replace(disk=UUID(int=9)))
    one_disk = combine(store, "a", Operation.OR, "b")
    assert (one_disk.origin_disk, one_disk.origin_since, one_disk.origin_time_ns) == (ORIGIN.disk, None, 0)
    assert combine(store, "a", Operation.OR, "c").origin_disk is None


LOOSE = {"exact": (None, None), "superset": ("because", None), "all dirty": (None, "because")}
"""(superset, all_dirty) of a bitmap."""
REFUSED = {
    Operation.AND_NOT: {(left, right) for left in LOOSE for right in LOOSE}
    - {("exact", "exact"), ("superset", "exact")},
    Operation.XOR: {(left, right) for left in LOOSE for right in LOOSE} - {("exact", "exact")},
}


@pytest.mark.parametrize("right", LOOSE)
@pytest.mark.parametrize("left", LOOSE)
@pytest.mark.parametrize("operation", Operation)
def test_no_combination_hides_what_may_have_changed(
    store: Store, operation: Operation, left: str, right: str
) -> None:
    for name, blocks, (superset, all_dirty) in (("a", A, LOOSE[left]), ("b", B, LOOSE[right])):
        keep(store, name, blocks, superset=superset, all_dirty=all_dirty)
    if (left, right) in REFUSED.get(operation, set()):
        before = contents(store)
        with pytest.raises(Untrusted, match="could hide changes"):
            combine(store, "a", operation, "b")
        assert contents(store) == before
        return
    known = {name: blocks_of(store, name) for name in ("a", "b")}
    after = combine(store, "a", operation, "b")
    answer = blocks_of(store, "a")
    assert answer == SET_OPERATIONS[operation](known["a"], known["b"])
    assert standalone.trust(after) is (Trust.EXACT if left == right == "exact" else Trust.SUPERSET)


@pytest.mark.parametrize("operation", [Operation.OR, Operation.AND])
def test_a_damaged_record_is_all_dirty_and_its_heir_is_a_superset(store: Store, operation: Operation) -> None:
    keep(store, "a", A)
    keep(store, "b", B)
    damage(store, "b")
    after = combine(store, "a", operation, "b")
    whole_region = set(range(REGION_BLOCKS)) | B
    assert blocks_of(store, "a") == SET_OPERATIONS[operation](A, whole_region)
    assert after.superset is not None


@pytest.mark.parametrize("operation", [Operation.AND_NOT, Operation.XOR])
def test_what_is_damaged_is_taken_away_from_nothing(store: Store, operation: Operation) -> None:
    keep(store, "a", A)
    keep(store, "b", B)
    damage(store, "b")
    with pytest.raises(Untrusted, match="damaged"):
        combine(store, "a", operation, "b")
    assert blocks_of(store, "a") == A


@pytest.mark.parametrize("operation", Operation)
def test_disks_of_two_sizes_are_refused_with_both_sizes(store: Store, operation: Operation) -> None:
    keep(store, "a", {0}, Geometry(8192, 12))
    keep(store, "b", {0}, Geometry(8193, 12))
    before = contents(store)
    with pytest.raises(InvalidArgument, match=r"8192 bytes.*8193 bytes"):
        combine(store, "a", operation, "b")
    assert contents(store) == before


COARSE, FINE = Geometry(10 * 65536 - 5, 16), Geometry(10 * 65536 - 5, 12)


def test_into_finer_blocks_every_one_that_is_touched_is_marked_up_to_the_disks_end(store: Store) -> None:
    keep(store, "fine", {0}, FINE)
    keep(store, "coarse", {1, 9}, COARSE)
    after = combine(store, "fine", Operation.OR, "coarse")
    assert blocks_of(store, "fine") == {0} | set(range(16, 32)) | set(range(144, FINE.block_count))
    assert "65536" in (after.superset or "")


def test_into_coarser_blocks_every_one_that_is_touched_is_marked(store: Store) -> None:
    keep(store, "coarse", {3}, COARSE)
    keep(store, "fine", {0, 15, 159}, FINE)
    after = combine(store, "coarse", Operation.OR, "fine")
    assert blocks_of(store, "coarse") == {0, 3, 9}
    assert standalone.trust(after) is Trust.EXACT
    assert combine(store, "coarse", Operation.AND, "fine").superset is None
    assert blocks_of(store, "coarse") == {0, 9}


@pytest.mark.parametrize("operation", [Operation.AND_NOT, Operation.XOR])
def test_nothing_is_taken_away_in_blocks_of_another_size(store: Store, operation: Operation) -> None:
    keep(store, "coarse", {0}, COARSE)
    keep(store, "fine", {0}, FINE)
    for target, source in (("coarse", "fine"), ("fine", "coarse")):
        with pytest.raises(InvalidArgument, match=r"blocks of \d+ bytes, and"):
            combine(store, target, operation, source)
    assert blocks_of(store, "coarse") == blocks_of(store, "fine") == {0}


def test_all_or_none_of_the_sources_go_in(store: Store) -> None:
    keep(store, "a", A)
    keep(store, "b", B)
    keep(store, "other", {0}, COARSE)
    before = contents(store)
    refusals: list[type[LmdbitmapError]] = []
    for last in ("nobody", "other"):
        with pytest.raises((NotFound, InvalidArgument)) as refusal:
            combine(store, "a", Operation.OR, "b", last)
        refusals.append(refusal.type)
    assert refusals == [NotFound, InvalidArgument]
    assert contents(store) == before


@pytest.mark.parametrize("operation", Operation)
def test_the_answer_under_another_name_leaves_all_as_they_were(store: Store, operation: Operation) -> None:
    for name, blocks in (("a", A), ("b", B)):
        keep(store, name, blocks, origin=ORIGIN)
    before = contents(store)
    answer = standalone.combine(store, "a", operation, ["b", "a"], into="answer")
    step = SET_OPERATIONS[operation]
    assert blocks_of(store, "answer") == step(step(A, B), A)
    assert [what for what in contents(store) if what[0] != "answer"] == before
    assert bitmap_of(store, "answer") == answer
    assert answer.uuid not in {bitmap.uuid for _, _, bitmap in before}
    assert (answer.origin_disk, answer.origin_since, answer.superset) == (ORIGIN.disk, None, None)


def test_without_others_the_answer_is_a_copy(store: Store) -> None:
    original = keep(store, "a", A, origin=ORIGIN, superset="because")
    copy = standalone.combine(store, "a", Operation.OR, [], into="copy")
    assert blocks_of(store, "copy") == blocks_of(store, "a") == A
    assert (copy.superset, copy.origin_since, copy.origin_until) == ("because", *ORIGIN[2:4])
    assert copy.uuid != original.uuid


def test_the_copy_of_a_damaged_bitmap_is_not_taken_for_exact(store: Store) -> None:
    """Its records are whole; what is exact may be taken away from something else."""
    keep(store, "a", A)
    keep(store, "b", B)
    damage(store, "b")
    copy = standalone.combine(store, "b", Operation.OR, [], into="copy")
    assert blocks_of(store, "copy") == set(range(REGION_BLOCKS)) | B
    assert "damaged" in (copy.superset or "")
    with pytest.raises(Untrusted, match=r"'copy'.*damaged"):
        combine(store, "a", Operation.AND_NOT, "copy")


def test_everything_dirty_is_copied_with_its_reason(store: Store) -> None:
    keep(store, "unknown", all_dirty="nobody knows")
    copy = standalone.combine(store, "unknown", Operation.OR, [], into="copy")
    assert copy.all_dirty == "nobody knows"
    assert blocks_of(store, "copy") == set(range(GEOMETRY.block_count))


def test_the_answer_gets_no_name_that_something_has(tmp_path: Path) -> None:
    with closing(TrackedDisk(tmp_path, GEOMETRY.size)) as tracked:
        store = tracked.store
        keep(store, "a", A)
        keep(store, "b", B)
        before = contents(store)
        for into in ("a", "b", NAME):
            with pytest.raises(AlreadyExists, match=into):
                standalone.combine(store, "a", Operation.OR, ["b"], into=into)
        with pytest.raises(InvalidArgument, match="bitmap name"):
            standalone.combine(store, "a", Operation.OR, ["b"], into="")
        assert contents(store) == before


def test_the_answer_is_no_source_of_itself(store: Store) -> None:
    """A copy that is made first would be found under the name of a source that is missing."""
    keep(store, "a", A)
    with pytest.raises(NotFound, match="'b'"):
        standalone.combine(store, "a", Operation.AND, ["b"], into="b")
    assert [name for name, _, _ in contents(store)] == ["a"]


def test_a_refusal_names_the_bitmap_that_was_asked_for(store: Store) -> None:
    keep(store, "a", A, superset="because")
    keep(store, "b", B)
    with pytest.raises(Untrusted, match="bitmap 'a' may name clean blocks"):
        standalone.combine(store, "a", Operation.XOR, ["b"], into="answer")


def test_one_name_is_no_list_of_names(store: Store) -> None:
    """Each of its letters may be the name of a bitmap, of which none has the blocks of the one that was meant."""
    for number, name in enumerate(("a", "b", "c", "bc")):
        keep(store, name, {number})
    with pytest.raises(InvalidArgument, match=r"give \['bc'\]"):
        standalone.combine(store, "a", Operation.OR, "bc")
    assert blocks_of(store, "a") == {0}


def test_a_disk_is_no_bitmap_to_combine(tmp_path: Path) -> None:
    with closing(TrackedDisk(tmp_path, GEOMETRY.size)) as tracked:
        keep(tracked.store, "a", A)
        for name, other in (("a", NAME), (NAME, "a")):
            with pytest.raises(InvalidArgument, match=r"is a disk, .*; keep its changes as one first"):
                combine(tracked.store, name, Operation.OR, other)


def test_a_transaction_that_runs_again_finds_the_others_again(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it does when the map had to grow: names that are used up would be missing from the answer."""
    keep(store, "a", A)
    keep(store, "b", B)
    put, tries = Writer.put_bitmap, []

    def fails_once(writer: Writer, bitmap: Bitmap) -> None:
        tries.append(bitmap)
        if len(tries) == 1:
            raise FullMapError("full")
        put(writer, bitmap)

    monkeypatch.setattr(Writer, "put_bitmap", fails_once)
    standalone.combine(store, "a", Operation.OR, iter(["b"]))
    assert len(tries) == 2
    assert blocks_of(store, "a") == A | B


def test_an_operation_is_known_by_its_value_too_and_refuses_the_same(store: Store) -> None:
    for name in ("a", "b"):
        keep(store, name, A, all_dirty="nobody knows")
    with pytest.raises(Untrusted, match="could hide changes"):
        standalone.combine(store, "a", "xor", ["b"])  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match="there is no operation 'nor' on bitmaps; use one of or, and, "):
        standalone.combine(store, "a", "nor", ["b"])  # type: ignore[arg-type]


def test_no_target_is_made_by_combining(store: Store) -> None:
    keep(store, "b", B)
    with pytest.raises(NotFound, match="'a'"):
        combine(store, "a", Operation.OR, "b")


@pytest.mark.parametrize("operation", [Operation.OR, Operation.AND])
def test_everything_dirty_on_the_largest_disk_is_a_word_and_not_a_loop(
    store: Store, operation: Operation
) -> None:
    """Terabytes of records would be needed to spell it out; the test's own timeout is the judge."""
    largest = Geometry(MAX_SIZE, 9)
    keep(store, "unknown", (), largest, all_dirty="nobody knows")
    keep(store, "also", (), largest, all_dirty="nobody knows")
    keep(store, "one", {largest.block_count - 1}, largest)
    assert combine(store, "unknown", operation, "also").all_dirty == "nobody knows"
    after = combine(store, "one", operation, "unknown")
    if operation is Operation.OR:
        assert after.all_dirty == "nobody knows"
    else:
        assert blocks_of(store, "one") == {largest.block_count - 1}
