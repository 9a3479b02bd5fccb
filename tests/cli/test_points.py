"""checkpoint, forget, mark, adopt, on disks that nobody serves."""

from __future__ import annotations

import os

import pytest

from tests.cli.conftest import MIB, SIZE, Cli

KIB = 1 << 10


def test_a_checkpoint_begins_a_clean_period(cli: Cli) -> None:
    cli.add("sda")
    assert cli.ok("checkpoint", "sda", "monday") == "sda: checkpoint monday made\n"
    assert cli.dirty("sda") == ("exact", [])


def test_a_checkpoint_is_made_on_all_disks_or_on_none(cli: Cli) -> None:
    cli.add("a")
    cli.add("b")
    cli.ok("checkpoint", "b", "monday")
    assert "has a checkpoint 'monday' already" in cli.fails(1, "checkpoint", "a,b", "monday")
    assert len(cli.json("info", "a")["checkpoints"]) == 1
    assert cli.json("checkpoint", "a,b", "tuesday") == {
        "disks": ["a", "b"],
        "checkpoint": "tuesday",
        "thaw_failure": None,
    }
    times = {cli.json("info", name)["checkpoints"][-1]["time"] for name in "ab"}
    assert len(times) == 1


@pytest.mark.parametrize("names", ["a,a", "a,", ","])
def test_odd_lists_of_names_are_not_understood(cli: Cli, names: str) -> None:
    cli.add("a")
    assert "see 'lmdbitmap checkpoint --help'" in cli.fails(2, "checkpoint", names, "monday")


@pytest.mark.parametrize("maker", ["backup", "sync", "stream"])
def test_a_name_such_as_backups_give_is_refused(cli: Cli, maker: str) -> None:
    """Its checkpoint would be taken for one that a dead run left, and be merged away."""
    cli.add("sda")
    name = f"{maker}-20261130T022349Z-1f2e3d"
    assert f"a checkpoint that a {maker} makes" in cli.fails(2, "checkpoint", "sda", name)
    assert "choose another name" in cli.fails(2, "snapshot", "sda", name)


def test_a_mark_rounds_outward(cli: Cli) -> None:
    cli.add("sda")
    cli.ok("checkpoint", "sda", "monday")
    assert cli.ok("mark", "sda", "1M", "70K") == "sda: 70 KiB from byte 1048576 on are dirty\n"
    assert cli.json("mark", "sda", SIZE - 1, 1) == {"disk": "sda", "offset": SIZE - 1, "length": 1}
    assert cli.dirty("sda") == ("exact", [(MIB, 128 * KIB), (SIZE - 64 * KIB, 64 * KIB)])


def test_a_mark_off_the_disk_is_refused(cli: Cli) -> None:
    cli.add("sda")
    cli.ok("checkpoint", "sda", "monday")
    assert "are not on a disk of 8388608 bytes" in cli.fails(2, "mark", "sda", SIZE, 1)
    assert cli.dirty("sda") == ("exact", [])


def test_forgetting_gives_the_bits_to_the_checkpoint_before(cli: Cli) -> None:
    cli.add("sda")
    for name, offset in (("monday", 0), ("tuesday", MIB), ("wednesday", 2 * MIB)):
        cli.ok("checkpoint", "sda", name)
        cli.ok("mark", "sda", offset, 1)
    assert cli.ok("forget", "sda", "tuesday") == "sda: checkpoint tuesday forgotten\n"
    assert cli.dirty("sda", "--since", "monday", "--until", "wednesday") == (
        "exact", [(0, 64 * KIB), (MIB, 64 * KIB)]
    )  # fmt: skip
    cli.ok("forget", "sda", "wednesday")
    assert len(cli.dirty("sda", "--since", "monday")[1]) == 3


def test_what_cannot_be_forgotten_is_told(cli: Cli) -> None:
    cli.add("sda")
    assert "is the only one that records disk 'sda'" in cli.fails(2, "forget", "sda", "epoch-1")
    said = cli.fails(1, "forget", "sda", "sunday")
    assert said == "disk 'sda' has no checkpoint 'sunday'; `lmdbitmap info sda` lists those there are"


def test_adopting_vouches_for_an_image_that_was_touched(cli: Cli) -> None:
    image = cli.add("sda")
    cli.ok("checkpoint", "sda", "monday")
    os.utime(image, ns=(2**61, 2**61))
    assert cli("changes", "sda").code == 3
    assert cli.ok("adopt", "sda") == "sda: its image is accepted as it is\n"
    assert cli.dirty("sda", "--since", "monday") == ("exact", [])


def test_adopting_takes_over_another_size(cli: Cli) -> None:
    image = cli.add("sda")
    cli.ok("checkpoint", "sda", "monday")
    os.truncate(image, SIZE + MIB)
    cli.ok("adopt", "sda")
    assert cli.dirty("sda") == ("exact", [(SIZE, MIB)])


@pytest.mark.parametrize(
    "words",
    [
        ["checkpoint", "sda,sdx", "monday"], ["forget", "sdx", "epoch-1"], ["mark", "sdx", "0", "1"],
        ["adopt", "sdx"], ["changes", "sdx"], ["serve", "sda", "sdx", "--socket", "s"],
    ],
    ids=lambda words: words[0],
)  # fmt: skip
def test_an_unknown_disk_is_told_from_the_known(cli: Cli, words: list[str]) -> None:
    cli.add("sda")
    said = cli.fails(1, *words)
    assert said == "no disk is called 'sdx'; `lmdbitmap ls` lists those there are"
    assert cli.json("ls")["disks"][0]["attached"] is False


def test_an_image_that_is_gone_is_told(cli: Cli) -> None:
    image = cli.add("sda")
    os.unlink(image)
    assert cli.fails(1, "checkpoint", "sda", "monday") == (
        f"the image of disk 'sda', {image}, does not exist any more; say where it went (`lmdbitmap relocate sda"
        " IMAGE`), or put it back; `lmdbitmap rm sda` if it is gone for good"
    )
    assert cli.json("info", "sda")["trust"] == "untrusted"
