"""How tools/newer.py puts a tree of programs in its place, while others may use what is there."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest


def tool() -> Any:
    spec = importlib.util.spec_from_file_location(
        "newer_tool", Path(__file__).parents[2] / "tools" / "newer.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NEWER = tool()


def make(folder: Path, key: str, program: str) -> None:
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "qemu-img").write_text(program)
    (folder / "key").write_text(key)


def program_of(folder: Path) -> str:
    return (folder / "bin" / "qemu-img").read_text()


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The place of a tree, to which `main` adds a program of its own making."""
    monkeypatch.setattr(NEWER, "fetched", lambda place: [])
    monkeypatch.setattr(NEWER, "add_programs", lambda tree: make(tree, "", "ours"))
    return tmp_path / "newer"


def test_a_tree_is_made_where_there_is_none_or_an_older_one(made: Path) -> None:
    NEWER.main(made)
    assert (program_of(made), NEWER.key_of(made)) == ("ours", NEWER.KEY)
    (made / "key").write_text("older")
    (made / "bin" / "qemu-img").write_text("older")
    NEWER.main(made)
    assert (program_of(made), NEWER.key_of(made)) == ("ours", NEWER.KEY)
    assert list(made.parent.iterdir()) == [made]


def test_a_tree_that_another_run_made_meanwhile_stays(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetched(place: Path) -> list[Path]:
        make(made, NEWER.KEY, "theirs")
        return []

    monkeypatch.setattr(NEWER, "fetched", fetched)
    NEWER.main(made)
    assert program_of(made) == "theirs"


def test_an_older_tree_gives_way_as_a_whole(tmp_path: Path) -> None:
    make(tmp_path / "newer", "older", "theirs")
    make(tmp_path / "tree", NEWER.KEY, "ours")
    NEWER.put_in_place(tmp_path / "tree", tmp_path / "newer", tmp_path / "aside")
    assert (program_of(tmp_path / "aside"), NEWER.key_of(tmp_path / "aside")) == ("theirs", "older")
    assert program_of(tmp_path / "newer") == "ours"
