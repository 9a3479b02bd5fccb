"""snapshot and release, and what a backup of a served disk can be told: hooks, kinds, room for old data."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmdbitmap.cli import serve
from lmdbitmap.system import files
from lmdbitmap.tracker.scratch import Scratch
from tests.cli.conftest import MIB, SIZE, Cli, Served
from tests.cli.test_hanging_owner import stop_and_wait
from tests.cli.test_serve import write
from tests.helpers.support import PATIENCE_SECONDS

KIB = 1 << 10


@pytest.fixture
def served(cli: Cli) -> Iterator[Served]:
    cli.add("sda")
    cli.add("sdb")
    with cli.serving("sda", "sdb") as served:
        yield served


def hook_with_which_it_hangs(cli: Cli, served: Served) -> Path:
    """While the guest is frozen, whoever serves its disk stands still."""
    hook, pid = cli.folder / "hangs", served.child.pid
    hook.write_text(
        f'#!/bin/sh\nif [ "$1" = freeze ]; then {stop_and_wait(pid)}\n'
        f"else kill -CONT {pid}; touch {cli.folder}/thawed; fi\n"
    )
    hook.chmod(0o755)
    return hook


def held(cli: Cli, name: str) -> list[str]:
    return [one["checkpoint"] for one in cli.json("info", name)["served"]["snapshots"]]


def test_disks_are_held_together_and_released_one_by_one(cli: Cli, served: Served) -> None:
    told = cli.json("snapshot", "sda,sdb", "monday")
    assert told == {
        "disks": ["sda", "sdb"], "checkpoint": "monday", "exports": ["sda@monday", "sdb@monday"],
        "thaw_failure": None,
    }  # fmt: skip
    write(served.uris["sda"], MIB, 100)
    assert cli.json("release", "sda", "monday") == {
        "checkpoint": "monday", "disks": [{"disk": "sda", "kept_bytes": 0}], "failures": [],
    }, "zeroes take no room"  # fmt: skip
    assert (held(cli, "sda"), held(cli, "sdb")) == ([], ["monday"])
    assert "held      as at monday: 0 B of old data, room for 10 GiB" in " ".join(
        line for line in cli.ok("info", "sdb").splitlines()
    ).replace("held        ", "held      ")
    assert cli.ok("release", "sdb", "monday") == "sdb@monday: released; 0 B of old data had been kept\n"


def test_disks_are_released_together_and_one_that_is_not_held_keeps_none_of_the_others(
    cli: Cli, served: Served
) -> None:
    cli.ok("snapshot", "sda,sdb", "monday")
    assert cli.ok("release", "sda,sdb", "monday").splitlines() == [
        f"{name}@monday: released; 0 B of old data had been kept" for name in ("sda", "sdb")
    ]
    cli.ok("snapshot", "sdb", "tuesday")
    code, out, err = cli("release", "sda,sdb,sdx", "tuesday", "--json")
    told = json.loads(out)
    assert (code, told["disks"], held(cli, "sdb")) == (1, [{"disk": "sdb", "kept_bytes": 0}], [])
    assert [(one["disk"], one["reason"]["code"]) for one in told["failures"]] == [
        ("sda", "not-found"), ("sdx", "not-found"),
    ]  # fmt: skip
    assert [line.split(":")[1:3] for line in err.splitlines()] == [
        [" sda", " release failed"],
        [" sdx", " release failed"],
    ]


def test_refusals_say_what_to_do(cli: Cli, served: Served) -> None:
    cli.ok("snapshot", "sda", "monday")
    assert "has a checkpoint 'monday' already" in cli.fails(1, "snapshot", "sda", "monday")
    assert "has no checkpoint 'friday'" in cli.fails(1, "snapshot", "sda", "tuesday", "--since", "friday")
    assert "holds no snapshot of checkpoint 'sunday'" in cli.fails(1, "release", "sda", "sunday")
    assert cli.fails(4, "forget", "sda", "monday").endswith(
        "release that snapshot first, or wait until it is released"
    )
    assert held(cli, "sda") == ["monday"], "what failed holds nothing"


def test_disk_that_nobody_serves_cannot_be_held(cli: Cli) -> None:
    cli.add("sda")
    for words in (["snapshot", "sda", "monday"], ["release", "sda", "monday"]):
        assert cli.fails(1, *words).startswith("disk 'sda' is not served; ")


def test_hook_is_run_around_the_point_in_time(cli: Cli, served: Served) -> None:
    hook, log = cli.folder / "hook", cli.folder / "asked"
    hook.write_text(f'#!/bin/sh\necho "$@" >> {log}\n[ "$1" != "$(cat {cli.folder}/fails 2>/dev/null)" ]\n')
    hook.chmod(0o755)
    cli.ok("backup", "sda", "sdb", cli.folder / "backups", "--hook", hook)
    assert log.read_text().splitlines() == ["freeze sda sdb", "thaw sda sdb"]
    (cli.folder / "fails").write_text("freeze")
    before = manifest(cli, "sda")
    said = cli.fails(1, "backup", "sda", "sdb", cli.folder / "backups", "--hook", hook)
    assert "freeze sda sdb` ended with 1" in said
    assert log.read_text().splitlines()[2:] == ["freeze sda sdb", "thaw sda sdb"]
    assert manifest(cli, "sda") == before
    assert len(cli.json("info", "sda")["checkpoints"]) == 2, "no checkpoint was made"


GUEST = """
import sys
from lmdbitmap.nbd.client.device import NbdDevice
if sys.argv[1] == "thaw":
    disk = NbdDevice.open({uri!r})
    disk.pwrite(bytes([7]) * {length}, 0)
    disk.close()
