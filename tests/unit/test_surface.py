"""What the library offers by name, and that naming it costs nothing."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lmdbitmap
import lmdbitmap.errors

LAZY = sorted(set(lmdbitmap.__all__) - {"__version__"})


@pytest.mark.parametrize("name", LAZY)
def test_every_name_is_there(name: str) -> None:
    assert getattr(lmdbitmap, name) is not None


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(lmdbitmap.__file__).read_text())
    [block] = [statement for statement in tree.body if isinstance(statement, ast.If)]
    told = [
        alias.asname or alias.name
        for statement in block.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    ]
    assert sorted(told) == LAZY


def test_no_name_is_also_a_modules() -> None:
    """Whichever of the two was imported first would win."""
    modules = {module.name for module in pkgutil.iter_modules(lmdbitmap.__path__)}
    assert len(modules) > 20
    assert modules & set(lmdbitmap.__all__) == set()


def test_the_list_is_all_there_is_to_see() -> None:
    assert dir(lmdbitmap) == sorted(lmdbitmap.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'Stroe'"):
        importlib.import_module("lmdbitmap").Stroe  # noqa: B018


def test_importing_it_loads_no_library() -> None:
    code = (
        "import sys, lmdbitmap; print(sorted({'lmdb', 'msgpack', 'bitarray', 'socket'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_a_library_user_gets_from_a_store_to_extents(tmp_path: Path) -> None:
    """The example at the top of the package."""
    image = tmp_path / "sda.raw"
    image.write_bytes(bytes(1 << 20))
    with lmdbitmap.Store.create(str(tmp_path / "store")) as store:
        lmdbitmap.add(store, "sda", str(image), granularity_bits=16)
        with lmdbitmap.Filter.attach(store, "sda") as disk:
            disk.checkpoint("monday")
            disk.pwrite(b"hello", 100_000)
        extents = list(lmdbitmap.changes_of(store, "sda", since="monday").extents())
    assert extents == [lmdbitmap.Extent(65536, 65536, dirty=True, zero=False)]


def test_a_path_may_be_one_of_pathlibs(tmp_path: Path) -> None:
    """Wherever it is a file's or a folder's."""
    image, moved = tmp_path / "sda.raw", tmp_path / "moved.raw"
    image.write_bytes(bytes(1 << 20))
    with lmdbitmap.Store.create(tmp_path / "store") as store:
        assert lmdbitmap.add(store, "sda", image, granularity_bits=16).image == str(image)
        image.rename(moved)
        assert lmdbitmap.relocate(store, "sda", moved).image == str(moved)
    with lmdbitmap.Store.open(tmp_path / "store") as store, lmdbitmap.Filter.attach(store, "sda") as disk:
        room = lmdbitmap.Scratch(tmp_path)
        [made] = lmdbitmap.back_up(store, ["sda"], tmp_path / "backups", attached={"sda": disk}, scratch=room)
    assert made.entry.disk_size == 1 << 20
    with lmdbitmap.serve_backup(tmp_path / "backups", "sda", tmp_path / "sock") as server:
        assert server.uris == [f"nbd+unix:///sda?socket={tmp_path}/sock"]


def test_every_error_that_the_documents_name_is_there() -> None:
    """Whoever reads that Python raises it wants to catch it."""
    folder = Path(__file__).parents[2]
    told = {
        name
        for path in [folder / "README.md", *(folder / "docs").glob("*.md")]
        for name in re.findall(r"`([A-Z][A-Za-z]+)`", path.read_text())
    }
    errors = {name for name in told if name.endswith("Failed") or name in vars(lmdbitmap.errors)}
    assert len(errors) > 5
    assert errors <= set(lmdbitmap.__all__)
