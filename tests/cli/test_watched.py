"""Watching a server from outside: `info`, `metrics`, the log, and who may connect."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import stat
import subprocess
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from lmdbitmap import Filter, FormatError, Store
from lmdbitmap.access import operations
from lmdbitmap.access.questions import Owners
from lmdbitmap.cli.metrics import metrics_served
from lmdbitmap.nbd.control.control import ControlServer
from lmdbitmap.nbd.control_client import Client
from lmdbitmap.storage.schema import Disk
from lmdbitmap.tracker.chain import disk_called
from tests.cli.conftest import MIB, SIZE, Cli
from tests.cli.test_serve import write
from tests.helpers.nbd_raw import DISC, FLUSH, READ, WRITE, RawClient, request
from tests.helpers.support import PATIENCE_SECONDS, Child, requires, spawn

KIB = 1 << 10
Samples = dict[tuple[str, ...], float]


@contextlib.contextmanager
def client_of(cli: Cli, name: str) -> Iterator[RawClient]:
    with RawClient.connect(str(cli.folder / "sda.sock")) as client:
        client.go(name)
        yield client


def leave(client: RawClient) -> None:
    client.send(request(DISC))
    assert client.is_closed_by_server()


def use(cli: Cli) -> None:
    """Three writes to one extent, of which the first arms it, a read and a flush; counted on return."""
    with client_of(cli, "sda") as client:
        for block in range(3):
            assert client.do(WRITE, block * 64 * KIB, 4096, data=bytes(4096)).error == 0
        client.do(READ, 0, 512)
        client.do(FLUSH)
        leave(client)


# --- info ---


def test_info_tells_what_clients_do(cli: Cli) -> None:
    cli.add("sda")
    cli.ok("checkpoint", "sda", "monday")
    with cli.serving("sda") as served:
        use(cli)
        with client_of(cli, "sda"):
            told = cli.json("info", "sda")["served"]
            words = cli.ok("info", "sda")
    assert told["pid"] == served.child.pid
    assert told["connections"] == {"now": 1, "ever": 2}
    assert told["requests"] == {
        "reads": 1, "writes": 3, "zeroes": 0, "flushes": 1, "block_status": 0, "other": 0,
    }  # fmt: skip
    assert told["bytes"] == {"received": 5 * 28 + 28 + 3 * 4096, "sent": 4 * 16 + 28 + 512}
    latencies = told["latencies"]
    assert latencies["commit"]["count"] >= 2  # the session's, the arming one
    assert latencies["flush"]["count"] == 1
    assert latencies["batch"]["count"] >= 1
    for kind in ("commit", "flush", "batch"):
        found = latencies[kind]
        assert 0 < found["p50_ns"] <= found["p99_ns"] <= found["max_ns"] <= found["total_ns"]
    assert f"served by   process {served.child.pid}, lmdbitmap" in words
    assert "clients     1 now, 2 ever" in words
    assert "requests    1 reads, 3 writes, 1 flushes" in words
    assert "flushes     1: half of them within" in words


def test_info_of_a_disk_that_nobody_serves_has_no_server(cli: Cli) -> None:
    cli.add("sda")
    assert cli.json("info", "sda")["served"] is None
    assert "served by" not in cli.ok("info", "sda")
    with Store.open(str(cli.store)) as store, Filter.attach(store, "sda", background=False) as attached:
        assert cli.json("info", "sda")["served"] is None
        with ControlServer({"sda": attached}):  # an agent that embeds the library, and serves in its own way
            assert cli.json("info", "sda")["served"] is None


def test_disks_of_one_process_are_told_apart(cli: Cli) -> None:
    cli.add("sda")
    cli.add("sdb")
    with cli.serving("sda", "sdb"):
        use(cli)
        assert cli.json("info", "sda")["served"]["connections"]["ever"] == 1
        told = cli.json("info", "sdb")["served"]
    assert told["connections"] == {"now": 0, "ever": 0}
    assert set(told["requests"].values()) == {0}


# --- metrics ---


def samples(text: str) -> Samples:
    """What a Prometheus would take in: value by name and labels."""
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation, family.name
        for sample in family.samples:
            assert sample.name.startswith("lmdbitmap_")
            labels = tuple(value for _, value in sorted(sample.labels.items()))
            key = (sample.name, *labels)
            found[key] = sample.value
    return found


def test_metrics_are_of_all_disks_served_or_not(cli: Cli) -> None:
    cli.add("sda")
    cli.add("sdb", 3 * MIB)
    cli.ok("checkpoint", "sda,sdb", "monday")
    with cli.serving("sda"):
        use(cli)
        told = samples(cli.ok("metrics"))
        assert {key[1] for key in samples(cli.ok("metrics", "sdb", "sdb"))} == {"sdb"}
        info = cli.json("info", "sda")
    assert told["lmdbitmap_disk_size_bytes", "sda"] == SIZE
    assert told["lmdbitmap_disk_size_bytes", "sdb"] == 3 * MIB
    assert [told["lmdbitmap_served", name] for name in ("sda", "sdb")] == [1, 0]
    assert [told["lmdbitmap_trusted", name] for name in ("sda", "sdb")] == [1, 1]
    assert told["lmdbitmap_dirty_bytes", "sdb"] == 0
    assert told["lmdbitmap_dirty_bytes", "sda"] >= info["dirty_bytes"] == 3 * 64 * KIB
    assert told["lmdbitmap_checkpoints", "sda"] == 2
    assert told["lmdbitmap_requests_total", "sda", "writes"] == 3
    assert told["lmdbitmap_connections_total", "sda"] == 1
    assert told["lmdbitmap_received_bytes_total", "sda"] == 5 * 28 + 28 + 3 * 4096
    assert ("lmdbitmap_requests_total", "sdb", "writes") not in told
    assert told["lmdbitmap_flush_seconds_count", "sda"] == 1


def test_histograms_are_cumulative_and_in_seconds(cli: Cli) -> None:
    cli.add("sda")
    with cli.serving("sda"):
        use(cli)
        told = samples(cli.ok("metrics", "sda"))
        facts = cli.json("info", "sda")["served"]["latencies"]["flush"]
    # labels are sorted by their names: disk, le
    buckets = sorted(
        (float(key[2]), value) for key, value in told.items() if key[0] == "lmdbitmap_flush_seconds_bucket"
    )
    counts = [count for _, count in buckets]
    assert counts == sorted(counts)
    assert (float("inf"), 1.0) in buckets
    assert told["lmdbitmap_flush_seconds_sum", "sda"] == pytest.approx(facts["total_ns"] / 1e9)
    first = next(bound for bound, count in buckets if count)
    assert first / 2 <= facts["max_ns"] / 1e9 <= first


def test_asking_for_metrics_disturbs_nobody(cli: Cli) -> None:
    """`info` has the owner write its bits down, after which writers arm anew; a scrape must not."""
    cli.add("sda")
    cli.ok("checkpoint", "sda", "monday")
    with (
        Store.open(str(cli.store)) as store,
        Filter.attach(store, "sda", background=False) as attached,
        ControlServer({"sda": attached}),
    ):
        attached.pwrite(b"x", 0)
        assert samples(cli.ok("metrics"))["lmdbitmap_dirty_bytes", "sda"] == 4 * MIB
        assert attached.armed_count == 1


def test_metrics_of_lost_track_say_so(cli: Cli) -> None:
    image = cli.add("sda")
    os.utime(image, ns=(1, 1))
    told = samples(cli.ok("metrics"))
    assert told["lmdbitmap_trusted", "sda"] == 0
    assert "has no" not in cli.fails(1, "metrics", "sdz")


def test_metrics_for_programs_are_json(cli: Cli) -> None:
    cli.add("sda")
    (told,) = cli.json("metrics")["disks"]
    assert (told["name"], told["served"], told["dirty_bytes"]) == ("sda", None, SIZE)
    info = cli.json("info", "sda")
    assert told["epoch"] == info["epoch"]
    assert told["last_checkpoint"] == info["checkpoints"][-1]["time"]


def scrape(url: str) -> Samples:
    with urllib.request.urlopen(url, timeout=PATIENCE_SECONDS) as page:
        assert page.headers["Content-Type"].startswith("text/plain")
        return samples(page.read().decode())


def test_server_answers_prometheus_itself(cli: Cli) -> None:
    cli.add("sda")
    cli.add("sdb")
    with cli.serving("sda", "--metrics=127.0.0.1:0") as served:
        url = served.child.wait_for_line(r"^metrics (http://127\.0\.0\.1:\d+/metrics)$")[1]
        use(cli)
        told = scrape(url)
        assert told["lmdbitmap_requests_total", "sda", "writes"] == 3
        assert ("lmdbitmap_served", "sdb") not in told  # only what it serves
        assert scrape(url)["lmdbitmap_served", "sda"] == 1


def test_guest_is_served_where_the_port_for_metrics_is_in_use(cli: Cli) -> None:
    """As after a restart: it waits for its disk, and not for Prometheus."""
    cli.add("sda")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with cli.serving("sda", f"--metrics=127.0.0.1:{port}", log=True) as served:
            use(cli)
            assert cli.json("info", "sda")["served"]["requests"]["writes"] == 3
    assert f"127.0.0.1:{port} is in use; choose another port" in served.child.stderr
    assert "metrics http" not in served.child.stdout


def test_a_disk_that_cannot_be_looked_up_costs_a_scrape_no_other(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor the door: what a collector raises ends the scrape."""

    def looked_up(store: Store, name: str) -> Disk:
        if name == "sda":
            raise FormatError("store", expected="a disk", found="damage", next_step="run check")
        return disk_called(store, name)

    monkeypatch.setattr("lmdbitmap.cli.metrics.disk_called", looked_up)
    cli.add("sdb")
    with (
        Store.open(str(cli.store)) as store,
        metrics_served(store, ["sda", "gone", "sdb"], "127.0.0.1", 0) as url,
    ):
        assert url is not None
        told = scrape(url)
    assert {key[1] for key in told} == {"sdb"}