"""
"""As a hook: it writes as soon as the point in time is taken, before anything of it is read."""


@pytest.mark.parametrize(
    "verb", [("backup", "sda", "backups"), ("sync", "sda", "copy"), ("backup", "--stdout", "sda")]
)
def test_a_snapshot_that_broke_is_told_as_that_by_whoever_reads_it(
    cli: Cli, verb: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not as a disk that fails: to a reader in another process both are an I/O error."""
    monkeypatch.chdir(cli.folder)
    cli.add("sda").write_bytes(bytes([1]) * SIZE)
    cli.ok("adopt", "sda")
    with cli.serving("sda", "--scratch-limit=1M", log=True) as served:
        guest, hook = cli.folder / "guest.py", cli.folder / "hook"
        guest.write_text(GUEST.format(uri=served.uris["sda"], length=2 * MIB))
        hook.write_text(f"#!/bin/sh\nexec {sys.executable} {guest} $1\n")
        hook.chmod(0o755)
        said = cli.fails(1, *verb, "--hook", hook)
        assert said.startswith("disk 'sda': the snapshot broke: its scratch file is full (1048576 bytes); ")
        assert said.endswith(
            "with more room for old data (serve --scratch-limit) if that was lacking; the guest noticed nothing"
        )


@pytest.mark.parametrize("verb", ["checkpoint", "snapshot"])
def test_hook_is_run_around_a_point_that_somebody_else_reads(cli: Cli, served: Served, verb: str) -> None:
    """As a backup's: frozen before it, thawed after it, and where the one fails nothing is made."""
    hook, log = cli.folder / "hook", cli.folder / "asked"
    hook.write_text(f'#!/bin/sh\necho "$@" >> {log}\n[ "$1" != "$(cat {cli.folder}/fails 2>/dev/null)" ]\n')
    hook.chmod(0o755)
    told = cli.json(verb, "sda,sdb", "monday", "--hook", hook)
    assert (told["checkpoint"], told["thaw_failure"]) == ("monday", None)
    (cli.folder / "fails").write_text("freeze")
    assert "freeze sda sdb` ended with 1" in cli.fails(1, verb, "sda,sdb", "tuesday", "--hook", hook)
    (cli.folder / "fails").write_text("thaw")
    answer = cli(verb, "sda,sdb", "wednesday", "--hook", hook, "--json")
    assert (answer.code, json.loads(answer.out)["thaw_failure"]) == (
        1,
        f"hook `{hook} thaw sda sdb` ended with 1",
    )
    assert log.read_text().splitlines() == ["freeze sda sdb", "thaw sda sdb"] * 3
    made = [one["name"] for one in cli.json("info", "sda")["checkpoints"]]
    assert made[1:] == ["monday", "wednesday"]
    assert held(cli, "sdb") == (["monday", "wednesday"] if verb == "snapshot" else [])
    (cli.folder / "fails").unlink()
    since = ["--since", "never"] if verb == "snapshot" else []
    for names, checkpoint in (
        ("sda,sdx", "thursday"),
        ("sda,sdb", "monday"),
        *[("sda", "thursday")] * len(since),
    ):
        cli.fails(1, verb, names, checkpoint, *since, "--hook", hook)
    assert len(log.read_text().splitlines()) == 6, "a guest was frozen for what cannot be done"
    hangs = hook_with_which_it_hangs(cli, served)
    said = cli.fails(4, verb, "sda", "thursday", "--hook", hangs, "--freeze-limit", "0.05")
    assert "did not answer within 0.05 s" in said
    assert (cli.folder / "thawed").exists()


def test_hook_is_run_for_a_checkpoint_of_a_disk_that_nobody_serves(cli: Cli) -> None:
    cli.add("sda")
    hook, log = cli.folder / "hook", cli.folder / "asked"
    hook.write_text(f'#!/bin/sh\necho "$@" >> {log}\n')
    hook.chmod(0o755)
    cli.ok("checkpoint", "sda", "monday", "--hook", hook)
    assert log.read_text().splitlines() == ["freeze sda", "thaw sda"]


