"""A Linux guest works on its file system while it is backed up ten times; every restore is a file system of its moment.

What each restore has to stand, on a copy of it:

- `e2fsck -fy` does what a mount does, and its passes find nothing else: it replays the journal, lets go of files that
  were being deleted, and adds up the free blocks and inodes of all groups anew, of which the kernel keeps no sum on
  the disk (a wrong count of a group would be a failure). `e2fsck -fn` then finds a clean file system.
- Where the guest was frozen for the moment (`--hook`), `e2fsck -fn` finds it clean as it is: there is no journal to
  replay.
- What the guest had synced, and said so before the backup began, is there: files with all that was written to them,
  every block that was rewritten in place, and no file whose deletion was synced. What it did later than the backup is
  not there. (debugfs reads it, without a mount.)
"""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.cli.conftest import MIB, Cli, cli
from tests.helpers import guest_console
from tests.helpers.guest import Guest, booted, requires_guest
from tests.helpers.support import requires, run

__all__ = ["cli"]

SIZE = 64 * MIB
BACKUPS = 10
FROZEN = (3, 6, 9)
KEPT = 40
"""Files that are there at once."""
SLOTS, SLOT = 16, 4096
"""Of the file that is rewritten in place."""
LINES = 1500
pytestmark = [requires_guest, requires("qemu-system-x86_64"), requires("mkfs.ext4"), requires("debugfs")]

OPEN_SECOND_LINE = """stty -F /dev/ttyS1 -echo
setsid sh -c 'exec sh </dev/ttyS1 >/dev/ttyS1 2>&1' &"""
WORK = f"""i=0; while test ! -e /stop; do
    i=$((i + 1))
    seq $i $((i + {LINES})) >/mnt/file$i
    yes $(printf %07d $i) | head -c {SLOT} | dd of=/mnt/slots bs={SLOT} seek=$((i % {SLOTS})) conv=notrunc 2>/dev/null
    test $i -le {KEPT} || rm /mnt/file$((i - {KEPT}))
    sync && echo synced $i
done"""
HARMLESS = re.compile(
    r"e2fsck \d.*|Pass \d: .*|.*: recovering journal|(Clearing|Truncating) orphaned inode .*"
    r"|Free (blocks|inodes) count wrong \(\d+, counted=\d+\)\.|Fix\? yes"
    r"|.*: \*{5} FILE SYSTEM WAS MODIFIED \*{5}|.*: \d+/\d+ files .*|"
)


class Moment(NamedTuple):
    """Rounds of the guest's work that were done when a backup began, and that were begun at most when it ended."""

    done: int
    begun: int


@pytest.mark.timeout(240)  # the guest is emulated, and the machine may be busy
def test_every_backup_of_a_working_guest_is_a_file_system_of_its_moment(cli: Cli) -> None:
    image, line = cli.add("sda", SIZE), cli.folder / "line"
    run("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", image)
    cli.ok("adopt", "sda")
    second_line = ("-serial", f"unix:{line},server=on,wait=off")
    with cli.serving("sda") as served, booted(cli.folder / "sda.sock", "sda", *second_line) as guest:
        guest.run(f"mount -t ext4 -o discard /dev/vda /mnt && {OPEN_SECOND_LINE}")
        guest.start(WORK)
        moments = [backed_up(cli, guest, number, line) for number in range(1, BACKUPS + 1)]
        assert guest_console.tell(str(line), "touch /stop") == 0
        guest.finish()
        guest.run("umount /mnt")
        assert guest.run("dmesg | grep -ci -e 'i/o error' -e 'ext4-fs error' || true") == "0"
        guest.power_off()
        assert served.child.stderr == ""
    assert moments == sorted(moments)
    for number, moment in enumerate(moments, 1):
        restored = cli.folder / f"{number}.raw"
        cli.ok("restore", cli.folder / "backups", "sda", restored, "--at", number)
        holds(read(mended(restored, frozen=number in FROZEN)), moment)


