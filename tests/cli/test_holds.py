"""holds, and what info, ls, checkpoint and forget have to do with them."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from lmdbitmap import Store
from lmdbitmap.notes.holds import hold_files
from tests.cli.conftest import Cli


@pytest.fixture
def repository(cli: Cli) -> Path:
    """Where disk `sda` has its full backup."""
    cli.add("sda")
    cli.ok("backup", "sda", cli.folder / "backups")
    return cli.folder / "backups"


def checkpoints(cli: Cli) -> list[str]:
    return [one["name"] for one in cli.json("info", "sda")["checkpoints"]]


def age_all(cli: Cli) -> None:
    with Store.open(str(cli.store)) as store:
        with store.read() as reader:
            [disk] = reader.disks()
        for file in hold_files(store.path, disk.uuid):
            assert file.hold is not None
            file.replace(dataclasses.replace(file.hold, used_ns=0))


def test_repositories_are_listed_with_what_they_hold(cli: Cli, repository: Path) -> None:
    told = cli.json("holds", "sda")
    [hold] = told["holds"]
    [made] = [name for name in checkpoints(cli) if name.startswith("backup-")]
    assert (told["disk"], told["lapse_days"]) == ("sda", 180)
    assert hold == {
        "uuid": hold["uuid"], "repository": str(repository), "used": hold["used"], "checkpoints": [made],
        "under_way": None, "ended": None,
    }  # fmt: skip
    words = cli.ok("holds", "sda")
    assert hold["uuid"][:8] in words
    assert str(repository) in words
    assert "a hold lapses after 180 days without a backup" in words


def test_info_says_who_holds_each_checkpoint(cli: Cli, repository: Path) -> None:
    cli.ok("checkpoint", "sda", "mine")
    held = {one["name"]: one["held_by"] for one in cli.json("info", "sda")["checkpoints"]}
    kinds = [[holder["kind"] for holder in holders] for holders in held.values()]
    assert kinds == [["tracker"], ["repository"], ["person"]]
    [of_backup] = [holders for name, holders in held.items() if name.startswith("backup-")]
    assert of_backup == [{
        "kind": "repository", "place": str(repository),
        "uuid": cli.json("holds", "sda")["holds"][0]["uuid"], "used": cli.json("holds", "sda")["holds"][0]["used"],
    }]  # fmt: skip
    words = cli.ok("info", "sda")
    assert f"repository {repository} (" in words
    assert "the person who made it" in words


def test_ls_counts_holders(cli: Cli, repository: Path) -> None:
    [disk] = cli.json("ls")["disks"]
    assert [hold["repository"] for hold in disk["holds"]] == [str(repository)]
    heading, row = cli.ok("ls").splitlines()
    assert "holders" in heading
    assert " 1 " in row


def test_days_are_set_for_a_disk(cli: Cli, repository: Path) -> None:
    assert cli.json("holds", "sda", "--lapse", "30")["lapse_days"] == 30
    assert "after 30 days" in cli.ok("holds", "sda")
    assert "holds do not lapse" in cli.ok("holds", "sda", "--lapse", "0")
    assert "0 for never" in cli.fails(2, "holds", "sda", "--lapse", "99999")
    assert "-1" in cli.fails(2, "holds", "sda", "--lapse", "-1")
    assert "no disk is called" in cli.fails(1, "holds", "sdb")


def test_a_checkpoint_merges_away_what_lapsed_and_the_next_backup_there_says_so(
    cli: Cli, repository: Path
) -> None:
    cli.ok("checkpoint", "sda", "monday")
    age_all(cli)
    cli.ok("checkpoint", "sda", "tuesday")
    assert checkpoints(cli) == ["epoch-1", "monday", "tuesday"]
    assert "nothing: its hold lapsed" in cli.ok("holds", "sda")
    [made] = cli.json("backup", "sda", repository)["backups"]
    assert made["type"] == "rescan"
    assert made["reason"]["code"] == "hold-lapsed"


def test_a_hold_is_dropped_by_hand(cli: Cli, repository: Path) -> None:
    cli.ok("checkpoint", "sda", "monday")
    told = cli.json("forget", "sda", "--repository", repository)
    assert told["hold"]["ended"]["code"] == "hold-dropped"
    assert checkpoints(cli) == ["epoch-1", "monday"]
    assert "rescan: its hold on the checkpoint was dropped by hand" in cli.ok("backup", "sda", repository)


def test_a_hold_of_what_is_gone_is_dropped_by_its_uuid(cli: Cli, repository: Path) -> None:
    cli.ok("checkpoint", "sda", "monday")
    [hold] = cli.json("holds", "sda")["holds"]
    shutil.rmtree(repository)
    assert "holds nothing any more" in cli.ok("forget", "sda", "--repository", hold["uuid"][:8])
    assert checkpoints(cli) == ["epoch-1", "monday"]
    assert "name a uuid that" in cli.fails(1, "forget", "sda", "--repository", "elsewhere")


def test_forget_takes_a_checkpoint_or_a_repository(cli: Cli, repository: Path) -> None:
    assert "either CHECKPOINT or --repository" in cli.fails(2, "forget", "sda")
    assert "either CHECKPOINT or --repository" in cli.fails(2, "forget", "sda", "x", "--repository", "y")


def test_a_served_disk_lets_go_through_its_owner(cli: Cli, repository: Path) -> None:
    with cli.serving("sda"):
        age_all(cli)
        cli.ok("checkpoint", "sda", "monday")
        assert checkpoints(cli) == ["epoch-1", "monday"]
        cli.ok("backup", "sda", repository)
        cli.ok("forget", "sda", "--repository", repository)
        assert [name for name in checkpoints(cli) if name.startswith("backup-")] == []
