"""Reads JSON whose every byte may lie, field by field: anything missing or wrong is refused, and its place named.

Nothing is guessed. A repeated key, a number that is no finite integer, and text that no terminal could show are
refused.
"""

from __future__ import annotations

import enum
import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, NoReturn, TypeVar
from uuid import UUID

from lmdbitmap.errors import FormatError
from lmdbitmap.geometry import MAX_SIZE

MAX_TEXT_BYTES: Final = 1023
MAX_FILE_NAME_BYTES: Final = 255
_MAX_DIGITS: Final = 20
"""Digits of an integer: enough for 64 bits, and too few to keep Python busy."""

Choice = TypeVar("Choice", bound=enum.Enum)
Result = TypeVar("Result")


class _Origin(NamedTuple):
    """The document that is read, and the next step of its errors."""

    document: str
    next_step: str

    def refusal(self, place: str, expected: str, found: object) -> FormatError:
        return FormatError(place, expected=expected, found=found, next_step=self.next_step)

    def parsed(self, data: bytes, max_bytes: int) -> object:
        if len(data) > max_bytes:
            raise self.refusal(self.document, f"at most {max_bytes} bytes", f"{len(data)} bytes")
        try:
            return json.loads(
                data.decode(),
                object_pairs_hook=self._object,
                parse_int=self._integer,
                parse_constant=self._constant,
            )
        except UnicodeDecodeError as error:
            raise self.refusal(self.document, "UTF-8", f"another byte at offset {error.start}") from error
        except json.JSONDecodeError as error:
            raise self.refusal(
                self.document, "JSON", f"{error.msg} in line {error.lineno}, column {error.colno}"
            ) from error
        except RecursionError as error:
            raise self.refusal(self.document, "a few nested levels", "too many") from error

    def _object(self, pairs: list[tuple[str, object]]) -> dict[str, object]:
        """Return an object whose keys differ: which of two values counts must not be guessed."""
        unique = dict(pairs)
        if len(unique) != len(pairs):
            (key, times), *_ = Counter(key for key, _ in pairs).most_common(1)
            raise self.refusal(self.document, "each key of an object once", f"{shown(key)} {times} times")
        return unique

    def _integer(self, digits: str) -> int:
        if len(digits) > _MAX_DIGITS:
            raise self.refusal(
                self.document, f"integers of at most {_MAX_DIGITS} digits", f"one of {len(digits)}"
            )
        return int(digits)

    def _constant(self, name: str) -> NoReturn:
        raise self.refusal(self.document, "finite numbers", name)


class Fields:
    """One JSON object and its place, read field by field. A missing value or one of another type is refused."""

    def __init__(self, value: object, place: str, origin: _Origin) -> None:
        if not isinstance(value, dict):
            raise origin.refusal(place, "an object", shown(value))
        self._values: dict[str, Any] = value
        self._origin = origin
        self.place = place

    @classmethod
    def of_document(cls, data: bytes, name: str, *, max_bytes: int, next_step: str) -> Fields:
        """Return the object that is the whole document of at most `max_bytes`; every error ends with `next_step`."""
        origin = _Origin(name, next_step)
        return cls(origin.parsed(data, max_bytes), name, origin)

    def fields(self, name: str) -> Fields:
        return Fields(self._value(name), self._place(name), self._origin)

    def list_of_fields(self, name: str) -> list[Fields]:
        values = self._value(name)
        if not isinstance(values, list):
            raise self._refusal(name, "a list")
        places = (f"{self._place(name)}[{index}]" for index in range(len(values)))
        return [Fields(value, place, self._origin) for value, place in zip(values, places, strict=True)]

    def optional(self, name: str, read: Callable[[str], Result]) -> Result | None:
        return None if self._value(name) is None else read(name)

    def if_there(self, name: str, read: Callable[[str], Result]) -> Result | None:
        return read(name) if name in self._values else None

    def integer(self, name: str, least: int, most: int = MAX_SIZE) -> int:
        value = self._value(name)
        # Python's bool is an int, but not here.
        if type(value) is not int or not least <= value <= most:
            raise self._refusal(name, f"an integer from {least} to {most}")
        return int(value)

    def power_of_two(self, name: str, least: int, most: int) -> int:
        value = self.integer(name, least, most)
        if value & (value - 1):
            raise self._refusal(name, f"a power of two from {least} to {most}")
        return value

    def text(self, name: str, most_bytes: int = MAX_TEXT_BYTES) -> str:
        """Return 1 to `most_bytes` bytes of printable UTF-8. Lone surrogates, which JSON can contain, are refused."""
        value = self._value(name)
        if not (isinstance(value, str) and value.isprintable() and 1 <= len(value.encode()) <= most_bytes):
            raise self._refusal(name, f"1 to {most_bytes} bytes of printable text")
        return str(value)

    def file_name(self, name: str) -> str:
        """Return a name that stays in its folder, and that QEMU does not take for a protocol."""
        value = self.text(name, MAX_FILE_NAME_BYTES)
        if value in (".", "..") or "/" in value or ":" in value:
            raise self._refusal(name, "a plain file name without slash or colon")
        return value

    def choice(self, name: str, choices: Sequence[Choice]) -> Choice:
        value = self._value(name)
        for choice in choices:
            if choice.value == value:
                return choice
        raise self._refusal(name, f"one of {', '.join(str(choice.value) for choice in choices)}")

    def uuid(self, name: str) -> UUID:
        value = self._value(name)
        try:
            if isinstance(value, str) and str(UUID(value)) == value:
                return UUID(value)
        except ValueError:
            pass
        raise self._refusal(name, "a uuid in lower case with its four dashes")

    def digest(self, name: str) -> str:
        value = self._value(name)
        if not (isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")):
            raise self._refusal(name, "64 hexadecimal digits in lower case")
        return str(value)

    def _value(self, name: str) -> object:
        if name not in self._values:
            raise self._origin.refusal(self._place(name), "a value", "none")
        return self._values[name]

    def _place(self, name: str) -> str:
        return f"{self.place} {name}" if self.place == self._origin.document else f"{self.place}.{name}"

    def _refusal(self, name: str, expected: str) -> FormatError:
        return self._origin.refusal(self._place(name), expected, shown(self._values[name]))


def shown(value: object) -> str:
    """Return a value as an error can show it: short, in ASCII, and without walking into it."""
    if isinstance(value, (dict, list)):
        return f"an {'object' if isinstance(value, dict) else 'array'} of {len(value)}"
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
