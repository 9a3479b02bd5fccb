"""The control socket's lines: JSON objects in, JSON objects out, no socket. See docs/control.md.

A line is at most `MAX_LINE_BYTES` long, including its newline. An error travels as its class, its words and the numbers
that belong to the class, and becomes the same error again on the other side.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Final, TypeAlias, TypeVar

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

PROTOCOL: Final = 1
MAX_LINE_BYTES: Final = 1 << 20

Message: TypeAlias = Mapping[str, object]

T = TypeVar("T")

_KINDS: Final[dict[str, type[LmdbitmapError]]] = {
    kind.__name__: kind
    for kind in (
        LmdbitmapError, InvalidArgument, NotFound, AlreadyExists, Untrusted, Busy, FormatError, StorageError,
    )
}  # fmt: skip


def encode(message: Message) -> bytes:
    """Encode a message as one line. Raise `InvalidArgument` if it is too long for one."""
    line = json.dumps(message).encode("ascii") + b"\n"
    if len(line) > MAX_LINE_BYTES:
        raise InvalidArgument(
            f"a message of {len(line)} bytes does not fit a line of {MAX_LINE_BYTES}",
            next_step="ask for less at once",
        )
    return line


def decode(line: bytes, place: str) -> dict[str, object]:
    try:
        message = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _error(place, "a JSON object", f"{line[:40]!r} ({str(error)[:80]})") from None
    if not isinstance(message, dict):
        raise _error(place, "a JSON object", type(message).__name__)
    return message


class LineBuffer:
    """Assembles lines from pieces of any size."""

    def __init__(self, place: str) -> None:
        self.place = place
        self._data = bytearray()
        self._searched = 0

    def add(self, data: bytes) -> None:
        self._data += data

    def take(self) -> bytes | None:
        """Return the next whole line without its newline, or None. Raise `FormatError` if it grows too long."""
        end = self._data.find(b"\n", self._searched)
        self._searched = len(self._data) if end < 0 else 0
        if max(end, self._searched) >= MAX_LINE_BYTES:
            raise _error(self.place, f"a line of at most {MAX_LINE_BYTES} bytes", "a longer one")
        if end < 0:
            return None
        line = bytes(self._data[:end])
        del self._data[: end + 1]
        return line


def field(message: Message, name: str, kind: type[T], place: str) -> T:
    """Return the field, which must be exactly of type `kind`; a boolean is no number, and numbers must fit 64 bits."""
    value = message.get(name)
    if type(value) is not kind or (isinstance(value, int) and value.bit_length() > 64):
        raise _error(place, f"{name!r} of type {kind.__name__}", repr(value)[:80])
    return value


def require_names(message: Message, names: Iterable[str], place: str) -> None:
    """Raise `FormatError` unless the message has exactly these fields: an unknown field is not ignored."""
    if set(message) != set(names):
        raise _error(place, f"the fields {sorted(names)}", repr(sorted(message))[:200])


def error_fields(error: LmdbitmapError) -> dict[str, object]:
    fields: dict[str, object] = {
        "class": next(kind.__name__ for kind in type(error).__mro__ if kind.__name__ in _KINDS),
        "problem": error.problem,
        "next_step": error.next_step,
    }
    if isinstance(error, FormatError):
        fields |= {"place": error.place, "expected": error.expected, "found": str(error.found)}
    if isinstance(error, StorageError):
        fields |= {"place": error.place, "errno": error.errno or 0}
    return fields


def error_from(fields: Message, place: str) -> LmdbitmapError:
    """Return the error that `fields` describe, in its original words. Raise `FormatError` if they describe none."""
    error: LmdbitmapError
    kind = _KINDS.get(field(fields, "class", str, place), LmdbitmapError)
    problem, next_step = field(fields, "problem", str, place), field(fields, "next_step", str, place)
    if kind is FormatError:
        where, expected, found = (field(fields, name, str, place) for name in ("place", "expected", "found"))
        error = FormatError(where, expected=expected, found=found, next_step=next_step)
    elif kind is StorageError:
        cause = OSError(_errno_of(fields, place), problem)
        error = StorageError(field(fields, "place", str, place), cause, next_step=next_step)
    else:
        error = kind(problem, next_step=next_step)
    error.problem = problem
    return error


def _errno_of(fields: Message, place: str) -> int:
    """Return the errno, 0 if the other side had none. Raise if no C int holds it: Python could not use it either."""
    number = field(fields, "errno", int, place)
    if not 0 <= number < 1 << 31:
        raise _error(place, "'errno' of 31 bits", str(number))
    return number


def _error(place: str, expected: str, found: str) -> FormatError:
    return FormatError(
        place, expected=expected, found=found, next_step="use the same version of lmdbitmap on both sides"
    )
