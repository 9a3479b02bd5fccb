"""A repository and its copy, each pruned at random, and copied again and again: what the copy has reads as it did.

The model keeps what the disk held at each backup, for good, and which of them the copy has.
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from lmdbitmap.repository.manifest import BackupEntry, BackupType
from lmdbitmap.repository.prune import prune
from lmdbitmap.repository.retention import Retention
from lmdbitmap.repository.transfer import copy_backups
from lmdbitmap.repository.verify import verify
from tests.helpers.backed_up import DIFFERENTIAL, FULL, INCREMENTAL
from tests.helpers.tracked import NAME
from tests.property.random_disk import RandomDisk, sizes
from tests.property.test_prune_model import UTC, naive_kept, rules

kinds = st.sampled_from([INCREMENTAL, INCREMENTAL, INCREMENTAL, DIFFERENTIAL, FULL])


class Copies(RandomDisk):
    def __init__(self) -> None:
        super().__init__()
        self.contents: dict[str, bytes] = {}
        self.there: list[str] = []

    @initialize(size=sizes)
    def begin(self, size: int) -> None:
        self.begin_with(size)

    @rule(kind=kinds, compression=st.sampled_from([None, "zlib"]))
    def back_up(self, kind: BackupType, compression: str | None) -> None:
        entry = self.disk.backup(kind, compression=compression)
        self.contents[entry.id] = self.disk.content()

    @precondition(lambda self: self.contents)
    @rule(keep=rules)
    def prune(self, keep: Retention) -> None:
        prune(self.disk.folder / "backups", [NAME], keep=keep, zone=UTC)

    @precondition(lambda self: self.contents)
    @rule()
    def copy(self) -> None:
        source, before = self.disk.manifest().backups, self.there
        self.there = expected(source, before)
        [result] = copy_backups(self.disk.folder / "backups", self.disk.folder / "copy")
        assert [entry.id for entry in result.copied] == [name for name in self.there if name not in before]
        ours = {entry.id for entry in source}
        assert result.only_there == len(set(before) - ours)
        assert result.left_out == len(ours - set(self.there))
        self._check()

    @precondition(lambda self: self.there)
    @rule(keep=rules)
    def prune_the_copy(self, keep: Retention) -> None:
        before = self.disk.manifest("copy").backups
        prune(self.disk.folder / "copy", [NAME], keep=keep, zone=UTC)
        self.there = naive_kept(before, keep)
        self._check()

    def _check(self) -> None:
        backups = self.disk.manifest("copy").backups
        assert [entry.id for entry in backups] == self.there
        assert self.disk.files("copy") == sorted(entry.file for entry in backups)
        for name in self.there:
            assert self.disk.restored(name, "copy") == self.contents[name], name
        assert verify(self.disk.folder / "copy").is_sound

    def check_at_the_end(self) -> None:
        if self.contents:
            self.copy()


def expected(source: tuple[BackupEntry, ...], there: list[str]) -> list[str]:
    """What is newer than all that is there, each with all that it is stacked on down to what is there."""
    parents = {entry.id: entry.parent for entry in source}
    newest, wanted = max(map(int, there), default=0), set(there)
    for entry in source:
        below: str | None = entry.id
        while int(entry.id) > newest and below is not None and below not in wanted:
            wanted.add(below)
            below = parents[below]
    return sorted(wanted, key=int)


TestCopies = Copies.TestCase
TestCopies.settings = settings(
    max_examples=15, stateful_step_count=20, suppress_health_check=[HealthCheck.too_slow]
)
