"""A restore killed at any step: its name is not there, or what it names is whole; and it can be had again."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmdbitmap.errors import AlreadyExists
from lmdbitmap.restore import restore
from tests.contract.implementations import can_make_loop_devices, loop_node
from tests.crash.dying import Death, Deaths
from tests.crash.lives import BLOCK, FEW_BLOCKS
from tests.tracked import NAME


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
        last = deaths("restoring_to_a_device", side_by_side=1)[-1]
        assert (last.step, last.told) == ("at the end", ("restored",))
        assert node.read_bytes() == (last.folder / "2.raw").read_bytes()
