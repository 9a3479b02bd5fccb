"""One msgpack map with sorted string keys: equal maps give equal bytes, and bad input allocates nothing large.

Its values are plain: strings, integers, booleans and None, and lists and maps of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgpack

MAX_ITEMS: Final = 1024
"""In any one map or list."""
MAX_DEPTH: Final = 8
"""Nesting depth of maps and lists, the outermost map counted."""


def pack(value: Mapping[str, object]) -> tuple[dict[str, object], bytes]:
    """Return a copy of the map with its keys in order at every level, and its bytes.

    Raises `ValueError` if a value is not plain, or the map is too large to be unpacked again.
    """
    plain = _plain_map(value, depth=1)
    try:
        packed: bytes = msgpack.packb(plain)
    except OverflowError as error:
        raise ValueError(str(error)) from None
    _unpacked(packed)
    return plain, packed


def unpack(packed: bytes) -> dict[str, object]:
    """Return the map that `pack` made these bytes of. Raises `ValueError` for any other bytes."""
    try:
        return _plain_map(_unpacked(packed), depth=1)
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        raise ValueError(str(error) or type(error).__name__) from None


def _unpacked(packed: bytes) -> object:
    """Unpack plain types only; every length is checked before memory is allocated for it."""
    return msgpack.unpackb(
        packed,
        raw=False,
        strict_map_key=True,
        object_pairs_hook=_sorted_map,
        max_array_len=MAX_ITEMS,
        max_map_len=MAX_ITEMS,
        max_bin_len=0,
        max_ext_len=0,
    )


def _sorted_map(pairs: list[tuple[object, object]]) -> dict[str, object]:
    """Return the map; raise `ValueError` unless its keys ascend strictly, so that none occurs twice."""
    result: dict[str, object] = {}
    last: str | None = None
    for key, value in pairs:
        if not isinstance(key, str) or (last is not None and key <= last):
            raise ValueError(f"key {key!r:.40} after {last!r:.40}")
        result[key] = value
        last = key
    return result


def _plain_map(value: object, depth: int) -> dict[str, object]:
    """Return a copy of a map with its keys in order at every level; raise `ValueError` for anything not plain."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{type(value).__name__} where plain values and maps with string keys belong")
    return {key: _plain(value[key], depth) for key in sorted(value)}


def _plain(value: object, depth: int) -> object:
    if value is None or type(value) in (bool, int, str):
        return value
    if depth == MAX_DEPTH:
        raise ValueError(f"more than {MAX_DEPTH} maps or arrays inside each other")
    if type(value) is list:
        return [_plain(item, depth + 1) for item in value]
    return _plain_map(value, depth + 1)
