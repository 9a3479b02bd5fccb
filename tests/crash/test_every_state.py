"""In every state that trouble leaves behind, every verb does its work or says in one sentence what to do.

docs/store.md has the states (states.py brings them about), and what `check` says of each.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from lmdbitmap.cli.main import run
from lmdbitmap.filter import Filter
from lmdbitmap.store import Store
from tests.crash.states import BLOCK, STATES, State
from tests.helpers.backed_up import FULL, INCREMENTAL, RESCAN, BackedUpDisk
from tests.helpers.tracked import NAME, quick_folder

SIZE = 64 * BLOCK + 512
VERBS: list[tuple[str, ...]] = [
    ("ls",), ("info", NAME), ("check",), ("changes", NAME), ("show", NAME), ("export", NAME, "OUT"),
    ("checkpoint", NAME, "now"), ("mark", NAME, "0", "1"), ("backup", NAME, "REPO"),
    ("backup", NAME, "REPO", "--differential"), ("backup", NAME, "REPO", "--full"),
]  # fmt: skip


NEXT = {"a full one": FULL, "a rescan": RESCAN, "an increment": INCREMENTAL}
"""How docs/store.md calls what the next backup is."""


@contextmanager
def brought_about(state: State) -> Iterator[BackedUpDisk]:
    with quick_folder() as folder:
        tracked = BackedUpDisk(folder, SIZE, durability=state.durability)
        tracked.write(b"old", 0)
        tracked.backup()
        tracked.write(b"new", 9 * BLOCK)
        with closing(tracked), state.bring_about(tracked):
            yield tracked


class Shell:
    """Runs verbs on the disk's store, as a person would who knows nothing of its state."""

    def __init__(self, tracked: BackedUpDisk, capsys: pytest.CaptureFixture[str]) -> None:
        self._tracked = tracked
        self._capsys = capsys

    def __call__(self, *words: str) -> tuple[int, str, str]:
        folder = self._tracked.folder
        places = {
            "REPO": str(folder / "backups"),
            "OUT": str(folder / "out.dbm"),
            "RAW": str(folder / "out.raw"),
        }
        self._capsys.readouterr()
        code = run(["--store", self._tracked.store.path, *(places.get(word, word) for word in words)])
        said, complained = self._capsys.readouterr()
        if code:
            assert complained.startswith("lmdbitmap: "), (words, complained)
            assert (complained.count("\n"), "; " in complained) == (1, True), (words, complained)
        return code, said, complained

    def ok(self, *words: str) -> str:
        code, said, complained = self(*words)
        assert code == 0, (words, complained)
        return said


def named(*, backed_up: bool) -> list[str]:
    return [name for name, state in STATES.items() if bool(state.why_no_backup) is not backed_up]


