"""Our NBD client over TLS, before the servers that people use and before one that lies (tests/helpers/nbd_far.py)."""

from __future__ import annotations

import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from lmdbitmap.nbd.client.device import NbdDevice
from lmdbitmap.nbd.tls import server_context
from tests.cli.conftest import Cli, cli
from tests.helpers.certificates import Certificates
from tests.helpers.far_tls import far, nbdkit, ours, papers, qemu_nbd
from tests.helpers.nbd_far import far_server
from tests.helpers.support import PATIENCE_SECONDS, requires, run, spawn, wait_for_socket
from tests.interop.test_nbd_client import SIZE, content, made, work_while_it_is_killed
from tests.unit.test_nbd_client_device import (
    test_acknowledged_writes_survive_a_server_that_forgot_them,
    test_allocation_is_what_the_server_says,
    test_answers_in_another_order_reach_those_who_asked,
    test_caller_that_is_interrupted_leaves_the_others_alone,
    test_closed_device_says_so,
    test_disconnect_at_every_byte_of_a_reply_is_mended,
    test_disconnect_at_every_byte_of_the_handshake_is_an_error_and_no_hang,
    test_flush_that_dies_with_the_server_still_promises_what_it_should,
    test_lie_costs_the_connection_and_not_the_request,
    test_many_callers_fail_together_when_the_server_stays_away,
    test_many_writes_in_one_call_fail_one_by_one,
    test_replies_may_come_in_any_pieces,
    test_requests_keep_to_the_servers_block_sizes,
    test_server_that_stays_away_fails_requests_and_is_used_again_when_it_is_back,
    test_threads_at_work_do_not_notice_crashes,
    test_what_was_in_flight_is_done_on_the_next_connection,
)

__all__ = [
    "cli",
    "far",
    "papers",
    "test_acknowledged_writes_survive_a_server_that_forgot_them",
    "test_allocation_is_what_the_server_says",
    "test_answers_in_another_order_reach_those_who_asked",
    "test_caller_that_is_interrupted_leaves_the_others_alone",
    "test_closed_device_says_so",
    "test_disconnect_at_every_byte_of_a_reply_is_mended",
    "test_disconnect_at_every_byte_of_the_handshake_is_an_error_and_no_hang",
    "test_flush_that_dies_with_the_server_still_promises_what_it_should",
    "test_lie_costs_the_connection_and_not_the_request",
    "test_many_callers_fail_together_when_the_server_stays_away",
    "test_many_writes_in_one_call_fail_one_by_one",
    "test_replies_may_come_in_any_pieces",
    "test_requests_keep_to_the_servers_block_sizes",
    "test_server_that_stays_away_fails_requests_and_is_used_again_when_it_is_back",
    "test_threads_at_work_do_not_notice_crashes",
    "test_what_was_in_flight_is_done_on_the_next_connection",
]

MIB = 1 << 20

pytestmark = [requires(tool) for tool in ("openssl", "qemu-img", "qemu-nbd", "nbdkit")]


def exercise(device: NbdDevice, size: int) -> bytes:
    """Reads and writes of many threads at once, of a few bytes and of many records; what the disk must hold."""
    part = size // 4
    models = [bytearray(part) for _ in range(4)]

    def work(number: int) -> int:
        chance, base, model = random.Random(number), number * part, models[number]
        for _ in range(30):
            length = chance.choice([1, 4096, 16_384, 16_385, 300_000, MIB])
            offset = chance.randrange(part - length)
            data = chance.randbytes(length)
            device.pwrite(data, base + offset)
            model[offset : offset + length] = data
            assert device.pread(part, base) == model
        return 30

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(4))) == [30] * 4
    device.flush()
    return b"".join(models)


# --- servers that people use ---


def test_qcow2_behind_qemu_nbd_is_read_and_written(tmp_path: Path, papers: Certificates) -> None:
    image = made(tmp_path, "qcow2")
    with qemu_nbd(papers.folder, image, "qcow2") as far:
        with NbdDevice.open(far.uri(papers.folder)) as device:
            model = exercise(device, SIZE)
            device.write_zeroes(MIB, MIB)
            device.flush()
            assert device.pread(3, MIB) == bytes(3)
        far.kill()
    assert content(tmp_path, image, "qcow2") == model[:MIB] + bytes(MIB) + model[2 * MIB :]


def test_nbdkit_is_read_and_written(papers: Certificates) -> None:
    with nbdkit(papers.folder, "memory", str(SIZE)) as far, NbdDevice.open(far.uri(papers.folder)) as device:
        model = exercise(device, SIZE)
        assert device.pread(SIZE, 0) == model


