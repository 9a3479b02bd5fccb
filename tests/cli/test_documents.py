"""The README tells the truth: its session replays, its library block runs, and every verb is in the documents."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.support import requires, run

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


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


@pytest.mark.parametrize(
    ("document", "number"), [("README.md", 0), ("docs/backup.md", 0), ("docs/backup.md", 1)]
)
def test_the_library_block_prints_what_its_comments_say(
    document: str, number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    block = library_blocks(document)[number]
    promised = re.findall(r"print\(.*\) +# (.*)", block)
    exec(compile(block, document, "exec"), {})
    assert capsys.readouterr().out.splitlines() == promised != []


def test_no_library_block_is_left_untried() -> None:
    assert [len(library_blocks(document)) for document in ("README.md", "docs/backup.md")] == [1, 2]


def test_the_first_runnable_line_comes_early_and_the_whole_is_short() -> None:
    lines = README.splitlines()
    assert next(number for number, line in enumerate(lines) if line.startswith("$ ")) < 20
    assert len(lines) <= 160


def test_every_link_leads_somewhere() -> None:
    targets = [target for target in re.findall(r"\]\(([^)#]+)", README) if "://" not in target]
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_every_verb_is_in_the_documents() -> None:
    listed = run(sys.executable, "-m", "lmdbitmap", "--help").stdout.partition("Commands:")[2]
    verbs = re.findall(r"^  ([a-z]+)  ", listed, re.MULTILINE)
    documents = README + "".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))
    assert len(verbs) > 10
    assert [verb for verb in verbs if f"## lmdbitmap {verb}\n" not in documents] == []