@pytest.mark.parametrize("name", STATES)
def test_every_verb_works_or_says_what_to_do(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One after the other: what one of them mends, the next one finds mended."""
    with brought_about(STATES[name]) as tracked:
        shell = Shell(tracked, capsys)
        codes = [shell(*words)[0] for words in VERBS]
    assert set(codes) <= {0, 1, 2, 3, 4}
    assert codes[0] == 0, "ls tells what there is in every state"


@pytest.mark.parametrize("name", STATES)
def test_check_says_what_is_wrong_and_the_next_step(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    state = STATES[name]
    with brought_about(state) as tracked:
        code, said, _ = Shell(tracked, capsys)("check")
    assert code == state.exit_code, said
    told = [line for line in said.splitlines() if state.says in line]
    assert told, said
    assert any(state.step in line for line in told), said
    assert any("adopt" in line for line in told) is ("adopt" in state.step), said


@pytest.mark.parametrize("name", [name for name, state in STATES.items() if "adopt" in state.step])
def test_what_may_be_adopted_is_trusted_afterwards(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with brought_about(STATES[name]) as tracked:
        shell = Shell(tracked, capsys)
        shell.ok("adopt", NAME)
        shell.ok("check")
        shell.ok("changes", NAME)


@pytest.mark.parametrize("name", named(backed_up=True))
def test_full_backup_always_works_and_everything_is_as_ever_after_it(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with brought_about(STATES[name]) as tracked:
        shell = Shell(tracked, capsys)
        assert "full" in shell.ok("backup", NAME, "REPO", "--full")
        is_as_ever(tracked, shell)


@pytest.mark.parametrize("name", named(backed_up=True))
def test_next_backup_of_any_kind_is_right(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Except where only a person can say that a new chain may begin."""
    state = STATES[name]
    with brought_about(state) as tracked:
        shell = Shell(tracked, capsys)
        if state.why_no_increment:
            code, _, said = shell("backup", NAME, "REPO")
            assert (code, state.why_no_increment in said) == (1, True)
            return
        shell.ok("backup", NAME, "REPO")
        told, made = documented()[name][2], tracked.manifest().backups[-1]
        [word] = [word for word, kind in NEXT.items() if told.startswith(word)]
        assert made.type_actual is NEXT[word], name
        if made.type_actual is INCREMENTAL:
            assert (made.bytes_changed == SIZE) is ("copies" in told), name
        shell.ok("restore", "REPO", NAME, "RAW")
        assert (tracked.folder / "out.raw").read_bytes() == tracked.content()
        if state.exit_code == 1:
            shell.ok("backup", NAME, "REPO", "--full")
        is_as_ever(tracked, shell)


@pytest.mark.parametrize("name", named(backed_up=True))
def test_disk_is_served_at_once_and_the_next_backup_is_right(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with brought_about(STATES[name]) as tracked:
        shell = Shell(tracked, capsys)
        with closing(Store.open(tracked.store.path)) as store, Filter.attach(store, NAME) as disk:
            disk.pwrite(b"guest", 2 * BLOCK)
            disk.checkpoint("served")
            disk.pwrite(b"again", BLOCK)
        shell.ok("backup", NAME, "REPO", *(["--full"] if STATES[name].why_no_increment else []))
        shell.ok("restore", "REPO", NAME, "RAW")
        assert (tracked.folder / "out.raw").read_bytes() == tracked.content()


def is_as_ever(tracked: BackedUpDisk, shell: Shell) -> None:
    """What was backed up is what is there; nothing is wrong any more; an increment is one."""
    tracked.store.close()
    assert tracked.restored() == tracked.content()
    code, said, _ = shell("check")
    assert code == 0, said
    tracked.store = Store.open(tracked.store.path)
    tracked.write(b"later", BLOCK)
    entry = tracked.backup()
    assert (entry.type_actual, entry.bytes_changed) == (
        INCREMENTAL,
        2 * BLOCK if entry.cluster_size > BLOCK else BLOCK,
    )
    assert tracked.restored() == tracked.content()
    tracked.store.close()


@pytest.mark.parametrize("name", named(backed_up=False))
def test_what_keeps_every_backup_away_is_said_in_words(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    state = STATES[name]
    with brought_about(state) as tracked:
        shell = Shell(tracked, capsys)
        for words in (["backup", NAME, "REPO"], ["backup", NAME, "REPO", "--full"]):
            code, _, said = shell(*words)
            assert code != 0
            assert state.why_no_backup in said


def documented() -> dict[str, list[str]]:
    """What docs/store.md says of each state: what `check` says, its next step, and the next backup."""
    text = (Path(__file__).parents[2] / "docs" / "store.md").read_text()
    section = text.split("## Every state")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")][2:]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}


def test_every_state_is_documented_in_the_words_that_check_uses() -> None:
    rows = documented()
    assert list(rows) == list(STATES)
    for name, state in STATES.items():
        said, step, _ = rows[name]
        assert f"({state.exit_code})" in said, name
        assert state.says in said, name
        assert state.step in step, name