def test_our_own_server_is_read_and_written(tmp_path: Path, papers: Certificates) -> None:
    image = made(tmp_path, "raw")
    with (
        ours(papers.folder, image) as uri,
        NbdDevice.open(f"{uri}?tls-certificates={papers.folder}") as device,
    ):
        model = exercise(device, SIZE)
    assert image.read_bytes() == model


def test_tls_is_spoken_over_a_unix_socket_too(tmp_path: Path, papers: Certificates) -> None:
    tls = ["--tls=require", f"--tls-certificates={papers.folder}", "--tls-verify-peer"]
    with spawn("nbdkit", "--foreground", "--unix", tmp_path / "nbd", *tls, "memory", "1M") as server:
        wait_for_socket(tmp_path / "nbd", server)
        uri = f"nbds+unix:///?socket={tmp_path / 'nbd'}&tls-certificates={papers.folder}"
        with NbdDevice.open(uri) as device:
            device.pwrite(b"over TLS", 5)
            assert device.pread(8, 5) == b"over TLS"


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_threads_at_work_do_not_notice_that_the_server_is_killed(
    tmp_path: Path, papers: Certificates, image_format: str
) -> None:
    image = made(tmp_path, image_format)
    with (
        qemu_nbd(papers.folder, image, image_format) as far,
        NbdDevice.open(far.uri(papers.folder)) as device,
    ):
        model = work_while_it_is_killed(device, far)
        device.flush()
        far.kill()
    assert content(tmp_path, image, image_format) == model


def test_certificates_that_were_renewed_are_used_from_the_next_connection_on(tmp_path: Path) -> None:
    shutil.copytree(Certificates(tmp_path / "old").folder, tmp_path / "present")
    new = Certificates(tmp_path / "new")
    present = tmp_path / "present"
    with nbdkit(present, "memory", "1M") as far, NbdDevice.open(far.uri(present)) as device:
        far.kill()
        shutil.copytree(new.folder, present, dirs_exist_ok=True)
        far.start()
        assert device.pread(4, 0) == bytes(4)


def test_large_reads_and_writes_at_once_do_not_block_each_other(tmp_path: Path, papers: Certificates) -> None:
    """As without TLS: a server of one thread sends nothing while it receives."""
    with far_server(tmp_path, 8 * MIB) as far:
        far.tls = server_context(str(papers.folder))
        uri = f"nbds+unix:///disk?socket={far.path}&tls-certificates={papers.folder}"
        with NbdDevice.open(uri) as device, ThreadPoolExecutor(8) as pool:
            reads = [pool.submit(device.pread, 2 * MIB, 6 * MIB) for _ in range(20)]
            writes = [pool.submit(device.pwrite, b"w" * MIB, number % 6 * MIB) for number in range(20)]
            assert all(read.result(PATIENCE_SECONDS) == bytes(2 * MIB) for read in reads)
            assert all(write.result(PATIENCE_SECONDS) is None for write in writes)
        assert far.data[: 6 * MIB] == b"w" * 6 * MIB
        assert far.handshakes == 1


# --- what is tracked there ---


def test_disk_behind_tls_is_tracked_backed_up_restored_and_copied(
    cli: Cli, tmp_path: Path, papers: Certificates
) -> None:
    source, target, copy = (tmp_path / name for name in ("source.raw", "target.raw", "copy.raw"))
    for image in (source, target, copy):
        image.write_bytes(bytes(SIZE))
    shutil.copytree(papers.folder, tmp_path / "moved")
    with ExitStack() as stack:
        far = [stack.enter_context(nbdkit(papers.folder, "file", image)) for image in (source, target, copy)]
        uri, target_uri, copy_uri = (one.uri(papers.folder) for one in far)
        cli.ok("add", "sda", uri)
        assert "is tracked already" in cli.fails(1, "add", "sdb", far[0].uri(tmp_path / "moved"))
        cli.ok("backup", "sda", tmp_path / "backups")
        cli.ok("sync", "sda", copy_uri)
        with cli.serving("sda") as served:
            run("qemu-io", "-f", "raw", "-c", "write -P 7 1M 100k", served.uris["sda"])
            [backup] = cli.json("backup", "sda", tmp_path / "backups")["backups"]
            assert (backup["type"], backup["bytes_changed"]) == ("incremental", 2 * 65536)
        synced = cli.json("sync", "sda", far[2].uri(tmp_path / "moved"), "--require-incremental")
        assert synced["bytes_changed"] == 2 * 65536
        cli.ok("restore", tmp_path / "backups", "sda", target_uri)
    assert source.read_bytes()[MIB : MIB + 102_400] == b"\7" * 102_400
    assert source.read_bytes() == target.read_bytes() == copy.read_bytes()
