"""The names of checkpoints that are made by themselves."""

from __future__ import annotations

import pytest

from lmdbitmap.notes.checkpoint_names import Maker


def test_a_checkpoint_of_a_backup_has_a_name_of_its_own_that_tells_the_time() -> None:
    names = {Maker.BACKUP.new_name(1_700_000_000_123_456_789) for _ in range(10)}
    assert len(names) == 10
    assert all(name.startswith("backup-20231114T221320Z-") and Maker.BACKUP.named(name) for name in names)


@pytest.mark.parametrize("name", ["monday", "backup-1", "backup-20231114T221320Z-0a1b2", "epoch-1"])
def test_a_checkpoint_of_somebody_else_is_told_apart(name: str) -> None:
    assert not Maker.BACKUP.named(name)
