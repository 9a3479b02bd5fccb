"""combine: stand-alone bitmaps that came from flat files, put together, and what goes out again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Cli
from tests.helpers import naive_flat

SIZE = (5000 << 16) - 7
BLOCKS = 5000
MONDAY, TUESDAY, WEDNESDAY = {0, 1, 63, 4095, 4096, 4999}, {1, 2, 4096, 4500, 4999}, {2, 63, 4095}
LOOSE = 0b101
"""The flags of a file that is CLEAN and a SUPERSET."""

SETS: dict[str, Callable[[set[int], set[int]], set[int]]] = {
    "or": lambda left, right: left | right,
    "and": lambda left, right: left & right,
    "and-not": lambda left, right: left - right,
    "xor": lambda left, right: left ^ right,
}


def keep(cli: Cli, name: str, blocks: set[int], size: int = SIZE, bits: int = 16, flags: int = 1) -> None:
    path = cli.folder / f"{name}.dbm"
    path.write_bytes(naive_flat.write(blocks, size, bits, flags=flags))
    cli.ok("import", path, name)


def blocks_of(cli: Cli, name: str) -> set[int]:
    path = cli.folder / f"{name}-again.dbm"
    cli.ok("export", name, path)
    return naive_flat.dirty_blocks(path.read_bytes())


def everything(cli: Cli) -> list[tuple[Any, set[int]]]:
    """What a refusal must leave as it was."""
    return [(facts, blocks_of(cli, facts["name"])) for facts in cli.json("ls")["bitmaps"]]


@pytest.fixture
def week(quick_cli: Cli) -> Cli:
    """Three bitmaps of three days, all exact."""
    for name, blocks in (("monday", MONDAY), ("tuesday", TUESDAY), ("wednesday", WEDNESDAY)):
        keep(quick_cli, name, blocks)
    return quick_cli


@pytest.mark.parametrize("operation", SETS)
def test_a_bitmap_becomes_what_it_is_combined_with_the_others_in_turn(week: Cli, operation: str) -> None:
    before = everything(week)
    told = week.json("combine", "monday", operation, "tuesday", "wednesday")
    step = SETS[operation]
    wanted = step(step(MONDAY, TUESDAY), WEDNESDAY)
    assert blocks_of(week, "monday") == wanted
    assert everything(week)[1:] == before[1:]
    assert told == week.json("info", "monday") == everything(week)[0][0]
    assert (told["trust"], told["dirty_bytes"]) == ("exact", len(wanted) * 65536 - 7 * (4999 in wanted))
    assert told["uuid"] != before[0][0]["uuid"]


@pytest.mark.parametrize("operation", SETS)
def test_what_comes_out_is_kept_under_another_name(week: Cli, operation: str) -> None:
    before = everything(week)
    told = week.json("combine", "monday", operation, "tuesday", "--into", "news")
    assert blocks_of(week, "news") == SETS[operation](MONDAY, TUESDAY)
    assert told == week.json("info", "news")
    assert [kept for kept in everything(week) if kept[0]["name"] != "news"] == before


def test_people_are_told_what_came_of_it(week: Cli) -> None:
    said = week.ok("combine", "monday", "and", "tuesday", "--into", "both")
    assert said == "both: 312.5 MiB in blocks of 64 KiB, 192.0 KiB dirty, exact\n"
    keep(week, "loose", {7}, flags=LOOSE)
    said = week.ok("combine", "both", "or", "loose")
    assert (
        said
        == "both: 312.5 MiB in blocks of 64 KiB, 256.0 KiB dirty, superset: loose.dbm may be a superset\n"
    )


@pytest.mark.parametrize("kind", ["loose", "unknown"])
@pytest.mark.parametrize("operation", ["or", "and"])
def test_what_is_not_exact_makes_an_answer_that_names_more(week: Cli, operation: str, kind: str) -> None:
    known = doubtful(week, kind)
    for words in (("monday", operation, kind), (kind, operation, "tuesday")):
        told = week.json("combine", *words, "--into", words[0] + "-new")
        mine = MONDAY if words[0] == "monday" else known
        theirs = TUESDAY if words[2] == "tuesday" else known
        assert blocks_of(week, told["name"]) == SETS[operation](mine, theirs)
        assert told["trust"] == "superset"


@pytest.mark.parametrize("kind", ["loose", "unknown"])
@pytest.mark.parametrize("operation", ["and-not", "xor"])
def test_nothing_is_taken_away_where_that_could_hide_a_change(week: Cli, operation: str, kind: str) -> None:
    doubtful(week, kind)
    before = everything(week)
    taken = [("monday", operation, "tuesday", kind), (kind, operation, "tuesday")]
    for words in taken[: 1 if (operation, kind) == ("and-not", "loose") else 2]:
        for more in ((), ("--into", "news")):
            said = week.fails(3, "combine", *words, *more)
            assert f"could hide changes, because bitmap '{kind}' may name clean blocks" in said
            assert said.endswith("; use an exact one, or combine with `or` or `and`")
    assert everything(week) == before


def doubtful(cli: Cli, kind: str) -> set[int]:
    """A bitmap of that name that is a superset, or of which nothing is known; answers what it calls dirty."""
    if kind == "loose":
        keep(cli, kind, WEDNESDAY, flags=LOOSE)
        return WEDNESDAY
    path = cli.folder / f"{kind}.dbm"
    path.write_bytes(naive_flat.write(WEDNESDAY, SIZE, 16, flags=0))
    cli.ok("import", path, kind, "--all-dirty")
    return set(range(BLOCKS))


def test_what_is_exact_is_taken_away_from_what_names_more(week: Cli) -> None:
    keep(week, "loose", WEDNESDAY, flags=LOOSE)
    assert week.json("combine", "loose", "and-not", "tuesday")["trust"] == "superset"
    assert blocks_of(week, "loose") == WEDNESDAY - TUESDAY


def test_blocks_of_another_size_are_every_one_that_is_touched(week: Cli) -> None:
    keep(week, "fine", {0, 16, 17, 79_999}, bits=12)
    assert week.json("combine", "monday", "or", "fine", "--into", "coarse")["trust"] == "exact"
    assert blocks_of(week, "coarse") == MONDAY | {0, 1, 4999}
    told = week.json("combine", "fine", "and", "tuesday")
    assert (told["trust"], told["granularity"]) == ("superset", 4096)
    assert blocks_of(week, "fine") == {16, 17, 79_999}


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["nobody", "or", "tuesday"], 1, "no bitmap is called 'nobody'; "),
        (["monday", "or", "tuesday", "nobody"], 1, "no bitmap is called 'nobody'; "),
        (["monday", "or", "nobody", "--into", "nobody"], 1, "no bitmap is called 'nobody'; "),
        (["monday", "or", "tuesday", "--into", "wednesday"], 1, "a bitmap is called 'wednesday' already; "),
        (["monday", "or", "tuesday", "--into", "monday"], 1, "a bitmap is called 'monday' already; "),
        (["monday", "or", "tuesday", "--into", "sda"], 1, "a disk is called 'sda' already; "),
        (
            ["monday", "or", "tuesday", "--into", "x" * 1024],
            2,
            "bitmap name of 1024 bytes is not within 1..1023 bytes; ",
        ),
        (["monday", "xor", "tuesday", "monday"], 2, "would be combined with itself while it changes; "),
        (["monday", "or", "tuesday", "other"], 2, "and 'other' of one of 65536 bytes; "),
        (["monday", "xor", "tuesday", "fine"], 2, "and 'fine' of 4096 bytes; "),
        (["monday", "nor", "tuesday"], 2, "'nor' is not one of 'or', 'and', 'and-not', 'xor'"),
    ],
)
def test_a_refusal_says_why_and_changes_nothing(week: Cli, words: list[str], code: int, said: str) -> None:
    week.add("sda")
    keep(week, "other", {0}, size=65536)
    keep(week, "fine", {0}, bits=12)
    before = everything(week)
    assert said in week.fails(code, "combine", *words)
    assert everything(week) == before


def test_the_changes_of_a_disk_are_kept_as_a_bitmap_first(week: Cli) -> None:
    """By the very verbs that the refusal names."""
    week.add("sda", SIZE)
    week.ok("checkpoint", "sda", "start")
    week.ok("mark", "sda", 3 << 16, 1)
    before = everything(week)
    for words in (("sda", "or", "monday"), ("monday", "or", "tuesday", "sda")):
        assert week.fails(2, "combine", *words) == (
            "'sda' is a disk, and only stand-alone bitmaps are combined;"
            " keep its changes as one first: `lmdbitmap export` them, and `lmdbitmap import` the file"
        )
    assert everything(week) == before
    week.ok("export", "sda", week.folder / "sda.dbm")
    week.ok("import", week.folder / "sda.dbm", "changed")
    week.ok("combine", "monday", "or", "changed")
    assert blocks_of(week, "monday") == MONDAY | {3}


def test_what_was_combined_goes_into_a_disk_as_a_file(week: Cli, tmp_path: Path) -> None:
    week.add("sda", SIZE)
    week.ok("checkpoint", "sda", "start")
    week.ok("combine", "monday", "and", "tuesday", "--into", "both")
    week.ok("export", "both", tmp_path / "both.dbm")
    week.ok("import", tmp_path / "both.dbm", "again", "--into", "sda")
    trust, extents = week.dirty("sda")
    assert (trust, sum(length for _, length in extents)) == ("exact", 3 * 65536 - 7)
    assert [offset >> 16 for offset, _ in extents] == sorted(MONDAY & TUESDAY)


def test_there_is_nothing_to_combine_without_a_store(cli: Cli) -> None:
    assert "is not a store" in cli.fails(1, "combine", "a", "or", "b")
    assert not cli.store.exists()