def test_scrapers_that_say_nothing_cost_no_more_than_a_few_threads(cli: Cli) -> None:
    cli.add("sda")
    with cli.serving("sda", "--metrics=127.0.0.1:0") as served, contextlib.ExitStack() as silent:
        url = served.child.wait_for_line(r"^metrics (http://127\.0\.0\.1:(\d+)/metrics)$")
        for _ in range(4):
            silent.enter_context(socket.create_connection(("127.0.0.1", int(url[2]))))
        with socket.create_connection(("127.0.0.1", int(url[2])), PATIENCE_SECONDS) as late:
            assert late.recv(1) == b""  # all places are taken, until those who dawdle are dropped
        use(cli)
        served.child.process.terminate()
        assert served.child.wait() == 0


def test_metrics_are_for_this_host_only_unless_that_is_wanted(cli: Cli) -> None:
    cli.add("sda")
    said = cli.fails(2, "serve", "sda", "--socket", cli.folder / "s", "--metrics", "0.0.0.0:0")
    assert said == (
        "every host that reaches 0.0.0.0 could read the disks' names and figures;"
        " use 127.0.0.1, or say --insecure-metrics"
    )


@pytest.mark.parametrize("flag", ["--insecure-metrics", "--insecure"])
def test_metrics_may_be_for_other_hosts_where_that_is_said(cli: Cli, flag: str) -> None:
    """Only asked for, not connected to: servers in tests keep to this host."""
    cli.add("sda")
    at = ["--socket", cli.folder / "s", "--metrics", "no such host.:0"]
    assert "is no address" in cli.fails(2, "serve", "sda", *at, flag)


