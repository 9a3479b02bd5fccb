"""verify, prune, ls and copy: what is sound, what goes, what is there, and by which exit code a script can tell."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmdbitmap.repository.backup_folder import BackupFolder
from lmdbitmap.repository.repository import known_backups
from tests.cli.conftest import SIZE, Cli
from tests.cli.test_backups import _write, repository
from tests.helpers.support import requires, run
from tests.unit.test_verify import flip

pytestmark = pytest.mark.in_memory

__all__ = ["repository"]

KIB = 1 << 10


@pytest.fixture
def chain(cli: Cli, repository: Path) -> Path:
    """Four backups of disk `sda`, each with another block."""
    for number in range(1, 4):
        _write(cli, number * 64 * KIB, bytes([number]) * 64 * KIB)
        cli.ok("backup", "sda", repository)
    return repository


def test_sound_backups_are_called_sound(cli: Cli, chain: Path) -> None:
    said = cli.ok("verify", chain)
    assert said.startswith("sda: 4 images sound · ")
    assert cli.ok("verify", chain, "sda", "--at", "1").startswith("sda: 1 image sound · ")
    told = cli.json("verify", chain)
    stored = sum(path.stat().st_size for path in (chain / "sda").glob("*.qcow2"))
    assert told == {
        "sound": True, "disks": ["sda"], "images": 4, "bytes_read": stored, "flaw_count": 0, "flaws": [],
        "seconds": told["seconds"],
    }  # fmt: skip


def test_a_flipped_bit_is_named_and_the_exit_code_is_1(cli: Cli, chain: Path) -> None:
    image = chain / "sda" / "000002-incremental.qcow2"
    flip(image, 70 * KIB)
    size = image.stat().st_size
    done = cli("verify", chain)
    assert done.code == 1
    assert done.out.splitlines()[0] == (
        f"sda backup 2: {image}: bytes 0..{size}: the data is not what was backed up"
    )
    assert done.out.splitlines()[1].startswith("sda: 4 images, 1 flaw · ")
    assert f"{chain}: expected sound backups, found 1 flaw; " in done.err


def test_a_copy_that_never_came_about_is_not_called_sound(cli: Cli, chain: Path) -> None:
    """Whoever proves it every night would learn that there is no copy on the day it is needed."""
    folder = BackupFolder(cli.folder / "copy", "sda")
    known = known_backups(BackupFolder(chain, "sda"))
    with folder.locked():
        folder.replace_manifest(dataclasses.replace(known, backups=()))
    done = cli("verify", cli.folder / "copy")
    assert done.code == 1
    assert "there is no backup in it: a copy into it" in done.out
    assert done.err.endswith("expected sound backups, found 1 flaw; do what each line above says\n")
    said = cli.fails(1, "verify", cli.folder / "copy", "sda")
    assert "has no backup of a disk called 'sda'; name another repository, or see whether" in said


POWERLESS = [
    "setpriv",
    "--inh-caps=-dac_override,-dac_read_search",
    "--bounding-set=-dac_override,-dac_read_search",
]
"""Root who may not look into what its owner has closed."""


@pytest.fixture
def half_closed(cli: Cli, chain: Path) -> Iterator[Path]:
    """A repository of two disks, one of which nobody lets us look into, at the top of a file system."""
    cli.add("sdb")
    cli.ok("backup", "sdb", chain)
    closed = [chain / "sdb", chain / "lost+found", chain / ".Trash-0"]
    for folder in closed:
        folder.mkdir(exist_ok=True)
        folder.chmod(0)
    yield chain
    for folder in closed:
        folder.chmod(0o700)


@requires("setpriv")
@pytest.mark.parametrize(
    ("verb", "more", "told"),
    [
        ("ls", [], "sdb: not listed: "),
        ("copy", ["copy"], "sdb: not copied: "),
        ("prune", ["--keep", "1"], "sdb: not pruned: "),
    ],
)
def test_a_disk_that_cannot_be_looked_at_is_not_passed_over(
    cli: Cli, half_closed: Path, verb: str, more: list[str], told: str
) -> None:
    """Its backups would be neither proven nor copied, every night, with exit code 0."""
    powerless = POWERLESS if os.geteuid() == 0 else []
    done = run(*powerless, *cli.command(verb, half_closed, *more), cwd=cli.folder, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(
        f"lmdbitmap: {told}{half_closed / 'sdb'}: Permission denied; check its owner"
    )
    assert done.stderr.count("\n") == 1, "folders that root has at the top of a file system are no disks"


@requires("setpriv")
def test_verify_proves_the_other_disks_of_one_that_cannot_be_looked_at(cli: Cli, half_closed: Path) -> None:
    powerless = POWERLESS if os.geteuid() == 0 else []
    done = run(*powerless, *cli.command("verify", half_closed), cwd=cli.folder, check=False)
    assert done.returncode == 1
    assert done.stdout.startswith(f"sdb: {half_closed / 'sdb'}: Permission denied; check its owner")
    assert "\nsda: 4 images, 1 flaw · " in done.stdout
    named = run(*powerless, *cli.command("verify", half_closed, "sdb"), cwd=cli.folder, check=False)
    assert (named.returncode, named.stdout) == (1, "")
    assert named.stderr.startswith(f"lmdbitmap: {half_closed / 'sdb'}: Permission denied; check its owner")


def test_a_disk_whose_manifests_are_both_lost_is_not_passed_over(cli: Cli, chain: Path) -> None:
    cli.add("sdb")
    cli.ok("backup", "sdb", chain)
    for name in ("manifest.json", "manifest.json.copy"):
        (chain / "sdb" / name).unlink()
    done = cli("verify", chain)
    assert (done.code, done.out.count("expected manifest.json beside the images, found none")) == (1, 1)
    for words in (["ls", chain], ["copy", chain, cli.folder / "copy"], ["prune", chain, "--keep", "1"]):
        told = cli.fails(1, *words)
        assert told.startswith("sdb: not "), told
        assert "expected manifest.json beside the images, found none" in told


def test_a_manifest_that_is_missing_is_told_with_the_step_that_brings_it_back(cli: Cli, chain: Path) -> None:
    (chain / "sda" / "manifest.json").unlink()
    done = cli("verify", chain)
    command = re.search(r"`(cp .*?)`", done.out)
    assert command is not None
    assert (done.code, done.err.rpartition("; ")[2]) == (1, "do what each line above says\n")
    subprocess.run(command[1], shell=True, check=True)
    cli.ok("verify", chain)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (
            ["sdx"],
            1,
            "has no backup of a disk called 'sdx'; name another disk: the repository has backups of sda",
        ),
        (["sda", "--at", "9"], 1, "has no backup 9"),
        (["--at", "1"], 2, "the disk of backup 1 is not named; name the disk too"),
        (["../sda"], 2, "starts with . or -"),
    ],
)
def test_what_cannot_be_verified_is_told(
    cli: Cli, repository: Path, words: list[str], code: int, said: str
) -> None:
    assert said in cli.fails(code, "verify", repository, *words)


def test_a_folder_without_backups_is_told(cli: Cli) -> None:
    (cli.folder / "empty").mkdir()
    assert "has no backups; name another repository, or see whether its file system is mounted" in cli.fails(
        1, "verify", cli.folder / "empty"
    )
    assert "does not exist" in cli.fails(1, "verify", cli.folder / "none")


# --- prune ---


def test_old_backups_go_and_what_stays_is_merged(cli: Cli, chain: Path) -> None:
    said = cli.ok("prune", chain, "--keep", "2")
    assert said.startswith("sda: kept 2 backups, removed 2 · merged 1 · ")
    assert sorted(path.name for path in (chain / "sda").glob("*.qcow2")) == [
        "000003-incremental.qcow2", "000004-incremental.qcow2",
    ]  # fmt: skip
    assert cli.json("verify", chain)["sound"] is True
    assert cli.json("backup", "sda", chain)["backups"][0]["type"] == "incremental"


def test_a_dry_run_names_every_backup(cli: Cli, chain: Path) -> None:
    said = cli.ok("prune", chain, "sda", "--keep", "1", "--keep-daily", "1", "--dry-run").splitlines()
    assert [line.partition(" would remove ")[2].partition(" of ")[0] for line in said[:3]] == [
        "backup 1", "backup 2", "backup 3",
    ]  # fmt: skip
    assert said[3].startswith("sda: would keep backup 4 of ")
    assert said[3].endswith(", merged with what it is stacked on")
    assert said[4] == "sda: would keep 1 and remove 3"
    assert len(list((chain / "sda").glob("*.qcow2"))) == 4


def test_a_prune_tells_programs_what_it_did(cli: Cli, chain: Path) -> None:
    told = cli.json("prune", chain, "--keep", "1")
    [disk] = told["disks"]
    assert (told["dry_run"], disk["disk"], disk["merged"]) == (False, "sda", ["4"])
    assert [(one["backup"], one["type"]) for one in disk["kept"]] == [("4", "full")]
    assert [one["backup"] for one in disk["removed"]] == ["1", "2", "3"]
    assert disk["bytes_after"] == (chain / "sda" / "000004-incremental.qcow2").stat().st_size
    assert disk["bytes_before"] > disk["bytes_after"]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([], 2, "no backup would be kept; say by at least one rule how many to keep, such as --keep 7"),
        (["--keep", "0"], 2, "0 is not in the range"),
        (["--keep", "many"], 2, "not a valid integer"),
        (["sdx", "--keep", "1"], 1, "has no backup of a disk called 'sdx'"),
        (["sda", "sdx", "--keep", "1"], 1, "has no backup of a disk called 'sdx'"),
        (["--drop", "1"], 2, "the disk of backup 1 is not named; name that one disk, and no other"),
        (["sda", "--drop", "9"], 1, "has no backup 9"),
    ],
)
def test_what_cannot_be_pruned_is_told_and_nothing_goes(
    cli: Cli, chain: Path, words: list[str], code: int, said: str
) -> None:
    assert said in cli.fails(code, "prune", chain, *words)
    assert len(list((chain / "sda").glob("*.qcow2"))) == 4


def test_backups_that_are_named_go_and_all_others_stay(cli: Cli, chain: Path) -> None:
    assert cli.ok("prune", chain, "sda", "--drop", "2", "--drop", "3").startswith(
        "sda: kept 2 backups, removed 2"
    )
    assert [one["backup"] for one in cli.json("ls", chain)["disks"][0]["backups"]] == ["1", "4"]
    assert cli.json("verify", chain)["sound"] is True


def test_a_damaged_backup_is_not_merged(cli: Cli, chain: Path) -> None:
    flip(chain / "sda" / "000001-full.qcow2", 70 * KIB)
    assert "expected sound images, found a flaw: " in cli.fails(1, "prune", chain, "--keep", "1")


# --- ls ---


def test_backups_are_listed(cli: Cli, chain: Path) -> None:
    heading, *rows = cli.ok("ls", chain).splitlines()
    assert heading.split() == [
        "disk",
        "backup",
        "time",
        "type",
        "size",
        "changed",
        "stored",
        "chain",
        "trust",
    ]
    assert [row.split()[:2] for row in rows] == [["sda", str(number)] for number in range(1, 5)]
    assert rows[3].split()[4:7] == ["incremental", "8", "MiB"]
    assert rows[3].split()[7:9] == ["64", "KiB"]
    assert rows[3].split()[-2:] == ["4", "exact"]


def test_backups_are_listed_for_programs(cli: Cli, chain: Path) -> None:
    told = cli.json("ls", chain)
    [disk] = told["disks"]
    assert (told["repository"], disk["disk"]) == (str(chain), "sda")
    last = disk["backups"][3]
    assert last == {
        "backup": "4", "time": last["time"], "type": "incremental", "requested": "incremental", "parent": "3",
        "file": "000004-incremental.qcow2", "checkpoint": last["checkpoint"], "size": SIZE,
        "bytes_changed": 64 * KIB, "bytes_zero": 0,
        "bytes_stored": (chain / "sda" / "000004-incremental.qcow2").stat().st_size, "chain_depth": 4,
        "trust": "exact", "sha256": None, "chunks_sha256": last["chunks_sha256"], "digest": "blake3",
        "reason": None, "compression": None,
    }  # fmt: skip
    assert [one["chain_depth"] for one in disk["backups"]] == [1, 2, 3, 4]
    assert disk["backups"][0]["reason"] == {"code": "no-earlier-backup", "words": "no earlier backup"}


def test_without_a_folder_the_disks_are_listed(cli: Cli, chain: Path) -> None:
    assert cli.ok("ls").splitlines()[1].startswith("sda ")


def test_what_holds_no_backups_cannot_be_listed(cli: Cli, chain: Path) -> None:
    (cli.folder / "empty").mkdir()
    assert "has no backups; name another repository, or see whether its file system is mounted" in cli.fails(
        1, "ls", cli.folder / "empty"
    )
    assert "does not exist" in cli.fails(1, "ls", cli.folder / "none")
    assert "is a file" in cli.fails(2, "ls", cli.folder / "sda.raw")
    (chain / "sda" / "manifest.json").write_bytes(b"{")
    assert "manifest: expected JSON" in cli.fails(1, "ls", chain)


# --- where one disk of several is damaged ---


@pytest.fixture
def two(chain: Path) -> Path:
    """Beside `sda` a disk whose manifest is damaged, which would come first."""
    shutil.copytree(chain / "sda", chain / "boot")
    (chain / "boot" / "manifest.json").write_bytes(b"{")
    return chain


@pytest.mark.parametrize(
    ("words", "said", "what"),
    [
        (["ls", "REPO"], "disk ", "not listed"),
        (["prune", "REPO", "--keep", "2", "--dry-run"], "sda: would remove backup 1", "not pruned"),
        (["prune", "REPO", "--keep", "2"], "sda: kept 2 backups, removed 2", "not pruned"),
        (["copy", "REPO", "COPY"], "sda: copied 4 backups", "not copied"),
    ],
)
def test_a_damaged_manifest_is_told_of_after_the_others_are_done(
    cli: Cli, two: Path, words: list[str], said: str, what: str
) -> None:
    places = {"REPO": str(two), "COPY": str(cli.folder / "copy")}
    done = cli(*[places.get(word, word) for word in words])
    assert done.code == 1
    assert done.out.startswith(said)
    assert done.err.startswith(
        f"lmdbitmap: boot: {what}: {two / 'boot' / 'manifest.json'}: manifest: expected JSON"
    )
    assert done.err.count("\n") == 1
    assert f"bring it back with `cp {two / 'boot' / 'manifest.json.copy'} " in done.err


@pytest.mark.parametrize(
    "words", [["ls", "REPO"], ["prune", "REPO", "--keep", "2"], ["copy", "REPO", "COPY"]]
)
def test_a_program_is_told_of_each_disk(cli: Cli, two: Path, words: list[str]) -> None:
    places = {"REPO": str(two), "COPY": str(cli.folder / "copy")}
    done = cli(*[places.get(word, word) for word in words], "--json")
    told = json.loads(done.out)
    assert done.code == 1
    assert [disk["disk"] for disk in told["disks"]] == ["sda"]
    [failure] = told["failures"]
    assert (failure["disk"], failure["reason"]["code"]) == ("boot", "damaged")
    assert failure["reason"]["words"] in done.err


def test_a_disk_that_is_backed_up_to_is_busy_and_the_others_are_pruned(cli: Cli, chain: Path) -> None:
    shutil.copytree(chain / "sda", chain / "boot")
    with BackupFolder(chain, "boot").locked():
        done = cli("prune", chain, "--keep", "2")
    assert (done.code, done.out.partition(" · ")[0]) == (4, "sda: kept 2 backups, removed 2")
    assert done.err.startswith("lmdbitmap: boot: not pruned: ")


# --- copy ---


def test_backups_are_copied_once(cli: Cli, chain: Path) -> None:
    copy = cli.folder / "copy"
    assert cli.ok("copy", chain, copy).startswith("sda: copied 4 backups, 0 were there already · ")
    told = cli.json("copy", chain, copy, "sda")
    assert told == {
        "disks": [{
            "disk": "sda", "copied": [], "already_there": 4, "only_there": 0, "left_out": 0,
            "bytes_copied": 0, "seconds": told["disks"][0]["seconds"],
        }],
        "failures": [],
    }  # fmt: skip
    assert cli.json("verify", copy)["images"] == 4
    assert cli.json("ls", copy)["disks"] == cli.json("ls", chain)["disks"]


def test_what_cannot_be_copied_is_told_and_nothing_is_made(cli: Cli, chain: Path) -> None:
    copy = cli.folder / "copy"
    assert "is where the backups are" in cli.fails(2, "copy", chain, chain)
    assert "has no backup of a disk called 'sdx'" in cli.fails(1, "copy", chain, copy, "sda", "sdx")
    assert "is a file" in cli.fails(2, "copy", chain, cli.folder / "sda.raw")
    assert not copy.exists()
    cli.ok("copy", chain, copy)
    cli.ok("backup", "sda", copy)
    said = cli.fails(1, "copy", chain, copy)
    assert "has a backup 5 that " in said
    assert said.endswith("; copy to another repository, or move that folder away")


def test_a_copy_goes_on_after_a_prune_of_either_side_and_says_what_is_where(cli: Cli, chain: Path) -> None:
    copy = cli.folder / "copy"
    cli.ok("copy", chain, copy)
    cli.ok("prune", chain, "--keep", "2")
    cli.ok("backup", "sda", chain)
    said = cli.ok("copy", chain, copy)
    assert said.startswith("sda: copied 1 backup, 2 were there already, 2 are only there · ")
    cli.ok("prune", copy, "--keep", "1")
    cli.ok("backup", "sda", chain)
    said = cli.ok("copy", chain, copy)
    assert said.startswith("sda: copied 1 backup, 1 were there already, 2 had been removed there · ")
    assert cli.json("verify", copy)["images"] == 2
