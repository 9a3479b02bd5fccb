"""backup and restore: what was asked for, what it became and why, and the way back."""

from __future__ import annotations

import json
import os
import pty
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lmdbitmap import Filter, Store, back_up
from tests.cli.conftest import MIB, SIZE, Cli
from tests.cli.test_serve import write
from tests.helpers.support import all_that_appears, requires, run

pytestmark = pytest.mark.in_memory

KIB = 1 << 10


@pytest.fixture
def repository(cli: Cli) -> Path:
    """Where disk `sda`, half a MiB of data, has its full backup."""
    image = cli.add("sda")
    with open(image, "r+b") as file:
        file.write(b"x" * (MIB // 2))
    cli.ok("adopt", "sda")
    folder = cli.folder / "backups"
    cli.ok("backup", "sda", folder)
    return folder


def _write(cli: Cli, offset: int, data: bytes) -> None:
    """As a guest would, through the tracker."""
    with Store.open(str(cli.store)) as store, Filter.attach(store, "sda", background=False) as disk:
        disk.pwrite(data, offset)


def _restored(cli: Cli, repository: Path, *options: object) -> bytes:
    out = cli.folder / "restored.raw"
    out.unlink(missing_ok=True)
    cli.ok("restore", repository, "sda", out, *options)
    return out.read_bytes()


def test_the_first_backup_is_full_and_says_why(cli: Cli) -> None:
    cli.add("sda")
    [made] = cli.json("backup", "sda", cli.folder / "backups")["backups"]
    assert made == {
        "disk": "sda", "backup": "1", "file": str(cli.folder / "backups/sda/000001-full.qcow2"),
        "type": "full", "requested": "incremental",
        "reason": {"code": "no-earlier-backup", "words": "no earlier backup"},
        "parent": None, "checkpoint": made["checkpoint"], "time": made["time"], "size": SIZE, "trust": "exact",
        "bytes_read": 0, "bytes_changed": SIZE, "bytes_zero": SIZE, "bytes_stored": os.path.getsize(made["file"]),
        "sha256": None, "chunks_sha256": made["chunks_sha256"], "digest": "blake3", "digest_reason": None,
        "compression": None, "seconds": made["seconds"],
    }  # fmt: skip
    assert cli.json("info", "sda")["since"] == made["checkpoint"]


def test_the_next_one_copies_what_changed(cli: Cli, repository: Path) -> None:
    _write(cli, MIB, b"y" * 100)
    said = cli.ok("backup", "sda", repository)
    assert said.startswith("sda: incremental · 64 KiB of 8 MiB · ")
    assert " stored in 000002-incremental.qcow2 · " in said
    assert _restored(cli, repository) == (cli.folder / "sda.raw").read_bytes()


@pytest.mark.parametrize("compression", ["zlib", "zstd:9"])
def test_a_backup_is_compressed_where_that_is_asked_for(cli: Cli, repository: Path, compression: str) -> None:
    _write(cli, MIB, b"y" * MIB)
    said = cli.ok("backup", "sda", repository, "--compress", compression)
    kind = compression.partition(":")[0]
    assert f" stored with {kind} in 000002-incremental.qcow2 · " in said
    [made] = cli.json("backup", "sda", repository, "--full", "--compress", compression)["backups"]
    assert (made["compression"], made["bytes_changed"]) == (kind, SIZE)
    assert made["bytes_stored"] < 400 * KIB
    for at in ("2", "3"):
        assert _restored(cli, repository, "--at", at) == (cli.folder / "sda.raw").read_bytes()


@pytest.mark.parametrize("compression", ["lz4", "zlib:10", "zstd:"])
def test_a_compression_that_there_is_not_is_refused_before_anything_is_done(
    cli: Cli, repository: Path, compression: str
) -> None:
    said = cli.fails(2, "backup", "sda", repository, "--compress", compression)
    assert f"{compression!r} is no compression; choose zlib or zstd" in said
    assert len(list((repository / "sda").glob("*.qcow2"))) == 1


def test_one_goes_back_to_any_backup(cli: Cli, repository: Path) -> None:
    _write(cli, 0, b"y")
    cli.ok("backup", "sda", repository)
    assert _restored(cli, repository, "--at", "1")[:1] == b"x"
    assert _restored(cli, repository)[:1] == b"y"


def test_full_and_differential_are_made_when_asked_for(cli: Cli, repository: Path) -> None:
    for offset in (0, MIB):
        _write(cli, offset, b"y")
        [made] = cli.json("backup", "sda", repository, "--differential")["backups"]
    assert (made["type"], made["parent"], made["bytes_changed"]) == ("differential", "1", 128 * KIB)
    [made] = cli.json("backup", "sda", repository, "--full")["backups"]
    assert (made["type"], made["reason"]) == ("full", None)


def test_where_nobody_knows_what_changed_the_disk_is_compared_with_its_last_backup(
    cli: Cli, repository: Path
) -> None:
    with open(cli.folder / "sda.raw", "r+b") as image:
        image.seek(3 * MIB)
        image.write(b"stranger")
    os.utime(cli.folder / "sda.raw", ns=(2**61, 2**61))
    said = cli.fails(3, "backup", "sda", repository, "--require-incremental")
    assert said == (
        "disk 'sda' cannot have an incremental backup: the image was written while it was not tracked;"
        " leave out --require-incremental, or make a full backup"
    )
    said = cli.ok("backup", "sda", repository)
    assert said.startswith("sda: rescan: the image was written while it was not tracked · 64 KiB of 8 MiB · ")
    assert _restored(cli, repository) == (cli.folder / "sda.raw").read_bytes()
    assert (
        cli.json("backup", "sda", repository, "--require-incremental")["backups"][0]["type"] == "incremental"
    )


def test_several_disks_are_one_point_in_time(cli: Cli) -> None:
    cli.add("a")
    cli.add("b")
    made = cli.json("backup", "a", "b", cli.folder / "backups")["backups"]
    assert [one["disk"] for one in made] == ["a", "b"]
    assert made[0]["time"] == made[1]["time"]


def test_a_restore_tells_what_it_wrote(cli: Cli, repository: Path) -> None:
    out = cli.folder / "out.raw"
    told = cli.json("restore", repository, "sda", out, "--store", cli.folder / "none")
    assert told == {
        "disk": "sda", "file": str(out), "backup": "1", "time": told["time"], "size": SIZE,
        "bytes_written": MIB // 2, "bytes_zeroed": 0, "bytes_read": 0, "bytes_behind": 0, "tracked": None,
        "seconds": told["seconds"],
    }  # fmt: skip
    assert os.stat(out).st_blocks * 512 < SIZE, "sparse"
    out.unlink()
    assert " · 512 KiB of data on 8 MiB · " in cli.ok("restore", repository, "sda", out)


@pytest.mark.parametrize(
    ("name", "options", "code", "said"),
    [
        (
            "sdx",
            [],
            1,
            "has no backup of a disk called 'sdx'; name another disk: the repository has backups of sda",
        ),
        ("sda", ["--at", "7"], 1, "7"),
        ("../sda", [], 2, "starts with . or -"),
    ],
)
def test_what_cannot_be_restored_is_told(
    cli: Cli, repository: Path, name: str, options: list[str], code: int, said: str
) -> None:
    out = cli.folder / "out.raw"
    assert said in cli.fails(code, "restore", repository, name, out, *options)
    assert not out.exists()


def test_nothing_is_overwritten(cli: Cli, repository: Path) -> None:
    (cli.folder / "mine").write_bytes(b"mine")
    said = cli.fails(1, "restore", repository, "sda", cli.folder / "mine")
    assert said.endswith(
        "exists, and is not empty; name a new file, remove that one, or say --in-place to write what differs into it"
    )
    assert (cli.folder / "mine").read_bytes() == b"mine"


def test_a_tracked_image_is_not_restored_around_its_tracker(cli: Cli, repository: Path) -> None:
    before = (cli.folder / "sda.raw").read_bytes()
    link = cli.folder / "link"
    link.symlink_to("sda.raw")
    for name in ("sda.raw", "link"):
        said = cli.fails(1, "restore", repository, "sda", cli.folder / name)
        assert said == (
            f"{cli.folder / name} is the image of disk 'sda', and its tracker would not know what was written to it;"
            " say --in-place, which goes through the tracker, or name a new file"
        )
    assert (cli.folder / "sda.raw").read_bytes() == before


def test_restored_in_place_through_the_tracker_the_chain_goes_on(cli: Cli, repository: Path) -> None:
    image = cli.folder / "sda.raw"
    first = image.read_bytes()
    epoch = cli.json("ls")["disks"]
    _write(cli, MIB, b"y" * 100)
    _write(cli, 5 * MIB, b"y" * 100)
    cli.ok("backup", "sda", repository)
    told = cli.json("restore", repository, "sda", image, "--in-place", "--at", "1")
    assert (told["tracked"], told["bytes_zeroed"], told["bytes_written"]) == ("sda", 8 * KIB, 0)
    assert image.read_bytes() == first
    [made] = cli.json("backup", "sda", repository)["backups"]
    assert (made["type"], made["reason"], made["bytes_changed"]) == ("incremental", None, 128 * KIB)
    assert _restored(cli, repository) == first
    after = cli.json("ls")["disks"]
    assert after == [{**one, "since": made["checkpoint"], "holds": after[0]["holds"]} for one in epoch]


def test_restored_in_place_it_says_what_was_read_and_written(cli: Cli, repository: Path) -> None:
    out = cli.folder / "copy.raw"
    cli.ok("restore", repository, "sda", out)
    with open(out, "r+b") as file:
        file.write(b"other")
    said = cli.ok("restore", repository, "sda", out, "--in-place")
    assert " · 4 KiB written and 0 B zeroed on 8 MiB · 512 KiB read to compare · " in said
    assert _restored(cli, repository) == out.read_bytes()


def test_the_folder_of_a_disk_is_not_taken_for_a_repository(cli: Cli, repository: Path) -> None:
    """REPO/sda for REPO would begin a chain anew, in a repository inside of another."""
    folder = repository / "sda"
    before = sorted(repository.rglob("*"))
    step = f"it is the folder of one disk; name the repository, {repository}"
    for words in (
        ["backup", "sda", folder],
        ["backup", "sda", folder, "--full"],
        ["copy", repository, folder],
    ):
        assert cli.fails(2, *words) == f"{folder} is no repository; {step}"
    for words in (["ls", folder], ["verify", folder], ["prune", folder, "--keep", "1"]):
        assert cli.fails(1, *words) == f"{folder} has no backups; {step}"
    assert cli.fails(1, "restore", folder, "sda", cli.folder / "out.raw").endswith(step)
    assert sorted(repository.rglob("*")) == before


def test_a_disk_may_be_called_as_a_manifest_is(cli: Cli) -> None:
    cli.add("manifest.json")
    for _ in range(2):
        cli.ok("backup", "manifest.json", cli.folder / "backups")
    cli.ok("verify", cli.folder / "backups")


@pytest.mark.parametrize("inside", ["", "backups", "holds", "new/deep"])
def test_nothing_is_backed_up_copied_or_restored_into_a_store(
    cli: Cli, repository: Path, inside: str
) -> None:
    """Whichever store it is, and by whatever name: `check` would take it for a leftover."""
    (cli.folder / "link").symlink_to(cli.store)
    before = sorted(cli.store.rglob("*"))
    place = cli.folder / "link" / inside
    for words in (
        ["backup", "sda", place],
        ["copy", repository, place],
        ["restore", repository, "sda", place / "x.raw"],
        ["sync", "sda", place / "x.raw"],
        ["restore", repository, "sda", place / "x.raw", "--store", cli.folder / "none"],
    ):
        assert f"is inside of the store {cli.store}; name a place outside of it" in cli.fails(2, *words)
    assert sorted(cli.store.rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--full", "--incremental"], "--full and --incremental ask for 2"),
        (["--incremental", "--full", "--full"], "--full and --incremental ask for 2"),
        (["--rescan", "--differential"], "--differential and --rescan ask for 2"),
        (["--rescan", "--full", "--differential"], "--full and --differential and --rescan ask for 3"),
    ],
)
def test_two_kinds_are_refused_instead_of_taking_one(
    cli: Cli, repository: Path, words: list[str], named: str
) -> None:
    said = cli.fails(2, "backup", "sda", repository, *words)
    assert said.startswith(f"A backup is of one kind, and {named}: leave all but one out")
    assert len(cli.json("ls", repository)["disks"][0]["backups"]) == 1


def test_a_kind_may_be_said_twice_and_need_not_be_said(cli: Cli, repository: Path) -> None:
    def requested(*words: str) -> str:
        [made] = cli.json("backup", "sda", repository, *words)["backups"]
        return str(made["requested"])

    assert (requested(), requested("--full", "--full")) == ("incremental", "full")
    assert (requested("--incremental"), requested("--rescan")) == ("incremental", "rescan")


def test_a_missing_folder_is_what_is_told_of_not_the_file_that_is_to_be_made(
    cli: Cli, repository: Path
) -> None:
    away = cli.folder / "away"
    said = f"there is no folder {away}; make it, or name another place"
    assert cli.fails(1, "restore", repository, "sda", away / "sda.raw") == said
    assert cli.fails(1, "export", "sda", away / "sda.dbm") == said
    assert cli.fails(1, "show", "sda", "--svg", away / "sda.svg") == said


def test_a_disk_is_restored_as_it_was_at_a_time(cli: Cli, repository: Path) -> None:
    before = _restored(cli, repository)
    _write(cli, 0, b"later" * 1000)
    [made] = cli.json("backup", "sda", repository)["backups"]
    times = [each["time"] for each in cli.json("ls", repository)["disks"][0]["backups"]]
    for at, backup in ((times[0], "1"), (times[1], made["backup"]), (times[1][:10], made["backup"])):
        out = cli.folder / f"at-{len(at)}-{backup}.raw"
        assert cli.json("restore", repository, "sda", out, "--at", at)["backup"] == backup
        assert (out.read_bytes() == before) is (backup == "1")
    out = cli.folder / "no.raw"
    said = cli.fails(1, "restore", repository, "sda", out, "--at", "1999-12-31")
    assert (
        said
        == "disk sda has no backup as old as 1999-12-31; name one of 1, 2; `lmdbitmap ls REPO` tells of each"
    )
    said = cli.fails(1, "restore", repository, "sda", out, "--at", "yesterday")
    assert "neither a number nor a time; write a time like '2026-11-29 02:38'" in said
    assert "write it like" in cli.fails(2, "restore", repository, "sda", out, "--at", "2026-02-30")
    assert "name one of 1, 2;" in cli.fails(1, "verify", repository, "sda", "--at", "9")
    assert "name one of 1, 2;" in cli.fails(1, "prune", repository, "sda", "--drop", "9")
    assert not out.exists()


@pytest.mark.parametrize("store", ["none", "empty"])
def test_without_a_store_nothing_is_tracked(cli: Cli, repository: Path, store: str) -> None:
    (cli.folder / "empty").mkdir()
    image = cli.folder / "sda.raw"
    told = cli.json("restore", repository, "sda", image, "--in-place", "--store", cli.folder / store)
    assert (told["tracked"], told["bytes_written"]) == (None, 0)


def test_a_larger_target_is_said_to_be_one(cli: Cli, repository: Path) -> None:
    out = cli.folder / "out.raw"
    out.write_bytes(b"x" * (SIZE + MIB))
    said = cli.fails(2, "restore", repository, "sda", out, "--in-place")
    assert f"or say --larger, which zeroes the {MIB} bytes behind the disk" in said
    assert " · zeroes on the 1 MiB behind it · " in cli.ok(
        "restore", repository, "sda", out, "--in-place", "--larger"
    )
    assert out.stat().st_size == SIZE + MIB
    told = cli.json("restore", repository, "sda", out, "--in-place", "--larger")
    assert (told["bytes_behind"], told["bytes_zeroed"]) == (MIB, 0)


def test_a_served_disk_is_not_restored_in_place(cli: Cli, repository: Path) -> None:
    with cli.serving("sda"):
        said = cli.fails(4, "restore", repository, "sda", cli.folder / "sda.raw", "--in-place")
    assert "attached by another process" in said
    assert "stop the process that serves it" in said


@requires("qemu-io")
def test_through_the_export_of_a_served_disk_its_server_tracks_the_restore(
    cli: Cli, repository: Path
) -> None:
    first = (cli.folder / "sda.raw").read_bytes()
    with cli.serving("sda") as served:
        write(served.uris["sda"], 3 * MIB, 64 * KIB)
        told = cli.json("restore", repository, "sda", served.uris["sda"], "--in-place")
        assert (told["tracked"], told["bytes_zeroed"]) == (None, 64 * KIB)
    assert (cli.folder / "sda.raw").read_bytes() == first
    [made] = cli.json("backup", "sda", repository)["backups"]
    assert (made["type"], made["bytes_changed"]) == ("incremental", 64 * KIB)


def test_a_backup_that_was_damaged_is_not_restored(cli: Cli, repository: Path) -> None:
    [image] = (repository / "sda").glob("*.qcow2")
    with open(image, "r+b") as file:
        file.seek(-10, os.SEEK_END)
        file.write(b"damaged")
    assert "expected BLAKE3" in cli.fails(1, "restore", repository, "sda", cli.folder / "out.raw")
    assert not (cli.folder / "out.raw").exists()
    cli.ok("restore", repository, "sda", cli.folder / "out.raw", "--no-verify")


def test_a_served_disk_is_backed_up_too(cli: Cli, repository: Path) -> None:
    with cli.serving("sda") as served:
        write(served.uris["sda"], MIB, 1)
        [made] = cli.json("backup", "sda", repository)["backups"]
        assert (made["type"], made["trust"], made["bytes_changed"]) == ("incremental", "exact", 64 * KIB)
        write(served.uris["sda"], 3 * MIB, 1)
    then = bytearray((cli.folder / "sda.raw").read_bytes())
    then[3 * MIB : 3 * MIB + 64 * KIB] = bytes(64 * KIB)
    assert _restored(cli, repository) == bytes(then)


def test_unknown_disks_and_folders_are_told(cli: Cli, repository: Path) -> None:
    assert "no disk is called 'sdx'" in cli.fails(1, "backup", "sdx", repository)
    assert "named twice" in cli.fails(2, "backup", "sda", "sda", repository)
    (cli.folder / "file").touch()
    assert "is not a folder" in cli.fails(2, "backup", "sda", cli.folder / "file")
    assert "does not exist" in cli.fails(1, "restore", cli.folder / "none", "sda", cli.folder / "out.raw")


@requires("qemu-io")
def test_killed_while_served_the_next_backup_is_still_incremental_and_right(
    cli: Cli, repository: Path
) -> None:
    with cli.serving("sda") as served:
        write(served.uris["sda"], 3 * MIB, MIB)
        served.child.process.kill()
        served.child.wait()
    [made] = cli.json("backup", "sda", repository)["backups"]
    assert (made["type"], made["trust"]) == ("incremental", "superset")
    assert made["bytes_changed"] >= MIB
    assert _restored(cli, repository) == (cli.folder / "sda.raw").read_bytes()
    run("qemu-img", "check", "-q", made["file"])


def test_on_a_terminal_there_is_a_bar(cli: Cli, repository: Path) -> None:
    terminal, stderr = pty.openpty()
    with ThreadPoolExecutor(
        1
    ) as pool:  # Which reads meanwhile: a slow backup draws more than a terminal keeps.
        screen = pool.submit(all_that_appears, terminal)
        try:
            done = subprocess.run(
                cli.command("backup", "sda", repository, "--full"),
                stdout=subprocess.PIPE,
                stderr=stderr,
                env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
                timeout=20,
            )
        finally:
            os.close(stderr)
        seen = screen.result().decode()
    os.close(terminal)
    assert done.returncode == 0
    assert "backing up sda" in seen
    assert "8.0/8.0 MiB" in seen


# --- where it goes ---


def test_a_disk_that_was_added_anew_takes_its_repository_over_when_that_is_said(
    cli: Cli, repository: Path
) -> None:
    cli.ok("rm", "sda")
    cli.ok("add", "sda", cli.folder / "sda.raw")
    said = cli.fails(1, "backup", "sda", repository)
    assert said == (
        f"{repository}/sda has the backups of another disk that was called 'sda' too; back up to another repository,"
        " or, if it is this very disk that was tracked elsewhere or added anew, say --take-over"
    )
    said = cli.fails(3, "backup", "sda", repository, "--take-over", "--require-incremental")
    assert "backup 1, before it, was made while the disk was tracked elsewhere" in said
    [made] = cli.json("backup", "sda", repository, "--take-over")["backups"]
    assert (made["type"], made["reason"]["code"]) == ("rescan", "tracked-elsewhere")
    assert (made["parent"], made["bytes_changed"]) == ("1", 0)
    assert cli.ok("backup", "sda", repository).startswith("sda: incremental · ")
    assert _restored(cli, repository) == (cli.folder / "sda.raw").read_bytes()


def test_where_a_repository_is_not_mounted_none_begins_by_itself(cli: Cli, repository: Path) -> None:
    repository.rename(cli.folder / "away")
    said = cli.fails(1, "backup", "sda", repository)
    assert said.startswith(
        f"{repository}/sda has no backups, but disk 'sda' was backed up to {repository} on "
    )
    assert said.endswith(
        "; see whether its file system is mounted; to begin a new repository there, say --new-repository"
    )
    assert "no backups to take over" in cli.fails(1, "backup", "sda", repository, "--take-over")
    assert not repository.exists()
    assert cli.ok("backup", "sda", repository, "--new-repository").startswith("sda: full: no earlier backup")


@pytest.mark.parametrize("option", ["--take-over", "--new-repository"])
def test_a_stream_goes_to_no_repository(cli: Cli, option: str) -> None:
    said = cli("backup", "sda", "--stdout", option)
    assert (said.code, "A stream has no REPO" in said.err) == (2, True)


def test_a_disk_that_is_backed_up_while_nobody_serves_it_is_served_once_that_is_over(cli: Cli) -> None:
    cli.add("sda")
    told = []

    def serve(done: int, total: int) -> None:
        told.append(cli("serve", "sda", "--socket", cli.folder / "s"))

    with Store.open(str(cli.store)) as store:
        back_up(store, ["sda"], cli.folder / "backups", progress=serve)
    assert {answer.code for answer in told} == {4}
    assert "disk 'sda' is owned by another process; " in told[0].err
    with cli.serving("sda"):
        assert cli.json("backup", "sda", cli.folder / "backups")["backups"][0]["type"] == "incremental"


# --- what digests are made with ---


@pytest.mark.parametrize("digest", ["sha256", "blake3"])
def test_a_backup_has_the_digests_that_are_asked_for(cli: Cli, digest: str) -> None:
    cli.add("sda")
    [made] = cli.json("backup", "sda", cli.folder / "backups", "--digest", digest)["backups"]
    [listed] = cli.json("ls", cli.folder / "backups")["disks"][0]["backups"]
    assert (made["digest"], made["digest_reason"], listed["digest"]) == (digest, None, digest)
    cli.ok("verify", cli.folder / "backups")


def test_digests_that_cannot_be_are_refused(cli: Cli, repository: Path) -> None:
    assert "'md5' is not one of 'sha256', 'blake3'" in cli("backup", "sda", repository, "--digest", "md5").err
    said = cli("backup", "sda", "--stdout", "--digest", "sha256")
    assert (said.code, "A stream has no digests" in said.err) == (2, True)


@pytest.fixture
def without_blake3(tmp_path: Path) -> dict[str, str]:
    """The environment of a Python that cannot import it, as where it is not installed."""
    folder = tmp_path / "hides"
    folder.mkdir()
    (folder / "blake3.py").write_text("raise ModuleNotFoundError('No module named blake3', name='blake3')")
    return {**os.environ, "PYTHONPATH": str(folder)}


def test_without_the_package_digests_are_sha256_and_what_others_made_is_refused_in_one_sentence(
    cli: Cli, repository: Path, without_blake3: dict[str, str]
) -> None:
    """A whole process, which never sees the package."""

    def says(*words: object) -> tuple[int, str, str]:
        done = subprocess.run(cli.command(*words), capture_output=True, text=True, env=without_blake3)
        return done.returncode, done.stdout, done.stderr

    image = repository / "sda" / "000001-full.qcow2"
    missing = f"lmdbitmap: {image}: expected the package blake3, which BLAKE3 digests need, found none; "
    install, out = "run: pip install 'lmdbitmap[fast]'", cli.folder / "out.raw"
    code, said, _ = says("verify", repository)
    flaw = missing.replace("lmdbitmap: ", "sda backup 1: ") + install
    assert (code, said.splitlines()[0]) == (1, flaw)
    assert says("copy", repository, cli.folder / "copy") == (1, "", f"{missing}{install}\n")
    assert says("mount", repository, "sda", "--socket", cli.folder / "s") == (1, "", f"{missing}{install}\n")
    without = f"{install}, or restore without proof: --no-verify"
    assert says("restore", repository, "sda", out) == (1, "", f"{missing}{without}\n")
    assert not out.exists()
    assert says("restore", repository, "sda", out, "--no-verify")[0] == 0
    assert out.read_bytes() == (cli.folder / "sda.raw").read_bytes()
    code, _, said = says("backup", "sda", repository, "--digest", "blake3")
    assert (code, said.startswith("lmdbitmap: digest blake3: expected the package blake3")) == (1, True)
    code, said, _ = says("backup", "sda", repository)
    words = "there is no package blake3 here, which digests like those of backup 1 need"
    assert (code, said.endswith(f" · its digests are SHA-256: {words}\n")) == (0, True)
    code, said, _ = says("backup", "sda", cli.folder / "another", "--json")
    assert (code, json.loads(said)["backups"][0]["digest"]) == (0, "sha256")
    assert says("verify", cli.folder / "another")[0] == 0
    assert cli.json("verify", repository)["sound"] is True


# --- one bad disk of several ---


@pytest.fixture
def three(cli: Cli) -> Path:
    """Where disks `a`, `b` and `c` have their full backups."""
    for name in ("a", "b", "c"):
        cli.add(name)
    cli.ok("backup", "a", "b", "c", cli.folder / "backups")
    return cli.folder / "backups"


def test_of_three_disks_one_fails_and_two_are_incremental(cli: Cli, three: Path) -> None:
    (cli.folder / "b.raw").unlink()
    said = cli("backup", "a", "b", "c", three)
    assert said.code == 1
    assert [line.split(" · ")[0] for line in said.out.splitlines()] == ["a: incremental", "c: incremental"]
    assert said.err == (
        f"lmdbitmap: b: not backed up: the image of disk 'b', {cli.folder}/b.raw, does not exist any more;"
        " say where it went (`lmdbitmap relocate b IMAGE`), or put it back; `lmdbitmap rm b` if it is gone for good\n"
    )


def test_programs_are_told_of_each_disk(cli: Cli, three: Path) -> None:
    (three / "a" / "manifest.json").write_text("no manifest")
    said = cli("backup", "a", "b", "c", three, "--json")
    told = json.loads(said.out)
    assert [(made["disk"], made["type"]) for made in told["backups"]] == [
        ("b", "incremental"),
        ("c", "incremental"),
    ]
    [failure] = told["failures"]
    assert (failure["disk"], failure["reason"]["code"]) == ("a", "damaged")
    assert failure["reason"]["words"].endswith("or begin a new chain with `backup a REPO --full`")
    assert (said.code, said.err.count("\n")) == (1, 1)
    assert cli.json("backup", "b", "c", three)["failures"] == []


def test_the_exit_code_is_that_of_the_failures_if_they_agree(cli: Cli, three: Path) -> None:
    with Store.open(str(cli.store)) as store, Filter.attach(store, "b", background=False):
        assert cli("backup", "a", "b", "c", three).code == 4
        (cli.folder / "c.raw").unlink()
        said = cli("backup", "a", "b", "c", three)
    assert (said.code, said.err.count("b: not backed up"), said.err.count("c: not backed up")) == (1, 1, 1)


def test_with_require_incremental_nothing_is_made_if_one_disk_cannot_have_it(cli: Cli, three: Path) -> None:
    os.utime(cli.folder / "b.raw", ns=(2**61, 2**61))
    said = cli.fails(3, "backup", "a", "b", "c", three, "--require-incremental")
    assert said.startswith("disk 'b' cannot have an incremental backup")
    assert [len(list((three / name).glob("*.qcow2"))) for name in ("a", "b", "c")] == [1, 1, 1]


@requires("qemu-io")
def test_of_served_disks_one_that_fails_leaves_the_others_too(cli: Cli, three: Path) -> None:
    (three / "b" / "manifest.json").write_text("no manifest")
    with cli.serving("a", "b", "c") as served:
        write(served.uris["c"], MIB, 1)
        said = cli("backup", "a", "b", "c", three, "--json")
        told = json.loads(said.out)
        assert [(made["disk"], made["bytes_changed"]) for made in told["backups"]] == [
            ("a", 0),
            ("c", 64 * KIB),
        ]
        assert [failure["disk"] for failure in told["failures"]] == ["b"]
        assert cli.json("info", "b")["served"]["snapshots"] == []


def test_more_disks_are_backed_up_than_programs_have_files_open(cli: Cli, three: Path) -> None:
    """The limit that a program begins with is often 1024, and each disk takes up to five of them."""
    low = ["sh", "-c", 'ulimit -Sn 16 && exec "$@"', "sh"]
    said = run(*low, *cli.command("backup", "a", "b", "c", three), check=False)
    assert (said.returncode, said.stderr, said.stdout.count("incremental ")) == (0, "", 3)
