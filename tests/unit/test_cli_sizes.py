"""Sizes and times as people write and read them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmdbitmap.cli.sizes import (
    format_duration,
    format_latency,
    format_size,
    format_time,
    iso_time,
    parse_size,
)
from lmdbitmap.errors import InvalidArgument
from lmdbitmap.geometry import MAX_SIZE


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("512B", 512),
        ("64K", 65536),
        ("64k", 65536),
        ("64KiB", 65536),
        ("4M", 4 << 20),
        ("1.5G", 3 << 29),
        ("0.5K", 512),
        ("1T", 1 << 40),
        ("2P", 2 << 50),
        ("7E", 7 << 60),
        (str(MAX_SIZE), MAX_SIZE),
    ],
)
def test_sizes_take_binary_units(text: str, size: int) -> None:
    assert parse_size(text) == size


NOT_SIZES = [
    "",
    " ",
    "K",
    "-1",
    "+1",
    "1 K",
    " 1",
    "1\n",
    "0x10",
    "1e3",
    "1_000",
    "1,5G",
    "64KB",
    "64Ki",
    "1.K",
]
NOT_SIZES += [
    ".5K",
    "5Z",
    "0.3",
    "1.0001K",
    "8E",
    str(MAX_SIZE + 1),
    "9" * 5000,
    "\u0663",
    "1\u212a",
    "inf",
    "nan",
]


@pytest.mark.parametrize("text", NOT_SIZES)
def test_nonsense_is_no_size(text: str) -> None:
    with pytest.raises(InvalidArgument, match="write it in bytes or with a unit") as caught:
        parse_size(text)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1025, "1.0 KiB"),
        (1536, "1.5 KiB"),
        ((1 << 20) - 1, "1.0 MiB"),
        (40 << 30, "40 GiB"),
        (13002342, "12.4 MiB"),
        (1 << 60, "1 EiB"),
        (MAX_SIZE, "8.0 EiB"),
    ],
)
def test_sizes_are_shown_short(size: int, text: str) -> None:
    assert format_size(size) == text


@given(st.integers(0, MAX_SIZE))
def test_a_shown_size_is_near_the_truth(size: int) -> None:
    number, unit = format_size(size).split()
    shown = float(number) * 1024 ** ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"].index(unit)
    assert shown == pytest.approx(size, rel=0.051)
    assert float(number) < 1024
    assert (size == 0) == (number == "0")


@given(st.integers(0, 1023), st.sampled_from("KMGTP"))
def test_whole_units_survive_the_round_trip(number: int, unit: str) -> None:
    size = parse_size(f"{number}{unit}")
    assert parse_size(format_size(size).replace(" ", "")) == size


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (0.44, "0.4 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3600, "1 h 00 min"),
        (7620, "2 h 07 min"),
        (273600, "3 d 04 h"),
    ],
)
def test_durations_name_their_two_largest_units(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_times_for_programs_are_utc_and_exact() -> None:
    assert iso_time(0) == "1970-01-01T00:00:00.000000000Z"
    assert iso_time(1_700_000_000_000_000_042) == "2023-11-14T22:13:20.000000042Z"
    assert iso_time(2**64 - 1) == "2554-07-21T23:34:33.709551615Z"


def test_times_for_people_are_local(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    monkeypatch.setenv("TZ", "UTC-2")
    time.tzset()
    try:
        assert format_time(1_700_000_000_999_999_999) == "2023-11-15 00:13:20"
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize(
    ("duration_ns", "words"),
    [
        (0, "0 ns"),
        (999, "999 ns"),
        (1000, "1 µs"),
        (12_345, "12.3 µs"),
        (998_999, "999 µs"),
        (999_999, "1000 µs"),
        (2_048_000, "2.05 ms"),
        (1_250_000_000, "1.25 s"),
        (123_456_000_000, "123 s"),
        (1_234_567_000_000, "1235 s"),
    ],
)
def test_latencies_have_three_digits_and_a_unit(duration_ns: int, words: str) -> None:
    assert format_latency(duration_ns) == words
