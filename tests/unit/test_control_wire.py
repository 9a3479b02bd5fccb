"""The control socket's lines: cut out of what arrives, read strictly, and errors that survive the journey."""

from __future__ import annotations

import errno

import pytest

from lmdbitmap.errors import (
    AlreadyExists,
    Busy,
    FormatError,
    InvalidArgument,
    LmdbitmapError,
    NotFound,
    StorageError,
    Untrusted,
)
from lmdbitmap.nbd import control_wire as wire

ERRORS = [
    kind("it is so", next_step="do this")
    for kind in (LmdbitmapError, InvalidArgument, NotFound, AlreadyExists, Untrusted, Busy)
] + [
    FormatError("x.dbm", expected="bits", found=5, next_step="do this"),
    StorageError("/srv", OSError(errno.ENOSPC, "full"), next_step="do this"),
    StorageError("/srv", OSError("a cause without a number"), next_step="do this"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_arrives_as_what_it_was(error: LmdbitmapError) -> None:
    fields = wire.decode(wire.encode(wire.error_fields(error)), "here")
    arrived = wire.error_from(fields, "here")
    assert type(arrived) is type(error)
    assert (str(arrived), arrived.problem, arrived.next_step) == (str(error), error.problem, error.next_step)
    if isinstance(error, FormatError) and isinstance(arrived, FormatError):
        assert (arrived.place, arrived.expected, arrived.found) == ("x.dbm", "bits", "5")
    if isinstance(error, StorageError) and isinstance(arrived, StorageError):
        assert (arrived.place, arrived.errno or None) == ("/srv", error.errno)


@pytest.mark.parametrize("number", [-1, 2**31, 2**63])
def test_an_error_number_that_no_system_has_is_refused(number: int) -> None:
    fields = wire.error_fields(StorageError("/srv", OSError(errno.EIO, ""), next_step="do this"))
    with pytest.raises(FormatError, match="'errno' of 31 bits"):
        wire.error_from({**fields, "errno": number}, "here")


def test_an_error_of_a_kind_that_is_new_to_us_arrives_as_its_parent() -> None:
    class Stolen(Busy):
        pass

    assert wire.error_fields(Stolen("gone", next_step="look for it"))["class"] == "Busy"


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 1000])
def test_lines_are_cut_out_of_pieces_of_any_size(piece: int) -> None:
    stream = b'{"a": 1}\n\n{"b": 2}\nrest'
    lines, found = wire.LineBuffer("here"), []
    for start in range(0, len(stream), piece):
        lines.add(stream[start : start + piece])
        while (line := lines.take()) is not None:
            found.append(line)
    assert found == [b'{"a": 1}', b"", b'{"b": 2}']


def test_a_line_is_bounded_whether_it_ends_or_not() -> None:
    longest = wire.MAX_LINE_BYTES - 1
    lines = wire.LineBuffer("here")
    lines.add(b"x" * longest + b"\n")
    assert lines.take() == b"x" * longest
    for noise in (b"x" * (longest + 1), b"x" * (longest + 1) + b"\n"):
        lines = wire.LineBuffer("here")
        lines.add(noise)
        with pytest.raises(FormatError, match="here"):
            lines.take()


def test_what_is_sent_is_bounded_too() -> None:
    with pytest.raises(InvalidArgument, match="does not fit"):
        wire.encode({"name": "x" * wire.MAX_LINE_BYTES})


@pytest.mark.parametrize("line", [b"", b"x", b"[]", b"5", b"null", b"\xff", b'{"a":', b"[" * 200000, b"NaN"])
def test_only_an_object_is_a_message(line: bytes) -> None:
    with pytest.raises(FormatError, match="JSON object"):
        wire.decode(line, "here")


@pytest.mark.parametrize(
    ("value", "kind"),
    [(True, int), (1.0, int), ("1", int), (None, str), (2**64, int), (-(2**64), int), (1, str)],
)
def test_a_field_is_of_its_very_type(value: object, kind: type) -> None:
    with pytest.raises(FormatError, match="'field'"):
        wire.field({"field": value}, "field", kind, "here")
    assert wire.field({"field": 2**64 - 1}, "field", int, "here") == 2**64 - 1


def test_no_field_is_overlooked() -> None:
    wire.require_names({"a": 1}, ["a"], "here")
    for message in ({}, {"a": 1, "b": 2}, {"b": 2}):
        with pytest.raises(FormatError, match="the fields"):
            wire.require_names(message, ["a"], "here")