def test_a_failed_thaw_is_told_by_the_answer_and_the_exit_code(cli: Cli, served: Served) -> None:
    """The backup is good; the guest may be frozen still."""
    hook = cli.folder / "hook"
    hook.write_text('#!/bin/sh\n[ "$1" != thaw ] || { echo "no such guest"; exit 3; }\n')
    hook.chmod(0o755)
    words = ("sda", cli.folder / "backups", "--hook", hook)
    answer = cli("backup", *words, "--json")
    told = json.loads(answer.out)
    assert answer.code == 1
    assert told["thaw_failure"] == f"hook `{hook} thaw sda` ended with 3: no such guest"
    assert [made["type"] for made in told["backups"]] == ["full"]
    assert "what was asked for is done, but the guest may be frozen still: hook `" in answer.err
    assert answer.err.endswith("thaw it by hand\n")
    answer = cli("backup", *words)
    assert answer.code == 1
    assert answer.out.startswith("sda: incremental · ")
    assert cli.json("backup", "sda", cli.folder / "backups")["thaw_failure"] is None
    answer = cli("sync", "sda", cli.folder / "copy.raw", "--hook", hook, "--json")
    assert (answer.code, json.loads(answer.out)["thaw_failure"]) == (1, told["thaw_failure"])
    assert "sda as of now" in cli.ok("sync", "sda", cli.folder / "copy.raw")


def test_how_long_a_guest_may_stay_frozen_is_said(cli: Cli, served: Served) -> None:
    hangs = hook_with_which_it_hangs(cli, served)
    words = ("backup", "sda", cli.folder / "backups", "--hook", hangs, "--freeze-limit")
    assert "did not answer within 0.05 s" in cli.fails(4, *words, "0.05")
    cli.ok("backup", "sda", cli.folder / "backups", "--freeze-limit", "50")
    assert "0" in cli.fails(2, "backup", "sda", cli.folder / "backups", "--freeze-limit", "0")
    cli.ok("sync", "sda", cli.folder / "copy.raw", "--freeze-limit", "50")


def manifest(cli: Cli, name: str) -> object:
    return json.loads((cli.folder / "backups" / name / "manifest.json").read_text())


def test_rescan_that_is_asked_for_finds_what_the_bitmap_does_not_know(cli: Cli, served: Served) -> None:
    """As of a disk that some program wrote around the tracker and set the mtime back."""
    cli.ok("backup", "sda", cli.folder / "backups")
    with open(cli.folder / "sda.raw", "r+b", buffering=0) as image:
        image.seek(5 * MIB)
        image.write(b"stranger")
    [made] = cli.json("backup", "sda", cli.folder / "backups")["backups"]
    assert (made["type"], made["bytes_changed"]) == ("incremental", 0)
    [made] = cli.json("backup", "sda", cli.folder / "backups", "--rescan")["backups"]
    assert (made["type"], made["reason"], made["bytes_changed"]) == ("rescan", None, 64 * KIB)
    assert 0 < made["bytes_read"] <= SIZE
    out = cli.folder / "out.raw"
    cli.ok("restore", cli.folder / "backups", "sda", out)
    assert out.read_bytes() == (cli.folder / "sda.raw").read_bytes()


def test_one_bad_disk_of_three_leaves_two_incremental(cli: Cli) -> None:
    names = ["sda", "sdb", "sdc"]
    images: list[Path] = [cli.add(name) for name in names]
    cli.ok("backup", *names, cli.folder / "backups")
    with images[1].open("r+b") as image:
        image.write(b"stranger")
    made = cli.json("backup", *names, cli.folder / "backups")["backups"]
    assert [one["type"] for one in made] == ["incremental", "rescan", "incremental"]
    assert made[1]["reason"]["code"] == "new-epoch"
    said = cli.fails(3, "backup", *names, cli.folder / "other", "--require-incremental")
    assert "no earlier backup" in said


def test_scratch_folder_that_is_not_there_is_told_at_once_and_fails_the_backup_only(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli.add("sda")
    monkeypatch.chdir(cli.folder)
    with cli.serving("sda", "--scratch=none", log=True) as served:
        problem = f"the scratch folder {cli.folder}/none does not exist; check the name and its folder"
        assert cli.fails(1, "backup", "sda", cli.folder / "backups") == problem
        write(served.uris["sda"], MIB, 100)
        assert len(cli.json("info", "sda")["checkpoints"]) == 1
    assert served.child.stderr == f"lmdbitmap: no disk can be backed up while it is served: {problem}\n"


def test_scratch_folder_that_does_not_answer_keeps_no_guest_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As on a network file system. It is tried out before the guest is served."""
    answers, looking = threading.Event(), []

    def open_late(folder: str) -> int:
        looking.append(threading.current_thread())
        answers.wait(PATIENCE_SECONDS)
        return files.open_nameless(folder)

    monkeypatch.setattr("lmdbitmap.tracker.scratch.open_nameless", open_late)
    monkeypatch.setattr(serve, "_LOOK_S", 0.05)
    begun_s = time.monotonic()
    serve._warn_of_no(Scratch(str(tmp_path)))
    assert time.monotonic() - begun_s < PATIENCE_SECONDS / 2
    answers.set()
    for thread in looking:  # its folder goes with this test, and it would say so in a later one
        thread.join(PATIENCE_SECONDS)
    assert caplog.messages == [
        f"no disk can be backed up while the scratch folder {tmp_path} does not answer"
    ]