# --- the log ---


def lines_of(child: Child) -> list[dict[str, Any]]:
    return [json.loads(line) for line in child.stderr.splitlines()]


@pytest.mark.parametrize("chosen", ["option", "environment"])
def test_log_for_programs_tells_who_came_and_what_happened(cli: Cli, chosen: str) -> None:
    image = cli.add("sda")
    os.utime(image, ns=(1, 1))
    words = ["--log", "json"] if chosen == "option" else []
    command = cli.command("serve", "sda", "--socket", cli.folder / "sda.sock", *words)
    with spawn(*command, env={} if words else {"LMDBITMAP_LOG": "json"}) as child:
        child.wait_for_line("^ready$")
        use(cli)
        cli.ok("checkpoint", "sda", "monday")
    lines = lines_of(child)
    assert all(line.keys() >= {"time", "level", "logger", "message"} for line in lines)
    epoch, came, gone, point = lines
    assert (epoch["level"], epoch["disk"]) == ("warning", "sda")
    client = f"process {os.getpid()} of user {os.getuid()}"
    assert (came["level"], came["disk"], came["client"]) == ("info", "sda", client)
    assert gone["message"].endswith("is gone: 1 reads, 3 writes, 1 flushes; 12456 bytes in, 604 out")
    assert point["message"] == "disk sda: checkpoint monday is made"


