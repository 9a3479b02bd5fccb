"""The README tells the truth: its session replays, its library block runs, and every verb is in the documents."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import lmdbitmap
from tests.helpers.support import requires, run
from tests.helpers.tracked import quick_folder

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
WITH_LIBRARY_BLOCKS = ["README.md", "docs/python.md"]
GUIDE = ROOT / "docs" / "python.md"


@requires("qemu-io")
def test_the_session_and_the_help_still_print_what_the_documents_show() -> None:
    done = subprocess.run(
        [sys.executable, "tools/documents.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, (
        f"run tools/documents.py and look at what changed\n{done.stdout}{done.stderr}"
    )


def library_blocks(document: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)


@pytest.mark.parametrize("document", WITH_LIBRARY_BLOCKS)
def test_the_library_blocks_print_what_their_comments_say(
    document: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All blocks of a document run in order, as one program."""
    program = "\n".join(library_blocks(document))
    promised = re.findall(r"print\(.*\) +# (.*)", program)
    with quick_folder() as folder:
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        exec(compile(program, document, "exec"), {})
    assert capsys.readouterr().out.splitlines() == promised != []


def test_no_library_block_is_left_untried() -> None:
    documents = [path.relative_to(ROOT).as_posix() for path in DOCUMENTS]
    assert [document for document in documents if library_blocks(document)] == WITH_LIBRARY_BLOCKS


def test_the_guide_for_agents_names_everything_that_is_public() -> None:
    """In one of its two tables, once. In the table of errors: each class that is one, and no other."""
    names, errors = (names_in_table(under) for under in ("All names", "Errors"))
    public_errors = [name for name in lmdbitmap.__all__ if is_error(getattr(lmdbitmap, name))]
    assert sorted(errors) == sorted(public_errors)
    assert sorted(names + errors) == sorted(lmdbitmap.__all__)


def names_in_table(heading: str) -> list[str]:
    """The names in the second column of the guide's table of tasks, or in the first of that of errors."""
    [table] = re.findall(rf"^## {heading}\n(.*?)^## ", GUIDE.read_text(), re.DOTALL | re.MULTILINE)
    column = 2 if heading == "All names" else 1
    return [
        name
        for row in re.findall(r"^\|.*", table, re.MULTILINE)
        for name in re.findall(r"`(\w+)`", row.split("|")[column])
    ]


def is_error(found: object) -> bool:
    return isinstance(found, type) and issubclass(found, lmdbitmap.LmdbitmapError)


def test_the_first_runnable_line_comes_early_and_the_whole_is_short() -> None:
    lines = README.splitlines()
    assert next(number for number, line in enumerate(lines) if line.startswith("$ ")) < 20
    assert len(lines) <= 160


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_somewhere(document: Path) -> None:
    """To a file that is there, and to a heading of it."""
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text()) if "://" not in link]
    assert links or document.name not in ("README.md", "python.md")
    assert [link for link in links if not leads_somewhere(document, *link.partition("#")[::2])] == []


def leads_somewhere(document: Path, path: str, anchor: str) -> bool:
    target = document.parent / path if path else document
    return target.exists() and (not anchor or anchor in anchors_of(target))


def anchors_of(document: Path) -> set[str]:
    """The anchors that GitHub gives to its headings."""
    headings = re.findall(r"^#+ (.*)", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_verb_is_in_the_documents() -> None:
    listed = run(sys.executable, "-m", "lmdbitmap", "--help").stdout.partition("Commands:")[2]
    verbs = re.findall(r"^  ([a-z]+)  ", listed, re.MULTILINE)
    documents = README + "".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))
    assert len(verbs) > 10
    assert [verb for verb in verbs if f"## lmdbitmap {verb}\n" not in documents] == []
