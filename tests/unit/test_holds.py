"""Notes of who holds what: their bytes, when a hold lapses, and what a name or a damaged note may do."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmdbitmap.errors import Busy, FormatError, InvalidArgument
from lmdbitmap.notes import holds
from lmdbitmap.notes.holds import DROPPED, LAPSED, Hold, HoldFile, UnderWay
from lmdbitmap.notes.references import CheckpointRef, Reason
from lmdbitmap.storage.schema import Checkpoint

DISK, HOLDER = UUID(int=1), UUID(int=2)
DAY_NS = 86_400 * 10**9
ONE = CheckpointRef(UUID(int=3), "backup-20260101T000000Z-012345")
TWO = CheckpointRef(UUID(int=4), "backup-20260102T000000Z-012345")
MINE = CheckpointRef(UUID(int=5), "mine")
HOLD = Hold(HOLDER, "/backups", 1000 * DAY_NS, (ONE, TWO))


def member(checkpoint: CheckpointRef) -> Checkpoint:
    return Checkpoint(DISK, 1, checkpoint.name, checkpoint.uuid, 0, UUID(int=6), 1)


refs = st.builds(CheckpointRef, st.uuids(), st.text(min_size=1, max_size=20))
notes = st.builds(
    Hold,
    st.uuids(),
    st.none() | st.text(max_size=50),
    st.integers(0, 2**63 - 1),
    st.lists(refs, max_size=3).map(tuple),
    st.none() | st.builds(UnderWay, st.text(max_size=20), st.none() | st.uuids()),
    st.none() | st.builds(Reason, st.sampled_from([LAPSED, DROPPED]), st.text(max_size=20)),
)


def test_a_folder_that_cannot_be_looked_at_is_not_taken_for_a_missing_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints that others hold would be forgotten."""
    with HoldFile(str(tmp_path), DISK, HOLDER).locked() as file:
        file.replace(HOLD)
    stat = os.stat

    def sick(path: Any, **options: Any) -> os.stat_result:
        if os.fspath(path) == str(tmp_path / holds.HOLDS):
            raise OSError(errno.EIO, "a bad sector")
        return stat(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", sick)
        assert [found.hold for found in holds.hold_files(str(tmp_path), DISK)] == [HOLD]
    assert holds.hold_files(str(tmp_path / "nowhere"), DISK) == []


@given(notes)
def test_a_note_is_read_as_it_was_written(hold: Hold) -> None:
    assert holds.decode(holds.encode(hold), "note") == hold


WHOLE = holds.encode(
    dataclasses.replace(HOLD, under_way=UnderWay("x", UUID(int=9)), ended=Reason(LAPSED, "y"))
)


@given(st.integers(0, len(WHOLE) - 1), st.binary(max_size=3), st.integers(0, 40))
def test_bytes_that_are_no_note_are_refused_and_nothing_else(at: int, new: bytes, cut: int) -> None:
    with contextlib.suppress(FormatError):
        holds.decode(WHOLE[:at] + new + WHOLE[at + cut :], "note")


@pytest.mark.parametrize("text", ["[]", "{}", "nul", '{"format_version": true}', "[" * 100_000, "1" * 9999])
def test_text_that_is_no_note_is_refused(text: str) -> None:
    with pytest.raises(FormatError, match="expected the note of a hold"):
        holds.decode(text.encode(), "note")


def test_a_key_that_is_not_known_is_left_out() -> None:
    later = WHOLE.replace(b'"holder"', b'"colour": "red", "holder"')
    assert later != WHOLE
    assert holds.decode(later, "note") == holds.decode(WHOLE, "note")


def test_a_newer_version_is_refused() -> None:
    with pytest.raises(FormatError, match="version 2"):
        holds.decode(WHOLE.replace(b'"format_version": 1', b'"format_version": 2'), "note")


# --- what a hold lets go of ---


@pytest.mark.parametrize(
    ("days", "age_days", "stale"),
    [(180, 180, False), (180, 181, True), (0, 99_999, False), (1, -5, False), (1, 2, True)],
)
def test_a_hold_is_stale_after_so_many_days_without_use(days: int, age_days: int, stale: bool) -> None:
    assert HOLD.is_stale(days, HOLD.used_ns + age_days * DAY_NS) is stale
    assert not dataclasses.replace(HOLD, ended=Reason(LAPSED, "")).is_stale(1, 2**62)
    assert not dataclasses.replace(HOLD, checkpoints=()).is_stale(1, 2**62)


def test_a_hold_lets_go_of_what_it_names_when_it_ended_and_of_nothing_of_a_persons() -> None:
    assert not HOLD.lets_go_of(member(ONE))
    ended = dataclasses.replace(HOLD, checkpoints=(ONE, MINE), ended=Reason(LAPSED, ""))
    assert ended.lets_go_of(member(ONE))
    assert not ended.lets_go_of(member(TWO))
    assert not ended.lets_go_of(member(MINE)), "a note may lie, a person's checkpoint stays"


def test_a_run_is_known_by_a_name_of_our_making_or_by_its_uuid() -> None:
    assert UnderWay(ONE.name).is_of(member(ONE))
    assert not UnderWay("mine").is_of(member(MINE)), "another one may be called so"
    assert UnderWay("mine", MINE.uuid).is_of(member(MINE))
    assert not UnderWay(ONE.name, TWO.uuid).is_of(member(ONE))
    assert UnderWay("stream-20260101T000000Z-abcdef").is_of(
        member(CheckpointRef(uuid4(), "stream-20260101T000000Z-abcdef"))
    )


# --- the file ---


@pytest.fixture
def file(tmp_path: Path) -> HoldFile:
    return HoldFile(str(tmp_path), DISK, HOLDER)


def listed(tmp_path: Path) -> list[Hold | None]:
    return [found.hold for found in holds.hold_files(str(tmp_path), DISK)]


def test_a_run_holds_what_is_there_and_then_its_own_too(tmp_path: Path, file: HoldFile) -> None:
    with file.locked():
        file.begin("/backups", [ONE], UnderWay(TWO.name), 5)
        assert listed(tmp_path) == [Hold(HOLDER, "/backups", 5, (ONE,), UnderWay(TWO.name))]
        file.keep(TWO, 6)
        assert listed(tmp_path) == [Hold(HOLDER, "/backups", 6, (ONE, TWO))]


def test_two_runs_do_not_hold_one_note(file: HoldFile) -> None:
    with file.locked(), pytest.raises(Busy), file.locked():
        pass  # pragma: no cover


def test_a_run_that_makes_no_note_leaves_no_lock(tmp_path: Path, file: HoldFile) -> None:
    with pytest.raises(InvalidArgument), file.locked():
        raise InvalidArgument("it is refused", next_step="do something else")
    assert os.listdir(tmp_path / "holds") == []


def test_a_lock_that_another_run_made_meanwhile_stays(tmp_path: Path, file: HoldFile) -> None:
    with contextlib.ExitStack() as other:
        with file.locked():
            file.remove()
            other.enter_context(HoldFile(str(tmp_path), file.disk, file.holder).locked())
        assert [name.rpartition(".")[2] for name in os.listdir(tmp_path / "holds")] == ["lock"]
        with pytest.raises(Busy), file.locked():
            pass  # pragma: no cover


def test_why_a_hold_ended_is_known_until_another_backup_was_made(file: HoldFile) -> None:
    ended = Reason(LAPSED, "it lapsed")
    with file.locked():
        file.replace(Hold(HOLDER, "/backups", 1, (), None, ended))
        file.begin("/backups", [], UnderWay(ONE.name), 5)
        assert file.hold is not None
        assert file.hold.ended == ended
        file.keep(ONE, 6)
        assert file.hold.ended is None


def test_a_repository_that_is_back_in_time_holds_again(file: HoldFile) -> None:
    with file.locked():
        file.replace(Hold(HOLDER, "/backups", 1, (ONE,), None, Reason(LAPSED, "it lapsed")))
        file.begin("/backups", [ONE], UnderWay(TWO.name), 5)
        assert file.hold is not None
        assert file.hold.ended is None


def test_a_note_of_nothing_goes_and_takes_its_lock_along(tmp_path: Path, file: HoldFile) -> None:
    with file.locked():
        file.begin("/backups", [ONE], UnderWay(TWO.name), 5)
        file.settle([member(ONE), member(TWO)])
        assert listed(tmp_path) == [Hold(HOLDER, "/backups", 5, (ONE,), UnderWay(TWO.name))]
        file.settle([member(ONE)])
        assert listed(tmp_path) == [Hold(HOLDER, "/backups", 5, (ONE,))]
        file.settle([])
    assert os.listdir(tmp_path / "holds") == []


def test_a_damaged_note_holds_nothing_and_lets_nothing_go(
    tmp_path: Path, file: HoldFile, caplog: pytest.LogCaptureFixture
) -> None:
    with file.locked():
        file.replace(HOLD)
        (tmp_path / "holds" / f"{DISK}-{HOLDER}.json").write_bytes(b"rot")
    assert listed(tmp_path) == []
    assert "the checkpoints that it named stay" in caplog.text


def test_a_path_that_is_not_utf8_can_be_noted(tmp_path: Path, file: HoldFile) -> None:
    with file.locked():
        file.begin("/b\udcff", [], UnderWay(ONE.name), 5)
    assert [hold and hold.repository for hold in listed(tmp_path)] == ["/b?"]


def test_files_are_known_by_their_disk(tmp_path: Path, file: HoldFile) -> None:
    with file.locked():
        file.replace(HOLD)
    holds.set_lapse_days(str(tmp_path), DISK, 7)
    assert {holds.disk_of(name) for name in os.listdir(tmp_path / "holds")} == {str(DISK)}
    assert holds.disk_of("something else") is None
    assert holds.hold_files(str(tmp_path), UUID(int=77)) == []
    holds.remove_holds(str(tmp_path), DISK)
    assert os.listdir(tmp_path / "holds") == []


# --- days ---


def test_holds_lapse_after_180_days_unless_it_was_said_otherwise(tmp_path: Path) -> None:
    assert holds.lapse_days(str(tmp_path), DISK) == 180
    for days in (7, 0, 36_500):
        holds.set_lapse_days(str(tmp_path), DISK, days)
        assert holds.lapse_days(str(tmp_path), DISK) == days
    impossible: list[Any] = [36_501, -1, 1.5, True, "7"]
    for days in impossible:
        with pytest.raises(InvalidArgument, match="0 for never"):
            holds.set_lapse_days(str(tmp_path), DISK, days)
    assert holds.lapse_days(str(tmp_path), DISK) == 36_500


@pytest.mark.parametrize("damage", [b"", b"[]", b'{"lapse_days": true}', b'{"lapse_days": -1}', b"rot"])
def test_where_nobody_knows_after_how_many_days_holds_do_not_lapse(tmp_path: Path, damage: bytes) -> None:
    holds.set_lapse_days(str(tmp_path), DISK, 7)
    (tmp_path / "holds" / f"{DISK}-lapse.json").write_bytes(damage)
    assert holds.lapse_days(str(tmp_path), DISK) == 0


@pytest.mark.parametrize("time_ns", [-1, -(10**25), 1 << 63, 10**30])
def test_a_time_that_no_clock_shows_is_refused(time_ns: int) -> None:
    told = json.loads(holds.encode(HOLD)) | {"used_ns": time_ns}
    with pytest.raises(FormatError, match="a time before 1970, or far from now"):
        holds.decode(json.dumps(told).encode(), "a note")
