"""What people and programs get to see."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from lmdbitmap.cli.output import (
    complain,
    printable,
    progress,
    say,
    say_json,
    say_table,
    stream_json,
    stream_lines,
)

Captured = pytest.CaptureFixture[str]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("sda", "sda"),
        ("Größe · 40 GiB", "Größe · 40 GiB"),
        ("a\nb", "a\\nb"),
        ("\x1b[2Jgone", "\\x1b[2Jgone"),
        ("\u202egpj.exe", "\\u202egpj.exe"),
        ("caf\udce9", "caf\\udce9"),
    ],
)
def test_what_a_terminal_would_obey_is_spelled_out(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_sentences_stay_on_one_line(capsys: Captured) -> None:
    say("one\ntwo")
    complain("three\rfour")
    assert capsys.readouterr() == ("one\\ntwo\n", "lmdbitmap: three\\rfour\n")


def test_json_keeps_what_it_is_given(capsys: Captured) -> None:
    say_json({"name": "Größe", "dirty_bytes": 3 << 40, "none": None})
    assert json.loads(capsys.readouterr().out) == {"name": "Größe", "dirty_bytes": 3 << 40, "none": None}


@pytest.mark.parametrize("count", [0, 1, 2, 4096, 4097, 10_000])
@pytest.mark.parametrize("head", [{}, {"disk": "sda", "size": 7}])
def test_a_streamed_list_is_the_same_json(capsys: Captured, count: int, head: dict[str, object]) -> None:
    rows = [{"offset": number, "zero": False} for number in range(count)]
    stream_json(head, "extents", map(json.dumps, rows))
    said = capsys.readouterr().out
    assert json.loads(said) == {**head, "extents": rows}
    assert said.endswith("]}\n")
    assert said.count("\n") == count + 2


def test_a_streamed_list_is_said_before_it_ends(capsys: Captured) -> None:
    said_early = []

    def rows() -> Iterator[str]:
        for number in range(9000):
            if number == 8500:
                said_early.append(capsys.readouterr().out)
            yield f'{{"offset": {number}}}'

    stream_json({}, "extents", rows())
    assert '{"offset": 8000}' in said_early[0]


def test_streamed_lines_are_said_before_they_end(capsys: Captured) -> None:
    said_early = []

    def lines() -> Iterator[str]:
        for number in range(9000):
            if number == 8500:
                said_early.append(capsys.readouterr().out)
            yield f"line {number}"

    stream_lines(lines())
    assert "\nline 8000\n" in said_early[0]
    assert capsys.readouterr().out.endswith("line 8999\n")


def test_tables_keep_long_words_whole_in_a_pipe(capsys: Captured) -> None:
    long = "/srv/" + "x" * 300
    say_table(
        ["name", "size", "image"],
        [["sda", "40 GiB", long], ["b", "1 B", "[red]not markup[/]"]],
        right=["size"],
    )
    heading, first, second = capsys.readouterr().out.splitlines()
    assert heading == "name    size  image"
    assert first == f"sda   40 GiB  {long}"
    assert second == "b        1 B  [red]not markup[/]"


def test_a_name_cannot_break_a_table(capsys: Captured) -> None:
    say_table(["name"], [["two\nlines"], ["\x1b[31mred"]])
    assert capsys.readouterr().out.splitlines() == ["name", "two\\nlines", "\\x1b[31mred"]


def test_progress_that_is_not_shown_says_nothing(capsys: Captured) -> None:
    with progress("backing up sda", shown=False) as report:
        report(1, 10)
    assert capsys.readouterr() == ("", "")
