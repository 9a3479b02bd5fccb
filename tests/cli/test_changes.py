"""changes: which bytes, since and until when, how far to be trusted, and how a program reads it."""

from __future__ import annotations

import json
import os

import pytest

from lmdbitmap.store import Store, Writer
from lmdbitmap.tracker import chain
from tests.cli.conftest import MIB, SIZE, Cli

KIB = 1 << 10


def _two_periods(cli: Cli) -> None:
    """Disk `sda`, half a MiB of data at its start, marked in two periods."""
    image = cli.add("sda", SIZE - 1)
    with open(image, "r+b") as file:
        file.write(b"x" * (MIB // 2))
    cli.ok("adopt", "sda")
    cli.ok("checkpoint", "sda", "monday")
    cli.ok("mark", "sda", 0, MIB)
    cli.ok("checkpoint", "sda", "tuesday")
    cli.ok("mark", "sda", SIZE - 2, 1)


def test_the_answer_for_programs_is_exactly_this(cli: Cli) -> None:
    _two_periods(cli)
    assert cli.json("changes", "sda", "--since", "monday") == {
        "disk": "sda",
        "size": SIZE - 1,
        "granularity": 64 * KIB,
        "since": "monday",
        "until": None,
        "trust": "exact",
        "reason": None,
        "dirty_bytes": MIB + 64 * KIB - 1,
        "extents": [
            {"offset": 0, "length": MIB // 2, "dirty": True, "zero": False},
            {"offset": MIB // 2, "length": MIB // 2, "dirty": True, "zero": True},
            {"offset": SIZE - 64 * KIB, "length": 64 * KIB - 1, "dirty": True, "zero": True},
        ],
    }


@pytest.mark.parametrize(
    ("options", "since", "until", "count"),
    [
        ([], "tuesday", None, 1),
        (["--since", "monday", "--until", "tuesday"], "monday", "tuesday", 2),
        (["--since", "tuesday"], "tuesday", None, 1),
    ],
)
def test_since_and_until_choose_the_periods(
    cli: Cli, options: list[str], since: str, until: str | None, count: int
) -> None:
    _two_periods(cli)
    answer = cli.json("changes", "sda", *options)
    assert (answer["since"], answer["until"], len(answer["extents"])) == (since, until, count)


def test_the_answer_for_people_is_a_list(cli: Cli) -> None:
    _two_periods(cli)
    assert cli.ok("changes", "sda", "--since", "monday").splitlines() == [
        "# sda: 1.1 MiB of 8.0 MiB changed since monday; exact",
        "#             offset              length",
        "                   0              524288",
        "              524288              524288  reads as zeroes",
        "             8323072               65535  reads as zeroes",
    ]


def test_format_chooses_as_json_does(cli: Cli) -> None:
    _two_periods(cli)
    assert cli.ok("changes", "sda", "--format", "json") == cli.ok("changes", "sda", "--json")
    assert cli.ok("changes", "sda", "--format", "text", "--json") == cli.ok("changes", "sda")


def test_nothing_changed_is_an_answer(cli: Cli) -> None:
    cli.add("sda")
    cli.ok("checkpoint", "sda", "monday")
    assert cli.json("changes", "sda")["extents"] == []
    assert cli.ok("changes", "sda").startswith("# sda: 0 B of 8 MiB changed since monday; exact\n")


def test_an_empty_disk_has_an_answer(cli: Cli) -> None:
    cli.add("sda", 0)
    assert cli.dirty("sda") == ("superset", [])


def test_an_untrusted_answer_names_the_whole_disk_and_ends_in_3(cli: Cli) -> None:
    image = cli.add("sda")
    cli.ok("checkpoint", "sda", "monday")
    os.utime(image, ns=(2**61, 2**61))
    code, out, err = cli("changes", "sda", "--json")
    answer = json.loads(out)
    assert code == 3
    assert err == (
        "lmdbitmap: what changed on disk 'sda' is not known: the image was written while it was not tracked;"
        " make a full backup\n"
    )
    assert (answer["trust"], answer["dirty_bytes"]) == ("untrusted", SIZE)
    assert answer["reason"] == "the image was written while it was not tracked"
    assert [(e["offset"], e["length"]) for e in answer["extents"]] == [(0, SIZE)]


@pytest.mark.parametrize("until", [[], ["--until", "tuesday"]], ids=["open", "closed"])
def test_a_checkpoint_of_an_older_epoch_is_answered_with_everything(cli: Cli, until: list[str]) -> None:
    image = cli.add("sda")
    cli.ok("checkpoint", "sda", "monday")
    os.utime(image, ns=(2**61, 2**61))
    cli.ok("checkpoint", "sda", "tuesday")
    code, out, err = cli("changes", "sda", "--json", "--since", "monday", *until)
    answer = json.loads(out)
    assert code == 3
    assert "nothing is known since checkpoint 'monday'" in err
    assert (answer["since"], answer["trust"], answer["dirty_bytes"]) == ("monday", "untrusted", SIZE)
    assert len(answer["extents"]) == 1


def test_of_an_image_that_is_gone_no_backup_is_advised(cli: Cli) -> None:
    cli.add("sda").rename(cli.folder / "moved.raw")
    for words in (["changes", "sda"], ["export", "sda", cli.folder / "sda.dbm"]):
        code, _, err = cli(*words)
        assert code == 3
        assert f"{cli.folder / 'sda.raw'}, does not exist any more" in err
        assert "say where it went (`lmdbitmap relocate sda IMAGE`), or put it back" in err
        assert "full backup" not in err


def test_of_an_image_that_cannot_be_read_no_backup_is_advised(cli: Cli) -> None:
    image = cli.add("sda")
    image.unlink()
    image.symlink_to(image)
    code, _, err = cli("changes", "sda")
    assert code == 3
    assert err.endswith("Too many levels of symbolic links); mend the symbolic links that lead there\n")


def test_a_closed_period_is_known_without_the_image(cli: Cli) -> None:
    _two_periods(cli)
    os.unlink(cli.folder / "sda.raw")
    closed = cli.json("changes", "sda", "--since", "monday", "--until", "tuesday")
    assert closed["trust"] == "exact"
    assert closed["extents"] == [{"offset": 0, "length": MIB, "dirty": True, "zero": False}]
    assert cli("changes", "sda", "--since", "monday").code == 3


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--since", "sunday"], 1, "has no checkpoint 'sunday'"),
        (["--until", "sunday"], 1, "has no checkpoint 'sunday'"),
        (["--since", "tuesday", "--until", "monday"], 2, "'monday' is not after 'tuesday'"),
        (
            ["--since", "monday", "--until", "monday"],
            2,
            "'monday' is not after 'monday'; count from an earlier one",
        ),
        (["--until", "monday"], 2, "'monday' is not after 'tuesday'; count from an earlier one (--since)"),
        (["--format", "yaml"], 2, "--help"),
    ],
)
def test_questions_that_make_no_sense_are_refused(cli: Cli, options: list[str], code: int, said: str) -> None:
    _two_periods(cli)
    assert said in cli.fails(code, "changes", "sda", *options)


def test_many_extents_are_all_there(cli: Cli) -> None:
    """More than the command holds at a time: every other block of 512 bytes."""
    cli.add("sda", SIZE, "--granularity", "512")
    cli.ok("checkpoint", "sda", "monday")
    blocks = SIZE // 512
    _mark_every_other_block(cli, blocks)
    answer = cli.json("changes", "sda")
    assert [e["offset"] for e in answer["extents"]] == list(range(0, SIZE, 1024))
    assert len(cli.ok("changes", "sda").splitlines()) == 2 + blocks // 2


def _mark_every_other_block(cli: Cli, blocks: int) -> None:
    def mark(writer: Writer) -> None:
        checkpoint = chain.current_checkpoint(writer, chain.find_disk(writer, "sda"))
        for region in range(blocks // 4096):
            writer.put_region(checkpoint.bitmap_id, region, 0, b"\x55" * 512)

    with Store.open(str(cli.store)) as store:
        store.update(mark)
