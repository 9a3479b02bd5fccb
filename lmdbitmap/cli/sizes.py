"""Sizes and times as people write and read them. Units are binary: K is 1024, as in qemu-img."""

from __future__ import annotations

import datetime
import re
from fractions import Fraction

from lmdbitmap.errors import InvalidArgument
from lmdbitmap.geometry import MAX_SIZE

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
_SIZE = re.compile(
    r"(?P<number>[0-9]{1,20}(\.[0-9]{1,20})?)(?:B|(?P<unit>[KMGTPE])(?:iB)?)?", re.ASCII | re.IGNORECASE
)


def parse_size(text: str) -> int:
    """Return the bytes of `4096`, `64K`, `1.5G`, `1TiB`. Raises `InvalidArgument` for anything else and past 2^63-1."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise _no_size(text, "is not a size")
    exponent = "BKMGTPE".index((match["unit"] or "B").upper())
    size = Fraction(match["number"]) * 1024**exponent
    if size.denominator != 1:
        raise _no_size(text, "is no whole number of bytes")
    if size > MAX_SIZE:
        raise _no_size(text, "is more than any disk can hold")
    return int(size)


def _no_size(text: str, problem: str) -> InvalidArgument:
    shown = text if len(text) <= 40 else f"{text[:40]}…"
    return InvalidArgument(
        f"{shown!r} {problem}", next_step="write it in bytes or with a unit: 4096, 64K, 1.5G, 1T"
    )


def format_size(size: int) -> str:
    """`512 B`, `12.4 MiB`; without a decimal only where that is exact."""
    exponent = max(size.bit_length() - 1, 0) // 10
    if round(size * 10 / 1024**exponent) >= 10240:  # 1023.97 KiB would be shown as 1024.0
        exponent += 1
    exponent = min(exponent, len(_UNITS) - 1)
    whole, rest = divmod(size, 1024**exponent)
    number = str(whole) if rest == 0 else f"{size / 1024**exponent:.1f}"
    return f"{number} {_UNITS[exponent]}"


def format_duration(seconds: float) -> str:
    """`0.4 s`, `12 s`, `3 min 05 s`, `2 h 07 min`, `3 d 04 h`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for step, unit, smaller_step, smaller in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "min"),
        (60, "min", 1, "s"),
    ):
        if whole >= step:
            return f"{whole // step} {unit} {whole % step // smaller_step:02} {smaller}"
    return f"{whole} s"


def format_latency(duration_ns: int) -> str:
    """`900 ns`, `12 µs`, `3.4 ms`, `1.2 s`."""
    for step_ns, unit in ((10**9, "s"), (10**6, "ms"), (10**3, "µs")):
        if duration_ns >= step_ns:
            value = duration_ns / step_ns
            return f"{value:.3g} {unit}" if value < 999 else f"{value:.0f} {unit}"
    return f"{duration_ns} ns"


def format_time(time_ns: int) -> str:
    """Return a Unix time in nanoseconds as local time."""
    return datetime.datetime.fromtimestamp(time_ns // 10**9).strftime("%Y-%m-%d %H:%M:%S")


def iso_time(time_ns: int) -> str:
    """Return a Unix time in nanoseconds as UTC, to the nanosecond, for programs: `2026-11-23T15:11:28.000000042Z`."""
    seconds, nanoseconds = divmod(time_ns, 10**9)
    moment = datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{nanoseconds:09}Z"
