"""Random chains, pruned at random: every backup that stays reads as it did, here and by QEMU, and no other is left.

The model keeps what the disk held at each backup, and which of them the rules keep, told in another way.
"""

from __future__ import annotations

import datetime
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from lmdbitmap.repository.manifest import BackupEntry, BackupType
from lmdbitmap.repository.prune import prune
from lmdbitmap.repository.retention import Retention
from lmdbitmap.repository.verify import verify
from tests.helpers.backed_up import DIFFERENTIAL, FULL, INCREMENTAL, BackedUpDisk
from tests.helpers.tracked import NAME
from tests.property.random_disk import RandomDisk, sizes

UTC = datetime.timezone.utc

kinds = st.sampled_from([INCREMENTAL, INCREMENTAL, INCREMENTAL, DIFFERENTIAL, FULL])
counts = st.integers(0, 4)
rules = st.tuples(counts, counts, counts, counts).filter(any).map(lambda numbers: Retention(*numbers))


class Prunes(RandomDisk):
    def __init__(self) -> None:
        super().__init__()
        self.contents: dict[str, bytes] = {}
        self.pruned = False

    @initialize(size=sizes)
    def begin(self, size: int) -> None:
        self.begin_with(size)

    @rule(
        kind=kinds,
        compression=st.sampled_from([None, "zlib", "zstd"]),
        digest=st.sampled_from([None, "sha256", "blake3"]),
    )
    def back_up(self, kind: BackupType, compression: str | None, digest: str | None) -> None:
        entry = self.disk.backup(kind, compression=compression, digest=digest)
        self.contents[entry.id] = self.disk.content()
        if kind is INCREMENTAL and len(self.contents) > 1:
            assert entry.type_actual is INCREMENTAL, "a prune takes nothing from the next increment"
        assert self.disk.restored() == self.contents[entry.id]

    @precondition(lambda self: self.contents)
    @rule(keep=rules)
    def prune(self, keep: Retention) -> None:
        before = self.disk.manifest()
        promised = prune(self.disk.folder / "backups", [NAME], keep=keep, zone=UTC, dry_run=True)
        assert self.disk.manifest() == before
        [result] = prune(self.disk.folder / "backups", [NAME], keep=keep, zone=UTC)
        stay = naive_kept(before.backups, keep)
        assert [entry.id for entry in result.kept] == [entry.id for entry in promised[0].kept] == stay
        assert result.rewritten == promised[0].rewritten
        self.contents = {name: content for name, content in self.contents.items() if name in stay}
        self._check(before.backups)

    def _check(self, before: tuple[BackupEntry, ...]) -> None:
        manifest = self.disk.manifest()
        assert [entry.id for entry in manifest.backups] == list(self.contents)
        assert self.disk.files() == sorted(entry.file for entry in manifest.backups)
        was = {entry.id: entry for entry in before}
        for entry in manifest.backups:
            assert self.disk.restored(entry.id) == self.contents[entry.id]
            old = was[entry.id]
            for name in ("sequence", "file", "time_ns", "checkpoint", "epoch", "disk_size", "granularity",
                         "digest_algorithm"):  # fmt: skip
                assert getattr(entry, name) == getattr(old, name)
        assert verify(self.disk.folder / "backups").is_sound

    def check_at_the_end(self) -> None:
        if self.contents:
            self._check(self.disk.manifest().backups)
            agrees_with_qemu(self.disk, self.contents)


def agrees_with_qemu(disk: BackedUpDisk, contents: dict[str, bytes]) -> None:
    """QEMU shows the disk rounded up to a sector, in zeroes."""
    if shutil.which("qemu-img") is None:
        return
    truth = disk.folder / "truth.raw"
    for entry in disk.manifest().backups:
        image = Path(disk.backup_folder().path_of(entry.file))
        content = contents[entry.id]
        truth.write_bytes(content + bytes(-len(content) % 512))
        for words in (
            ["check", "-q", image],
            ["compare", "-q", "-f", "qcow2", "-F", "raw", image, truth],
        ):
            done = subprocess.run(["qemu-img", *map(str, words)], capture_output=True, text=True)
            assert done.returncode == 0, (words, done.stdout, done.stderr)


def naive_kept(backups: tuple[BackupEntry, ...], keep: Retention) -> list[str]:
    stay = {backups[-1].id}
    for count, form in zip(
        (keep.last, keep.daily, keep.weekly, keep.monthly), ("", "%Y-%m-%d", "%G-%V", "%Y-%m"), strict=True
    ):
        stay |= set(newest_by(backups, form, count))
    return [entry.id for entry in backups if entry.id in stay]


def newest_by(backups: tuple[BackupEntry, ...], form: str, count: int) -> Iterator[str]:
    seen: list[str] = []
    for entry in backups[::-1]:
        moment = datetime.datetime.fromtimestamp(entry.time_ns // 10**9, UTC)
        key = moment.strftime(form) if form else entry.id
        if key not in seen and len(seen) < count:
            seen.append(key)
            yield entry.id


TestPrunes = Prunes.TestCase
TestPrunes.settings = settings(
    max_examples=15, stateful_step_count=20, suppress_health_check=[HealthCheck.too_slow]
)
