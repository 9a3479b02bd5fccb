"""`backup --stdout` and `restore -`: nothing but the stream on stdout, and what was made told beside it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest
from click.testing import CliRunner

from lmdbitmap.access.owners import owner_of
from lmdbitmap.cli.backups import backup, restore
from lmdbitmap.cli.options import Verb
from lmdbitmap.cli.streams import require_stream_out
from lmdbitmap.errors import Busy
from lmdbitmap.store import Store
from lmdbitmap.streams.stream import stream_backup
from lmdbitmap.syncs.sync import sync
from lmdbitmap.tracker.chain import disk_called
from tests.cli.conftest import MIB, SIZE, Cli
from tests.cli.test_serve import write
from tests.helpers import naive_rbd_diff
from tests.helpers.support import run


class Said(NamedTuple):
    code: int
    out: bytes
    err: str


def say(cli: Cli, *words: object, stdin: bytes = b"") -> Said:
    """In a process of its own, as only that has standard input and output."""
    done = subprocess.run(cli.command(*words), input=stdin, capture_output=True, timeout=30)
    return Said(done.returncode, done.stdout, done.stderr.decode())


def streamed(cli: Cli, *options: object) -> tuple[naive_rbd_diff.Stream, Any]:
    """The stream, and what was told on stderr."""
    said = say(cli, "backup", "sda", "--stdout", "--json", *options)
    assert said.code == 0, said.err
    return naive_rbd_diff.read(said.out), json.loads(said.err)


@pytest.fixture
def image(cli: Cli) -> Path:
    made = cli.add("sda")
    made.write_bytes(os.urandom(MIB) + bytes(SIZE - MIB))
    cli.ok("adopt", "sda")
    return made


def change(cli: Cli, image: Path, data: bytes, offset: int) -> None:
    """As a guest would: written and marked."""
    with image.open("r+b") as file:
        file.seek(offset)
        file.write(data)
    cli.ok("adopt", "sda")
    cli.ok("mark", "sda", offset, len(data))


@pytest.mark.parametrize("version", [1, 2])
def test_a_disk_travels_in_a_full_stream_and_a_diff(cli: Cli, image: Path, version: int) -> None:
    out = cli.folder / "out.raw"
    for number, since in enumerate((None, "0")):
        options = ["--checkpoint", number, "--diff-version", version, *(["--since", since] if since else [])]
        said = say(cli, "backup", "sda", "--stdout", *options)
        assert say(cli, "restore", "-", out, stdin=said.out).code == 0
        assert out.read_bytes() == image.read_bytes()
        assert naive_rbd_diff.read(said.out)[:4] == (version, SIZE, since, str(number))
        change(cli, image, b"x" * 100, 3 * MIB)
    assert len(said.out) < 100_000


def test_what_was_made_is_told_beside_the_stream(cli: Cli, image: Path) -> None:
    said = say(cli, "backup", "sda", "--stdout", "--checkpoint", "monday")
    assert (said.code, said.out[:12]) == (0, b"rbd diff v1\n")
    assert said.err.startswith("sda: full · 8 MiB of 8 MiB · ")
    assert " streamed · checkpoint monday · " in said.err
    change(cli, image, b"x", 0)
    stream, told = streamed(cli, "--since", "monday")
    assert told == {
        "disk": "sda", "since": "monday", "checkpoint": stream.to_name, "size": SIZE, "trust": told["trust"],
        "bytes_changed": 65536, "bytes_zero": 0, "bytes_streamed": told["bytes_streamed"], "seconds": told["seconds"],
        "thaw_failure": None,
    }  # fmt: skip
    names = [point["name"] for point in cli.json("info", "sda")["checkpoints"]]
    assert names[-2:] == ["monday", stream.to_name]


def test_a_stream_without_a_name_is_not_said_to_be_of_now(cli: Cli, image: Path) -> None:
    """It may be of last year."""
    data = naive_rbd_diff.written(naive_rbd_diff.Stream(1, SIZE, None, None, []))
    said = say(cli, "restore", "-", cli.folder / "out.raw", stdin=data).out.decode()
    assert "out.raw: as of a moment without a name · 0 B of data on 8 MiB · " in said


def test_what_was_received_is_told(cli: Cli, image: Path) -> None:
    data = say(cli, "backup", "sda", "--stdout", "--checkpoint", "monday").out
    out = cli.folder / "out.raw"
    told = json.loads(say(cli, "restore", "-", out, "--json", stdin=data).out)
    assert told == {
        "file": str(out), "size": SIZE, "since": None, "checkpoint": "monday", "diff_version": 1,
        "bytes_written": MIB, "bytes_zero": SIZE - MIB, "bytes_behind": 0,
        "seconds": told["seconds"],
    }  # fmt: skip
    diff = say(cli, "backup", "sda", "--stdout", "--since", "monday", "--checkpoint", "tuesday").out
    said = say(cli, "restore", "-", out, stdin=diff)
    assert said.out.decode().startswith(
        f"{out}: as of tuesday, changed since monday · 0 B of data on 8 MiB · "
    )


def test_standard_input_is_meant_beside_a_file_of_that_name_too(
    cli: Cli, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(cli.folder)
    Path("-").write_bytes(b"")
    data = say(cli, "backup", "sda", "--stdout").out
    said = say(cli, "restore", "-", "out.raw", stdin=data)
    assert said.code == 0, said.err
    assert Path("out.raw").read_bytes() == image.read_bytes()
    assert "is a file" in cli.fails(2, "restore", "sda.raw", "sda", "other.raw")


# --- what fails ---


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--since", "sunday"], 1, "sunday"),
        (["--checkpoint", "monday"], 1, "monday"),
        (["--checkpoint", "two\nlines"], 2, "two"),
        (["--full"], 2, "--since says what to count from: leave out --full (see 'lmdbitmap backup --help')"),
        (["backups"], 2, "--stdout takes one NAME, and no REPO"),
        (["--diff-version", "3"], 2, "--diff-version"),
    ],
)
def test_what_cannot_be_streamed_is_one_sentence_and_nothing_on_stdout(
    cli: Cli, image: Path, options: list[str], code: int, words: str
) -> None:
    cli.ok("checkpoint", "sda", "monday")
    said = say(cli, "backup", "sda", "--stdout", *options)
    assert (said.code, said.out) == (code, b""), said
    assert words in said.err
    assert (said.err.startswith("lmdbitmap: "), said.err.count("\n")) == (True, 1)


def test_a_checkpoint_that_cannot_be_trusted_is_exit_code_3(cli: Cli, image: Path) -> None:
    cli.ok("checkpoint", "sda", "monday")
    os.utime(image, ns=(2**61, 2**61))
    said = say(cli, "backup", "sda", "--stdout", "--since", "monday")
    assert (said.code, said.out) == (3, b"")
    assert said.err.endswith("; make a full backup\n")


def test_a_served_disk_is_streamed_as_it_was(cli: Cli, image: Path) -> None:
    """Its guest writes before the stream and after it; what nobody wrote is not named."""
    with cli.serving("sda") as served:
        cli.ok("checkpoint", "sda", "sunday")
        before = image.read_bytes()
        write(served.uris["sda"], MIB, 100)
        then = image.read_bytes()
        said = say(cli, "backup", "sda", "--stdout", "--since", "sunday", "--checkpoint", "monday")
        write(served.uris["sda"], 3 * MIB, 100)
        assert cli.json("info", "sda")["served"]["snapshots"] == []
    assert said.code == 0, said.err
    assert naive_rbd_diff.applied(naive_rbd_diff.read(said.out), before) == then != before
    assert len(said.out) < 70_000


@pytest.mark.parametrize(
    ("closed", "words", "said"),
    [
        (
            ">&-",
            ["backup", "sda", "--stdout"],
            "Standard output is closed; lead the stream into a pipe or a file",
        ),
        ("<&-", ["restore", "-", "out.raw"], "Standard input is closed"),
    ],
)
def test_a_stream_that_goes_nowhere_is_not_called_done(
    cli: Cli, image: Path, closed: str, words: list[str], said: str
) -> None:
    before = cli.json("info", "sda")["checkpoints"]
    done = run("sh", "-c", f'exec "$@" {closed}', "sh", *cli.command(*words), check=False, cwd=cli.folder)
    assert (done.returncode, said in done.stderr) == (2, True), done
    assert cli.json("info", "sda")["checkpoints"] == before
    assert not (cli.folder / "out.raw").exists()


def test_a_reader_that_goes_away_is_told_of_and_costs_nothing(cli: Cli, image: Path) -> None:
    before = cli.json("info", "sda")["checkpoints"]
    with subprocess.Popen(
        cli.command("backup", "sda", "--stdout"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        assert child.stdout.read(12) == b"rbd diff v1\n"
        child.stdout.close()
        err = child.stderr.read().decode()
        assert child.wait(30) == 1
    assert err == (
        "lmdbitmap: the stream: Broken pipe; see what its reader says, and stream again: nothing was lost by it\n"
    )
    assert [point["name"] for point in cli.json("info", "sda")["checkpoints"]] == [
        point["name"] for point in before
    ]


def test_options_of_a_stream_belong_to_a_stream(cli: Cli, image: Path) -> None:
    said = cli.fails(2, "backup", "sda", cli.folder / "backups", "--since", "x", "--diff-version", "1")
    assert said.startswith("--since and --diff-version belong to a backup with --stdout")
    said = cli.fails(2, "backup", "sda", cli.folder / "backups", "--since", "x")
    assert said.startswith("--since belongs to a backup with --stdout")
    assert "Missing argument 'REPO'" in cli.fails(2, "backup", "sda")
    assert "Missing argument 'OUT'" in cli.fails(2, "restore", cli.folder, "sda")
    assert "Missing argument 'NAME'" in cli.fails(2, "restore", cli.folder)
    assert "Missing argument 'OUT'" in cli.fails(2, "restore", "-")
    assert "only OUT is named, and no NAME" in cli.fails(2, "restore", "-", "sda", "out.raw")
    assert "leave out --at" in cli.fails(2, "restore", "-", "out.raw", "--at", "1")
    assert not (cli.folder / "backups").exists()


IGNORED = [
    ("backup", ["--incremental"], "--since says what to count from: leave out --"),
    ("backup", ["--full"], "--since says what to count from: leave out --"),
    ("backup", ["--require-incremental"], "A stream with --since is an increment or fails"),
    ("backup", ["--speed-limit", "1M"], "A stream is as fast as its reader"),
    ("backup", ["--compress", "zstd"], "A stream is not compressed"),
    ("backup", ["--digest", "sha256"], "A stream has no digests"),
    ("backup", ["--take-over"], "A stream has no REPO"),
    ("backup", ["--new-repository"], "A stream has no REPO"),
    ("restore", ["--at", "1"], "leave out --at"),
    ("restore", ["--in-place"], "The stream itself says whether"),
    ("restore", ["--no-verify"], "A stream has no digests to prove it by"),
]
"""What a backup or a restore can be told and a stream has no use for, and what is said to it."""

TAKEN = {
    "backup": {
        "stdout", "since", "checkpoint", "diff-version", "hook", "hook-limit", "freeze-limit", "nice", "owner-limit",
        "lock-wait", "store", "json", "differential", "rescan",  # these two as the other kinds of backups
    },
    "restore": {"larger", "store", "json"},
}  # fmt: skip


@pytest.mark.parametrize(("verb", "option", "refusal"), IGNORED)
def test_what_a_stream_would_ignore_is_refused(
    cli: Cli, image: Path, verb: str, option: list[str], refusal: str
) -> None:
    words = ["sda", "--stdout"] if verb == "backup" else ["-", cli.folder / "out.raw"]
    said = say(cli, verb, *words, *option)
    assert (said.code, said.out) == (2, b"")
    assert refusal in said.err
    assert not (cli.folder / "out.raw").exists()


def test_every_option_was_thought_of() -> None:
    for verb, command in (("backup", backup), ("restore", restore)):
        options = {name for option in command.params for name in option.opts if name.startswith("--")}
        refused = {option[0] for of, option, _ in IGNORED if of == verb}
        assert options - refused == {f"--{name}" for name in TAKEN[verb]}


def test_an_option_that_nobody_thought_of_is_refused() -> None:
    command = Verb("backup", params=[click.Option(["--new"])], callback=lambda new: require_stream_out())
    assert "--new means nothing to a stream" in CliRunner().invoke(command, ["--new", "x"]).output
    assert CliRunner().invoke(command, []).exit_code == 0


def test_a_cut_stream_is_exit_code_1_and_leaves_no_file(cli: Cli, image: Path) -> None:
    data = say(cli, "backup", "sda", "--stdout").out
    said = say(cli, "restore", "-", cli.folder / "out.raw", stdin=data[:-1])
    assert (said.code, said.out) == (1, b"")
    assert said.err.startswith(f"lmdbitmap: the stream, byte {len(data) - 1}: expected more of the stream")
    assert not (cli.folder / "out.raw").exists()


@pytest.mark.parametrize("words", [("backup", "sda", "--stdout"), ("restore", "-", "out.raw")])
def test_a_terminal_is_spared_the_bytes(cli: Cli, image: Path, words: tuple[str, ...]) -> None:
    controller, terminal = pty.openpty()
    try:
        done = subprocess.run(
            cli.command(*words), stdin=terminal, stdout=terminal, stderr=subprocess.PIPE, timeout=30
        )
    finally:
        os.close(terminal)
        os.close(controller)
    assert done.returncode == 2
    assert b"this is a terminal; lead it " in done.stderr


def test_tracked_image_is_not_changed_by_a_stream(cli: Cli, image: Path) -> None:
    """Of a far one or a block device nobody would notice, and the next backup would lack what the stream brought."""
    before = image.read_bytes()
    cli.ok("checkpoint", "sda", "monday")
    data = say(cli, "backup", "sda", "--stdout", "--since", "monday").out
    said = say(cli, "restore", "-", image, stdin=data)
    assert said.code == 1
    assert "is the image of disk 'sda', and its tracker would not know" in said.err
    assert image.read_bytes() == before
    cli.ok("rm", "sda")
    assert say(cli, "restore", "-", image, stdin=data).code == 0


@pytest.mark.parametrize("to", ["stream", "sync"])
def test_a_checkpoint_that_gave_its_name_away_meanwhile_is_not_counted_from(
    cli: Cli, image: Path, to: str
) -> None:
    """What changed before the new one of that name would be missing."""
    with cli.serving("sda") as served, Store.open(str(cli.store)) as store:
        cli.ok("checkpoint", "sda", "daily")
        since = "daily" if to == "stream" else sync(store, "sda", cli.folder / "copy").checkpoint
        write(served.uris["sda"], MIB, 100)

        @contextlib.contextmanager
        def forgotten_and_made_anew() -> Iterator[None]:
            cli.ok("forget", "sda", since)
            with owner_of(store, disk_called(store, "sda")) as client:
                client.call("checkpoint", disks=["sda"], name=since)
            yield

        again: dict[str, Callable[..., object]] = {
            "stream": partial(stream_backup, store, "sda", io.BytesIO(), since=since),
            "sync": partial(sync, store, "sda", cli.folder / "copy"),
        }
        with pytest.raises(Busy, match="was forgotten just now, and another has its name"):
            again[to](quiesced=forgotten_and_made_anew)
