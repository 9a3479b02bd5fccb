"""A Linux guest lives on our export: ext4, writes, trims, syncs; a server killed under it; then a backup."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.cli.conftest import MIB, Cli, cli
from tests.helpers.guest import booted, requires_guest
from tests.helpers.support import requires, run

__all__ = ["cli"]

FILES = 12
SIZE = 48 * MIB
BLOCK = 1 << 16
pytestmark = [requires_guest, requires("qemu-system-x86_64"), requires("mkfs.ext4"), requires("debugfs")]

WRITE_FILES = f"""mkdir /mnt/new
for i in $(seq {FILES}); do
    dd if=/dev/urandom of=/mnt/new/file$i bs=16k count=20 2>/dev/null && sync && echo wrote $i
done"""


def make_file_system(image: Path) -> None:
    run("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", image)


def differing_blocks(image: Path, before: bytes) -> set[int]:
    now = image.read_bytes()
    assert len(now) == len(before)
    return {
        at // BLOCK for at in range(0, len(now), BLOCK) if now[at : at + BLOCK] != before[at : at + BLOCK]
    }


@pytest.mark.timeout(180)  # the guest is emulated, and the machine may be busy
def test_guest_writes_trims_and_outlives_its_server(cli: Cli) -> None:
    image = cli.add("sda", SIZE)
    make_file_system(image)
    cli.ok("adopt", "sda")
    cli.ok("backup", "sda", cli.folder / "backups")
    before = image.read_bytes()

    with cli.serving("sda", log=True) as first, booted(cli.folder / "sda.sock", "sda") as guest:
        guest.run(
            "mount -t ext4 -o discard /dev/vda /mnt && dd if=/dev/urandom of=/mnt/old bs=1M count=4 && sync"
        )
        guest.run("rm /mnt/old && sync && fstrim -v /mnt")
        guest.start(WRITE_FILES)
        guest.wait_for_line("wrote 3")
        first.child.process.send_signal(signal.SIGKILL)
        first.child.wait()
        with cli.serving("sda", log=True):
            guest.finish()
            sums = guest.run("cd /mnt/new && sha256sum file*; cd /").splitlines()
            guest.run("umount /mnt")
            assert guest.run("dmesg | grep -ci -e 'i/o error' -e 'ext4-fs error' || true") == "0"
            guest.power_off()
    _, dirty = cli.dirty("sda")
    named = {
        block for offset, length in dirty for block in range(offset // BLOCK, -(-(offset + length) // BLOCK))
    }
    changed = differing_blocks(image, before)
    assert changed <= named
    assert len(changed) > FILES

    assert "incremental" in cli.ok("backup", "sda", cli.folder / "backups")
    restored = cli.folder / "restored.raw"
    cli.ok("restore", cli.folder / "backups", "sda", restored)
    assert restored.read_bytes() == image.read_bytes()
    run("e2fsck", "-fn", restored)
    assert len(sums) == FILES
    for line in sums:
        digest, name = line.split()
        run("debugfs", "-R", f"dump /new/{name} {cli.folder / name}", restored)
        assert run("sha256sum", cli.folder / name).stdout.split()[0] == digest
