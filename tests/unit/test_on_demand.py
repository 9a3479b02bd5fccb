"""Values that are made when somebody asks for them: once, and of those that there are."""

from __future__ import annotations

import pytest

from lmdbitmap.work.on_demand import OnDemand


def test_only_what_is_asked_for_is_made_and_made_once() -> None:
    made: list[str] = []

    def make(name: str) -> object:
        made.append(name)
        return object()

    found = OnDemand({"a": 1, "b": 2, "c": 3}, make)
    assert (list(found), len(found), "b" in found, "d" in found, made) == (
        ["a", "b", "c"],
        3,
        True,
        False,
        [],
    )
    assert found["b"] is found["b"] is found.get("b")
    assert found.get("d") is None
    with pytest.raises(KeyError):
        found["d"]
    assert made == ["b"]
    assert [*found.values()] == [found["a"], found["b"], found["c"]]
    assert made == ["b", "a", "c"]