def test_log_for_people_tells_it_when_asked(cli: Cli) -> None:
    cli.add("sda")
    with cli.serving("sda", "--verbose", log=True) as served:
        use(cli)
    came, gone = served.child.stderr.splitlines()
    assert came.startswith("lmdbitmap: disk sda: process ")
    assert "is gone: 1 reads, 3 writes" in gone


def test_a_log_that_nobody_reads_keeps_nobody_from_the_disk(cli: Cli) -> None:
    """As in `serve … 2>&1 | less`."""
    cli.add("sda")
    command = cli.command("serve", "sda", "--socket", cli.folder / "sda.sock", "--log", "json")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as server:
        assert server.stdout is not None
        assert server.stderr is not None
        fcntl.fcntl(server.stderr, fcntl.F_SETPIPE_SZ, 4096)
        assert server.stdout.readline() == b"ready\n"
        for _ in range(30):
            use(cli)
        cli.ok("checkpoint", "sda", "monday")
        server.terminate()
        assert server.wait(PATIENCE_SECONDS) == 0
        assert 0 < server.stderr.read().count(b"\n") < 30
    assert cli.json("info", "sda")["attached"] is False


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["nobody", "--socket", "s"], 1, "no disk is called 'nobody'"),
        (
            ["sda", "--listen", "0.0.0.0:0"],
            2,
            "every host that reaches 0.0.0.0 could read and write the disks",
        ),
        (["sda", "--scratch-limit", "x"], 2, "Invalid value for '--scratch-limit': 'x' is not a size"),
    ],
)
def test_failure_is_an_object_too(cli: Cli, words: list[str], code: int, said: str) -> None:
    cli.add("sda")
    with spawn(*cli.command("serve", *words, "--log", "json"), cwd=cli.folder) as child:
        assert child.wait() == code
    (line,) = lines_of(child)
    assert (line["level"], line["message"].split(";")[0]) == ("error", said)


