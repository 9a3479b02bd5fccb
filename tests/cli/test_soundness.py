"""check: sound is 0, damage is 1, a disk that needs a full backup is 3."""

from __future__ import annotations

import json
import os

from lmdbitmap.storage import schema
from lmdbitmap.store import Store
from tests.cli.conftest import Cli
from tests.helpers.support import run


def _spoil(cli: Cli) -> None:
    """A region record: all that it stands for counts as dirty."""
    with Store.open(str(cli.store)) as store:
        store.update(lambda writer: writer._put("regions", schema.region_key(1, 0), b"\xc1"))


def test_a_sound_store_is_called_so(cli: Cli) -> None:
    cli.add("sda")
    assert cli.ok("check") == f"{cli.store}: sound\n"
    assert cli.json("check") == {"store": str(cli.store), "sound": True, "findings": []}


def test_damage_is_named_and_ends_in_1(cli: Cli) -> None:
    cli.add("sda")
    _spoil(cli)
    code, out, err = cli("check")
    assert (code, err) == (1, "lmdbitmap: the store is damaged; do what the findings say\n")
    assert out.startswith("damage: bitmap 1 (checkpoint 'epoch-1' of disk 'sda'): 1 of its region records")
    assert out.count("\n") == 1


def test_damage_is_told_to_programs(cli: Cli) -> None:
    cli.add("sda")
    _spoil(cli)
    answer = json.loads(cli("check", "--json").out)
    assert answer["sound"] is False
    assert [sorted(finding) for finding in answer["findings"]] == [
        ["gravity", "next_step", "place", "problem"]
    ]
    assert answer["findings"][0]["gravity"] == "damage"


def test_a_disk_that_needs_a_full_backup_ends_in_3(cli: Cli) -> None:
    image = cli.add("sda")
    os.utime(image, ns=(2**61, 2**61))
    code, out, err = cli("check")
    assert code == 3
    assert out.startswith("full backup needed: disk 'sda': the image was written while it was not tracked; ")
    assert err.startswith("lmdbitmap: the store is sound, but not every disk can be trusted")
    assert json.loads(cli("check", "--json").out)["sound"] is True


def test_notes_are_no_failure(cli: Cli) -> None:
    cli.add("sda")
    (cli.store / "owners" / "stray.0123456789abcdef.partial").touch()
    assert cli.ok("check").startswith("note: ")


def test_any_verb_makes_a_store_anew_that_lost_a_description_and_says_so(cli: Cli) -> None:
    """In a process of its own: people see what is logged."""
    cli.add("sda")
    with Store.open(str(cli.store)) as store:
        store.update(lambda writer: writer._put("disks", b"\xff" * 16, b"\xc1"))
    said = run(*cli.command("ls"))
    assert said.stdout.splitlines()[1].split()[:2] == ["sda", "8"]
    assert "the store was made anew with its disks (sda), which need full backups" in said.stderr
    assert said.stderr.count("\n") == 1
    assert run(*cli.command("ls")).stderr == ""
    code, out, _ = cli("check")
    assert code == 3
    assert (
        "full backup needed: disk 'sda': the store was damaged and was made anew; make a full backup" in out
    )
    assert "note: " in out
    assert "lmdb.damaged-" in out
