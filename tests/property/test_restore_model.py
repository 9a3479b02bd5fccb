"""Random backups, and ways back to any of them, beside copies of the disk: what a restore changes is what differs."""

from __future__ import annotations

from contextlib import closing

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmdbitmap.repository.manifest import BackupType
from lmdbitmap.restoring.restore import restore
from tests.helpers.backed_up import BackedUpDisk
from tests.helpers.tracked import NAME, blocks_of, quick_folder

BLOCK = 4096
BLOCKS = 40

writes = st.tuples(st.integers(0, BLOCKS * BLOCK), st.integers(1, 5 * BLOCK), st.integers(0, 3))
steps = st.lists(
    st.lists(writes, min_size=1, max_size=4) | st.integers(0, 100),  # write and back up, or go back
    min_size=3,
    max_size=8,
)


@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(size=st.integers(1, BLOCKS * BLOCK), steps=steps)
def test_the_next_increment_holds_what_the_restore_changed(
    size: int, steps: list[list[tuple[int, int, int]] | int]
) -> None:
    with quick_folder() as folder, closing(BackedUpDisk(folder, size)) as disk:
        disk.backup()
        contents = [disk.content()]
        for step in steps:
            if isinstance(step, int):
                go_back(disk, contents, step % len(contents))
            else:
                for offset, length, value in step:
                    disk.write(bytes([value]) * min(length, size - offset % size), offset % size)
            entry = disk.backup()
            assert entry.type_actual is BackupType.INCREMENTAL
            contents.append(disk.content())
            assert disk.restored() == contents[-1]
        assert [disk.restored(str(number)) for number in range(1, len(contents) + 1)] == contents


def go_back(disk: BackedUpDisk, contents: list[bytes], number: int) -> None:
    before, after, epoch = disk.content(), contents[number], disk.disk().epoch
    result = restore(
        disk.folder / "backups", NAME, disk.image, at=str(number + 1), in_place=True, store=disk.store
    )
    different = {
        offset // BLOCK
        for offset in range(0, len(before), BLOCK)
        if before[offset : offset + BLOCK] != after[offset : offset + BLOCK]
    }
    assert disk.content() == after
    assert blocks_of(disk.changes()) == different
    assert disk.disk().epoch == epoch
    assert result.bytes_written + result.bytes_zeroed <= len(different) * BLOCK