def test_each_process_is_asked_once_however_many_disks_it_serves(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def counted(client: Client, operation: str, **how: Any) -> dict[str, Any]:
        asked.append((operation, client.pid))
        return call(client, operation, **how)

    call = Client.call
    monkeypatch.setattr(Client, "call", counted)
    for name in ("sda", "sdb", "sdc"):
        cli.add(name)
    with cli.serving("sda", "sdb") as served, cli.serving("sdc") as other:
        told = samples(cli.ok("metrics"))
        pids = [served.child.pid, other.child.pid]
    assert asked == [("info", pid) for pid in pids]
    assert all(("lmdbitmap_connected_clients", name) in told for name in ("sda", "sdb", "sdc"))


def test_a_disk_that_is_removed_while_it_is_looked_at_is_left_out(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli.add("sda")
    cli.add("sdb")

    def removed_first(owners: Owners, disk: Disk) -> None:
        if disk.name == "sda":
            operations.remove(owners.store, "sda")

    monkeypatch.setattr(Owners, "ask", removed_first)
    told = samples(cli.ok("metrics"))
    assert [("lmdbitmap_last_checkpoint_timestamp_seconds", name) in told for name in ("sda", "sdb")] == [
        False,
        True,
    ]


# --- who may connect ---


@requires("qemu-io")
def test_socket_can_be_opened_to_a_group(cli: Cli) -> None:
    cli.add("sda")
    group = os.getgroups()[0] if os.getgroups() else os.getgid()
    with cli.serving("sda", "--socket-mode=0660", f"--socket-group={group}") as served:
        status = (cli.folder / "sda.sock").stat()
        assert (stat.S_IMODE(status.st_mode), status.st_gid) == (0o660, group)
        write(served.uris["sda"], 0, 1)


def test_socket_can_be_closed_to_all_but_root(cli: Cli) -> None:
    cli.add("sda")
    with cli.serving("sda", "--socket-mode=0"):
        assert stat.S_IMODE((cli.folder / "sda.sock").stat().st_mode) == 0


def test_mode_and_group_are_of_a_socket(cli: Cli) -> None:
    cli.add("sda")
    said = cli.fails(2, "serve", "sda", "--listen=127.0.0.1:0", "--socket-mode=0660")
    assert "--socket-mode and --socket-group are for --socket" in said


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--socket-mode=0666", "0666 would let every user of this host write the disks"),
        ("--socket-mode=rw", "'rw' is no octal mode; write it as in 0660"),
        ("--socket-mode=4600", "'4600' has more than permission bits"),
        ("--socket-mode=-1", "'-1' has more than permission bits"),
        ("--socket-group=no-such-group", "there is no group 'no-such-group'"),
        ("--socket-group=4294967295", "there is no group '4294967295'"),
        ("--socket-group=" + "9" * 5000, "there is no group '999"),
    ],
)
def test_modes_and_groups_that_cannot_be_are_refused(cli: Cli, option: str, said: str) -> None:
    cli.add("sda")
    assert said in cli.fails(2, "serve", "sda", "--socket", cli.folder / "s", option)


@pytest.mark.parametrize("replaced", [False, True])
def test_an_image_that_is_lost_under_its_server_is_told_wherever_somebody_looks(
    cli: Cli, replaced: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """While there is time: what the guest wrote ends with the server."""
    image = cli.add("sda")
    step = "do not stop the process that serves it before you have a backup"
    with cli.serving("sda", log=True) as served:
        cli.ok("backup", "sda", cli.folder / "backups")
        assert cli.json("info", "sda")["served"]["image_lost"] is None
        image.unlink()
        if replaced:
            image.write_bytes(bytes(SIZE))
        write(served.uris["sda"], 65536, 100)
        assert step in " ".join(cli.ok("info", "sda").split())
        assert str(image) in cli.json("info", "sda")["served"]["image_lost"]
        assert 'lmdbitmap_image_lost{disk="sda"} 1.0' in cli.ok("metrics", "sda")
        assert "incremental" in cli.ok("backup", "sda", cli.folder / "backups")
        assert step in caplog.text
        assert step in cli("check").out
    cli.ok("restore", cli.folder / "backups", "sda", cli.folder / "new.raw")
    assert (cli.folder / "new.raw").read_bytes()[65536:][:100] == bytes([0xA5]) * 100
