"""mount: clients that know nothing of us read a restore point, and nobody changes it."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.cli.conftest import Cli
from tests.helpers.backed_up import BackedUpDisk
from tests.helpers.deep_chain import make_deep_chain
from tests.helpers.nbd_raw import RawClient
from tests.helpers.support import Child, handled, requires, run, signal_another_thread, spawn
from tests.helpers.tracked import NAME
from tests.interop.test_tracked_clients import DEBIAN_PYTHON
from tests.unit.test_verify import few_open_files

KIB, MIB = 1 << 10, 1 << 20
SIZE = 6 * MIB
CLUSTER = 4 * KIB
GREETING = 18
"""Bytes that a server begins with; one that sent them has a thread for its client."""


class Backups(NamedTuple):
    """A disk with two backups, and what it held at each."""

    disk: BackedUpDisk
    repository: Path
    truths: list[bytes]


@pytest.fixture
def backups(cli: Cli) -> Iterator[Backups]:
    disk = BackedUpDisk(cli.folder, SIZE)
    truths = []
    randomness = random.Random(4)
    for offset in (MIB, 3 * MIB - 700):
        disk.write(randomness.randbytes(300 * KIB), offset)
        disk.zero(MIB + 50 * KIB, 20 * KIB)
        disk.backup()
        truths.append(disk.content())
    yield Backups(disk, cli.folder / "backups", truths)
    disk.close()


class Mounted(NamedTuple):
    child: Child
    uri: str


@contextlib.contextmanager
def mounted(cli: Cli, *options: object) -> Iterator[Mounted]:
    """At a unix socket, until SIGTERM, which ends it with 0."""
    socket = cli.folder / "backup.sock"
    words = ("mount", cli.folder / "backups", NAME, *options, "--socket", socket)
    with spawn(*cli.command(*words)) as child:
        child.wait_for_line("^ready$")
        yield Mounted(child, child.wait_for_line(rf"^nbd\+unix:///{NAME}\?socket=.*$").group())
    assert child.process.returncode == 0, child.stderr


def nbdsh(uri: str, script: str) -> str:
    """What a script of libnbd says that refuses nothing by itself."""
    words = ("-c", "h.set_strict_mode(0)", "-c", f"h.connect_uri({uri!r})", "-c", script)
    return run(DEBIAN_PYTHON, "-m", "nbd", *words).stdout


@requires("nbdcopy")
@requires("qemu-img")
def test_every_client_reads_the_disk_as_it_was(cli: Cli, backups: Backups) -> None:
    for at, truth in enumerate(backups.truths, 1):
        with mounted(cli, "--at", at) as served:
            copies = [cli.folder / f"copy{at}", cli.folder / f"converted{at}"]
            run("nbdcopy", served.uri, copies[0])
            run("qemu-img", "convert", "-f", "raw", "-O", "raw", served.uri, copies[1])
        assert [copy.read_bytes() == truth for copy in copies] == [True, True]
    assert at == 2


@requires("nbdinfo")
def test_a_client_is_told_where_there_is_data(cli: Cli, backups: Backups) -> None:
    with mounted(cli) as served:
        told = json.loads(run("nbdinfo", "--map", "--json", served.uri).stdout)
        info = run("nbdinfo", served.uri.replace(f"/{NAME}?", "/?")).stdout
    zero, truth = 3, backups.truths[1]
    assert {part["type"] for part in told} == {0, zero}
    assert sum(part["length"] for part in told) == SIZE
    for part in told:
        data = truth[part["offset"] : part["offset"] + part["length"]]
        assert (part["type"] == zero) == (data.count(0) == len(data)), part
    assert "is_read_only: true" in info


@requires("qemu-io")
@requires("nbdsh")
def test_a_write_is_refused_with_eperm(cli: Cli, backups: Backups) -> None:
    tries = "for call in (lambda: h.pwrite(b'x' * 512, 0), lambda: h.zero(512, 0), lambda: h.trim(512, 0)):\n"
    tries += "    try: call()\n    except nbd.Error as refused: print(refused.errno)\n"
    with mounted(cli) as served:
        said = nbdsh(served.uri, tries)
        assert run("qemu-io", "-f", "raw", "-c", "write 0 512", served.uri, check=False).returncode != 0
    assert said.split() == ["EPERM"] * 3
    assert backups.disk.restored() == backups.truths[1]


@requires("nbdcopy")
def test_many_clients_at_once_read_the_same(cli: Cli, backups: Backups) -> None:
    with mounted(cli) as served, contextlib.ExitStack() as stack:
        copies = [cli.folder / f"copy{number}" for number in range(4)]
        clients = [
            stack.enter_context(spawn("nbdcopy", "--connections=2", served.uri, copy)) for copy in copies
        ]
        assert [client.wait() for client in clients] == [0] * 4
    assert {copy.read_bytes() for copy in copies} == {backups.truths[1]}


def test_nothing_in_the_repository_changes_and_it_needs_no_store(cli: Cli, backups: Backups) -> None:
    before = {path: path.read_bytes() for path in backups.repository.rglob("*") if path.is_file()}
    with mounted(cli, "--store", cli.folder / "none"):
        pass
    assert {path: path.read_bytes() for path in backups.repository.rglob("*") if path.is_file()} == before
    assert not (cli.folder / "none").exists()


@requires("nbdcopy")
def test_a_backup_that_is_made_meanwhile_disturbs_nobody(cli: Cli, backups: Backups) -> None:
    with mounted(cli) as served:
        backups.disk.write(b"later", 0)
        backups.disk.backup()
        run("nbdcopy", served.uri, cli.folder / "copy")
    assert (cli.folder / "copy").read_bytes() == backups.truths[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_end_it(cli: Cli, backups: Backups, number: signal.Signals) -> None:
    with handled(number, signal.SIG_DFL), mounted(cli) as served:
        served.child.process.send_signal(number)
        assert served.child.wait() == 0


def test_a_signal_that_does_not_wake_the_main_thread_ends_it_too(cli: Cli, backups: Backups) -> None:
    with mounted(cli) as served, RawClient.connect(str(cli.folder / "backup.sock")) as client:
        client.receive(GREETING)
        signal_another_thread(served.child, signal.SIGTERM)
        assert served.child.wait() == 0


def test_json_tells_a_program(cli: Cli, backups: Backups) -> None:
    words = ("mount", backups.repository, NAME, "--listen", "127.0.0.1:0", "--json")
    with spawn(*cli.command(*words)) as child:
        told = json.loads(child.wait_for_line("ready").string)
    assert told["ready"] is True
    assert [uri.startswith("nbd://127.0.0.1:") for uri in told["uris"]] == [True]


# --- damage ---


def image(backups: Backups, number: int) -> Path:
    return Path(backups.disk.backup_folder().path_of(backups.disk.manifest().backups[number].file))


def test_that_an_image_cannot_be_proven_as_it_is_read_is_said(cli: Cli, backups: Backups) -> None:
    with mounted(cli) as served:
        pass
    assert served.child.stderr == ""
    lose_digests(backups, 1)
    with mounted(cli) as served:
        pass
    assert f"sda: {image(backups, 1)} has no digests by chunks, and is served unproven" in served.child.stderr
    with mounted(cli, "--verify") as served:
        pass
    assert "served unproven" not in served.child.stderr


def lose_digests(backups: Backups, number: int) -> None:
    chunks = backups.disk.manifest().backups[number].chunks
    assert chunks is not None
    Path(backups.disk.backup_folder().path_of(chunks.file)).unlink()


@requires("nbdsh")
def test_a_wrong_bit_is_an_error_for_the_client_who_reads_its_piece(cli: Cli, backups: Backups) -> None:
    """The image has a chunk of digests for its header and tables, and others for data only."""
    backups.disk.write(random.Random(5).randbytes(4 * MIB), 0)
    backups.disk.backup()
    path = image(backups, 2)
    content = bytearray(path.read_bytes())
    content[2 * MIB + 5] ^= 1
    path.write_bytes(content)
    tries = (
        f"for offset in range(0, {4 * MIB}, 4096):\n    try: h.pread(4096, offset)\n"
        "    except nbd.Error as refused: print(refused.errno)"
    )
    with mounted(cli) as served:
        assert nbdsh(served.uri, tries).split() == ["EIO"] * (MIB // 4096)
    assert f" failed: {path}: bytes {2 * MIB}..{3 * MIB}: expected BLAKE3" in served.child.stderr
    assert "READ of 4096 bytes at " in served.child.stderr


@requires("nbdcopy")
def test_a_chain_of_more_images_than_files_can_be_open_is_served(cli: Cli) -> None:
    _, truth = make_deep_chain(cli.folder / "backups", 1000, size=MIB, written=2)
    with few_open_files(256), mounted(cli) as served:
        run("nbdcopy", served.uri, cli.folder / "copy")
    assert (cli.folder / "copy").read_bytes() == truth


@pytest.mark.parametrize("number", [0, 1])
def test_a_wrong_bit_is_found_before_anybody_is_let_in(cli: Cli, backups: Backups, number: int) -> None:
    content = bytearray(image(backups, number).read_bytes())
    content[-1] ^= 1
    image(backups, number).write_bytes(content)
    said = cli.fails(1, "mount", backups.repository, NAME, "--verify", "--socket", cli.folder / "sock")
    assert "expected BLAKE3" in said
    assert not (cli.folder / "sock").exists()


@requires("nbdsh")
@requires("nbdinfo")
def test_a_table_that_is_damaged_is_an_error_for_the_client_and_never_data(
    cli: Cli, backups: Backups
) -> None:
    """The L2 entry of byte 1 MiB leads out of the file; what lies elsewhere is read as before."""
    path = image(backups, 0)
    content = bytearray(path.read_bytes())
    [l1_offset] = struct.unpack_from(">Q", content, 40)
    [l2_offset] = struct.unpack_from(">Q", content, l1_offset)
    place = (l2_offset & 0x00FFFFFFFFFFFE00) + 8 * (MIB // CLUSTER)
    struct.pack_into(">Q", content, place, 1 << 63 | 1 << 40)
    path.write_bytes(content)
    lose_digests(backups, 0)
    tries = (
        "try: h.pread(512, 1 << 20)\nexcept nbd.Error as refused: print(refused.errno)\n"
        f"print(h.pread(512, {2 * MIB - 700 + 512 * KIB}) is not None)"
    )
    with mounted(cli) as served:
        assert nbdsh(served.uri, tries).split() == ["EIO", "True"]
        assert run("nbdinfo", "--map", served.uri, check=False).returncode != 0
    assert f" failed: {path}: L2 entry of byte {MIB}" in served.child.stderr


@requires("nbdsh")
def test_an_image_that_is_cut_under_it_is_an_error(cli: Cli, backups: Backups) -> None:
    tries = f"try: h.pread(512, {MIB})\nexcept nbd.Error as refused: print(refused.errno)"
    with mounted(cli) as served:
        os.truncate(image(backups, 0), 8192)
        assert nbdsh(served.uri, tries).split() == ["EIO"]
    assert "READ of 512 bytes at 1048576 failed: " in served.child.stderr


# --- what is refused ---


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["sda"], 2, "say where to serve"),
        (["sdx", "--listen", "127.0.0.1:0"], 1, "has no backup of a disk called 'sdx'"),
        (["sda", "--at", "7", "--listen", "127.0.0.1:0"], 1, "has no backup 7"),
        (["sda", "--listen", "0.0.0.0:0"], 2, "every host that reaches 0.0.0.0 could read the disk"),
        (["sda", "--listen", "127.0.0.1:0", "--socket-mode", "0660"], 2, "are for --socket"),
    ],
)
def test_what_cannot_be_mounted_is_told(
    cli: Cli, backups: Backups, words: list[str], code: int, said: str
) -> None:
    assert said in cli.fails(code, "mount", backups.repository, *words)


def test_a_socket_that_another_server_has_is_busy(cli: Cli, backups: Backups) -> None:
    with mounted(cli):
        said = cli("mount", backups.repository, NAME, "--socket", cli.folder / "backup.sock")
    assert said.code == 4
