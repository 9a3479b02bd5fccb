"""A restore killed at any step: its name is not there, or what it names is whole; and it can be had again.

Of one that goes through a tracker, the next increment has whatever it changed.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from lmdbitmap.backups.backup import backup
from lmdbitmap.errors import AlreadyExists
from lmdbitmap.repository.manifest import BackupType
from lmdbitmap.restoring.restore import restore
from lmdbitmap.store import Store
from lmdbitmap.tracker import chain
from tests.contract.implementations import can_make_loop_devices, loop_node
from tests.crash.dying import Death, Deaths
from tests.crash.lives import BLOCK, FEW_BLOCKS
from tests.helpers.tracked import NAME


@pytest.mark.parametrize("life", ["restoring", "restoring_by_hand"])
def test_a_killed_restore_leaves_no_name_or_a_whole_disk(life: str, deaths: Deaths) -> None:
    """`restoring_by_hand` has an empty file there before, which stays empty until the disk is whole."""
    fates = {True: 0, False: 0}
    for death in deaths(life):
        out = death.folder / "out.raw"
        is_done = out.exists() and out.stat().st_size > 0
        fates[is_done] += 1
        assert is_done or not death.told, death
        if is_done:
            is_backed_up_content(death, out)
            with pytest.raises(AlreadyExists):  # whoever asks again is told that it is there
                restore(death.folder / "backups", NAME, out)
        else:
            restore(death.folder / "backups", NAME, out)
            is_backed_up_content(death, out)
        assert [path.name for path in death.folder.glob("out.raw*")] == ["out.raw"], death
    assert min(fates.values()) >= 1


def is_backed_up_content(death: Death, restored: Path) -> None:
    """As at the second backup; the image was written after it."""
    assert restored.read_bytes() == (death.folder / "2.raw").read_bytes(), death
    assert restored.read_bytes() != (death.folder / "disk.raw").read_bytes(), death


@pytest.mark.skipif(not can_make_loop_devices(), reason="a loop device cannot be had here: run as root")
def test_a_killed_restore_onto_a_block_device_is_done_by_doing_it_again(deaths: Deaths) -> None:
    """Each goes over what the one before left of the same device; the last one comes to its end."""
    with loop_node(deaths.graves, FEW_BLOCKS * BLOCK) as node:
        node.write_bytes(b"old" * (FEW_BLOCKS * BLOCK // 3) + b"!")
        (deaths.graves / "device").symlink_to(node)
        *_, last = deaths("restoring_to_a_device", side_by_side=1)
        assert (last.step, last.told) == ("at the end", ("restored",))
        assert node.read_bytes() == (last.folder / "2.raw").read_bytes()


def test_a_killed_restore_in_place_is_done_by_doing_it_again(deaths: Deaths) -> None:
    """Some are killed when a part is written; what is right by then is not written again."""
    written = []
    for death in deaths("restoring_in_place"):
        copy = death.folder / "copy.raw"
        again = restore(death.folder / "backups", NAME, copy, in_place=True)
        written.append(again.bytes_written + again.bytes_zeroed)
        assert copy.read_bytes() == (death.folder / "2.raw").read_bytes(), death
        assert again.bytes_written == 0 or not death.told, death
    assert len(set(written)) >= 3, "killed with nothing, a part and all of it written"
    assert written[-1] == 0


@pytest.mark.parametrize("again", [True, False])
def test_whatever_a_killed_restore_changed_is_in_the_next_increment(deaths: Deaths, again: bool) -> None:
    """Through the tracker: the epoch stays, and the backup is right whether the restore is done again or not."""
    survivors = set()
    for death in deaths("restoring_what_is_tracked"):
        image, repository = death.folder / "disk.raw", death.folder / "backups"
        survivors.add(image.read_bytes())
        with Store.open(str(death.folder / "store")) as store:
            with store.read() as reader:
                epoch = chain.find_disk(reader, NAME).epoch
            if again:
                restore(repository, NAME, image, at="1", in_place=True, store=store)
                assert image.read_bytes() == (death.folder / "1.raw").read_bytes(), death
            [made] = backup(store, [NAME], repository)
        assert (made.entry.type_actual, made.entry.epoch) == (BackupType.INCREMENTAL, epoch), death
        restore(repository, NAME, death.folder / "out.raw")
        assert (death.folder / "out.raw").read_bytes() == image.read_bytes(), death
    assert len(survivors) >= 3, "killed with nothing, a part and all of it written"