def backed_up(cli: Cli, guest: Guest, number: int, line: Path) -> Moment:
    """Made after some more rounds of work, in a process of its own, as the server has the disk."""
    guest.wait_for_line(f"^synced {rounds_done(guest) + 2}$")
    done = rounds_done(guest)
    words = ["backup", "sda", cli.folder / "backups", "--json"]
    if number in FROZEN:
        words += ["--hook", shlex.join([sys.executable, guest_console.__file__, str(line)])]
    told = run(*cli.command(*words), timeout=60).stdout
    assert f'"type": "{"full" if number == 1 else "incremental"}"' in told
    # What the guest said before this was read, however far behind its console is.
    assert guest_console.tell(str(line), f"echo backed up {number} >/dev/ttyS0") == 0
    guest.wait_for_line(f"^backed up {number}$")
    return Moment(done, rounds_done(guest) + 1)


def rounds_done(guest: Guest) -> int:
    found = [int(line.removeprefix("synced ")) for line in guest.lines() if line.startswith("synced ")]
    return found[-1] if found else 0


# --- what a restore has to stand ---


def mended(restored: Path, *, frozen: bool) -> Path:
    """The restored file system, whose journal is replayed unless that has to be empty."""
    if not frozen:
        said = run("e2fsck", "-fy", restored, check=False)
        assert said.returncode in (0, 1), said
        assert [
            line for line in (said.stdout + said.stderr).splitlines() if not HARMLESS.fullmatch(line)
        ] == []
    clean = run("e2fsck", "-fn", restored)
    assert "journal" not in clean.stdout + clean.stderr, clean
    assert "needs_recovery" not in run("dumpe2fs", "-h", restored).stdout
    return restored


def read(file_system: Path) -> Path:
    """All of its files, in a folder."""
    folder = file_system.with_suffix("")
    folder.mkdir()
    run("debugfs", "-R", f"rdump / {folder}", file_system)
    return folder


def holds(folder: Path, moment: Moment) -> None:
    """Whatever round is the newest in there: what was synced before is whole, as far as no round deleted it since."""
    numbers = {int(path.name.removeprefix("file")) for path in folder.glob("file*")}
    newest = max(numbers)
    assert moment.done <= newest <= moment.begun, (numbers, moment)
    assert min(numbers) > moment.done - KEPT, (numbers, moment)
    synced = range(max(1, newest - KEPT + 1), moment.done + 1)
    assert set(synced) <= numbers, (numbers, moment)
    assert synced, (numbers, moment)
    for number in synced:
        assert (folder / f"file{number}").read_text() == content(number), (number, moment)
    data = (folder / "slots").read_bytes()
    for slot in range(SLOTS):
        slot_holds(data[slot * SLOT : (slot + 1) * SLOT].ljust(SLOT, b"\0"), slot, moment)
    shutil.rmtree(folder)


def content(number: int) -> str:
    return "".join(f"{line}\n" for line in range(number, number + LINES + 1))


def slot_holds(data: bytes, slot: int, moment: Moment) -> None:
    """The stamp of one round: the last one that had written it, or a later one, and that perhaps not to its end: the
    guest writes a slot in pieces, and what it has not synced is on its disk as far as it happens to be."""
    least = max((number for number in range(1, moment.done + 1) if number % SLOTS == slot), default=0)
    found = int(data[:7].strip(b"\0") or b"0")
    assert found % SLOTS == slot or found == 0, (slot, found, moment)
    assert least <= found <= moment.begun, (slot, found, moment)
    differing = (at for at, (one, other) in enumerate(zip(data, stamp(found), strict=True)) if one != other)
    written = next(differing, SLOT)
    assert written == SLOT or found > moment.done, (slot, found, moment)
    assert data[written:] == stamp(found - SLOTS)[written:], (slot, found, moment)


def stamp(number: int) -> bytes:
    return b"%07d\n" % number * (SLOT // 8) if number > 0 else bytes(SLOT)
