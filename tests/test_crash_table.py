"""DESIGN.md's crash table is as long as the lives that die, and every row names the test that proves it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.crash.lives import LIVES

ROOT = Path(__file__).parent.parent
SECTION = "## If it dies here, you pay this"
HEAD = ["dies", "you pay", "test", "lives"]
TEST = re.compile(r"`(?P<file>[\w/]+\.py)::(?P<function>\w+)`")


class Row(NamedTuple):
    dies: str
    pays: str
    test: str
    lives: list[str]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def rows() -> list[Row]:
    """The table's rows; `same` stands for the test above."""
    section = (ROOT / "DESIGN.md").read_text().split(SECTION)[1].split("\n## ")[0]
    head, rule, *lines = [cells(line) for line in section.splitlines() if line.startswith("|")]
    assert (head, set("".join(rule))) == (HEAD, {"-"})
    found: list[Row] = []
    for dies, pays, test, lives in lines:
        told = found[-1].test if test == "same" else test
        found.append(Row(dies, pays, told, re.findall(r"`(\w+)`", lives)))
    return found


def source_of(row: Row) -> str:
    """The test that a row names, with its decorators."""
    named = TEST.fullmatch(row.test)
    assert named is not None, f"{row.dies}: {row.test!r} names no test as `file.py::function`"
    text = (ROOT / "tests" / named["file"]).read_text()
    for node in functions(ast.parse(text)):
        if node.name == named["function"]:
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            return "\n".join(text.splitlines()[first - 1 : node.end_lineno])
    raise AssertionError(f"{row.dies}: {named['file']} has no test {named['function']}")


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    return (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"))


@pytest.mark.parametrize("row", rows(), ids=lambda row: re.sub(r"\W+", "-", row.dies))
def test_every_row_names_a_test_that_lets_its_lives_die(row: Row) -> None:
    source = source_of(row)
    assert [life for life in row.lives if f'"{life}"' not in source] == [], row
    assert row.dies, row
    assert row.pays, row


def test_every_life_has_its_row() -> None:
    named = [life for row in rows() for life in row.lives]
    assert sorted(set(named)) == sorted(LIVES)


def test_every_operation_has_its_row() -> None:
    """Of those that change something; a verb that is new is to be added here, and to the table."""
    told = " ".join(row.dies for row in rows())
    operations = (
        "add", "attach", "arming", "background pass", "checkpoint", "forget", "resize", "detach", "adopt", "rm",
        "mark", "export", "import", "combine", "serve --bitmap-file", "backup", "restore", "prune", "copy", "sync",
    )  # fmt: skip
    assert [name for name in operations if not re.search(rf"\b{name}\b", told)] == []
