"""docs/operations.md and contrib/ say the same, and what they say works as far as it can be tried without a host."""

from __future__ import annotations

import inspect
import re
import shlex
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from lmdbitmap.cli.options import Session
from tests.cli.conftest import SIZE, Cli, verb_named
from tests.cli.test_serve import write
from tests.helpers import guest
from tests.helpers.support import requires, run, spawn, wait_for_socket

ROOT = Path(__file__).resolve().parents[2]
CONTRIB = ROOT / "contrib"
OPERATIONS = (ROOT / "docs" / "operations.md").read_text()
SERVICE, SOCKET = CONTRIB / "lmdbitmap@.service", CONTRIB / "lmdbitmap@.socket"
SOCKET_PATH = "/run/lmdbitmap/sda.sock"


def settings(unit: Path) -> dict[str, str]:
    lines = [line for line in unit.read_text().splitlines() if line and line[0] not in "#["]
    pairs = [line.split("=", 1) for line in lines]
    return {name: value.replace("%i", "sda") for name, value in pairs}


def shown(language: str) -> str:
    """What the document shows in this language."""
    (block,) = re.findall(rf"```{language}\n(.*?)```", OPERATIONS, re.DOTALL)
    return str(block)


# --- the units ---


@requires("systemd-analyze")
def test_systemd_understands_the_units(tmp_path: Path) -> None:
    program = tmp_path / "lmdbitmap"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    shutil.copy(SOCKET, tmp_path)
    service = tmp_path / SERVICE.name
    service.write_text(SERVICE.read_text().replace("/usr/local/bin/lmdbitmap", str(program)))
    assert verified(tmp_path) == ""
    service.write_text(service.read_text().replace("ProtectHome", "ProtectHomes"))
    assert "ProtectHomes" in verified(tmp_path)


def verified(folder: Path) -> str:
    """What systemd has to say about our units."""
    names = [SERVICE.name, SOCKET.name]
    done = run("systemd-analyze", "verify", *(f"./{name}" for name in names), cwd=folder, check=False)
    lines = (done.stdout + done.stderr).splitlines()
    return "\n".join(line for line in lines if "lmdbitmap" in line)


def service_command(cli: Cli) -> list[str]:
    """What the service runs, of this tree and with a store of its own."""
    program, *words = shlex.split(settings(SERVICE)["ExecStart"])
    assert program == "/usr/local/bin/lmdbitmap"
    return cli.command(*words)


def test_service_outlives_the_guests_and_ends_before_what_its_image_needs() -> None:
    """systemd ends units in the opposite order of their start."""
    told = settings(SERVICE)
    assert told["Before"] == "libvirt-guests.service"
    assert {"local-fs.target", "remote-fs.target", "network.target"} <= set(told["After"].split())


def test_service_never_gives_up() -> None:
    told = settings(SERVICE)
    assert (told["Restart"], told["StartLimitIntervalSec"]) == ("always", "0")
    assert "RestartPreventExitStatus" not in told


def test_service_runs_a_command_that_is_understood() -> None:
    _, verb, *words = shlex.split(settings(SERVICE)["ExecStart"])
    verb_named(verb).make_context(verb, words, obj=Session("store"))


@requires("systemd-socket-activate")
@requires("nbdinfo")
def test_service_serves_the_socket_that_systemd_passes(cli: Cli) -> None:
    cli.add("sda")
    path = cli.folder / "passed.sock"
    command = ["systemd-socket-activate", "--listen", str(path), *service_command(cli)]
    with spawn(*command) as child:
        wait_for_socket(path, child)
        assert run("nbdinfo", "--size", f"nbd+unix:///sda?socket={path}").stdout.strip() == str(SIZE)
        child.wait_for_line("^ready$")
    assert child.process.returncode == 0


@requires("systemd-analyze")
@requires("strace")
@requires("qemu-io")
def test_service_is_allowed_every_system_call_that_it_makes(cli: Cli) -> None:
    cli.add("sda")
    trace, path = cli.folder / "trace", cli.folder / "sda.sock"
    command = ["strace", "-f", "-qq", "-o", str(trace), *service_command(cli), "--socket", str(path)]
    with spawn(*command) as child:
        child.wait_for_line("^ready$")
        cli.ok("checkpoint", "sda", "monday")
        write(f"nbd+unix:///sda?socket={path}", 0, 1 << 20)
        run("qemu-io", "-f", "raw", "-d", "unmap", "-c", "write -z 0 64k", "-c", "write -zu 1M 64k",
            "-c", "discard 2M 64k", "-c", "read 0 1M", f"nbd+unix:///sda?socket={path}")  # fmt: skip
        cli.ok("info", "sda")
        server = int(cli.json("info", "sda")["served"]["pid"])
        run("kill", str(server))
        assert child.wait() == 0
    lines = trace.read_text().splitlines()
    made = {match[1] for line in lines if (match := re.match(r"\d+ +(\w+)\(", line))}
    assert made >= {"pwrite64", "fallocate", "accept4", "fdatasync"}
    assert settings(SERVICE)["SystemCallFilter"] == "@system-service"
    assert made - allowed("@system-service") == set()
    both = [line for line in lines if "PROT_WRITE" in line and "PROT_EXEC" in line]
    assert both == [], "MemoryDenyWriteExecute= would refuse it"


def allowed(group: str) -> set[str]:
    """The system calls of a group, and of the groups in it."""
    said = run("systemd-analyze", "syscall-filter", group).stdout.splitlines()
    names = [line.strip() for line in said[1:] if line.startswith(" ") and not line.strip().startswith("#")]
    assert names
    return {name for name in names if name[0] != "@"}.union(
        *(allowed(name) for name in names if name[0] == "@")
    )


# --- the guest ---


def test_libvirt_snippet_is_what_the_document_shows_and_leads_to_the_socket() -> None:
    text = (CONTRIB / "libvirt-disk.xml").read_text()
    assert shown("xml") == text
    source = ElementTree.fromstring(text).find("source")
    assert source is not None
    host, reconnect = source.find("host"), source.find("reconnect")
    assert (source.get("protocol"), source.get("name")) == ("nbd", "sda")
    assert host is not None
    assert host.attrib == {"transport": "unix", "socket": settings(SOCKET)["ListenStream"]}
    assert reconnect is not None
    assert int(reconnect.get("delay", "0")) > 0


def test_qemu_options_are_what_the_document_shows_and_what_our_guest_boots_with() -> None:
    text = (CONTRIB / "qemu-disk.args").read_text()
    assert shown("text") == text
    words = shlex.split(text)
    assert words[::2] == ["-blockdev", "-device"]
    documented = dict(option.split("=", 1) for option in words[1].split(","))
    source = inspect.getsource(guest.booted)
    options = "".join(re.findall(r'f"([^"]*)"', source.partition("blockdev = (")[2].partition("\n    )")[0]))
    booted = dict(option.split("=", 1) for option in options.split(","))
    assert len(booted) > 5
    assert documented.keys() == booted.keys()
    theirs = {"server.path", "export", "reconnect-delay"}
    assert {key: documented[key] for key in documented.keys() - theirs} == {
        key: booted[key] for key in booted.keys() - theirs
    }
    assert documented["server.path"] == SOCKET_PATH
    assert f'"{words[3]}"' in source


# --- the document ---


def test_every_metric_is_documented_and_no_other(cli: Cli) -> None:
    cli.add("sda")
    told = set(re.findall(r"^# TYPE (\w+) ", cli.ok("metrics"), re.MULTILINE))
    table = OPERATIONS.partition("| metric |")[2].partition("\n\n")[0]
    assert set(re.findall(r"`(lmdbitmap_\w+)`", table)) == told


def test_what_prometheus_reads_is_not_left_as_it_was_where_a_disk_cannot_be_read(cli: Cli) -> None:
    cli.add("sda")
    (line,) = re.findall(r"^# (lmdbitmap metrics .*)$", OPERATIONS, re.MULTILINE)
    program = shlex.join(cli.command())
    recipe = f'lmdbitmap() {{ {program} "$@"; }}; {line}'
    run("sh", "-c", recipe, cwd=cli.folder)
    read = cli.folder / "lmdbitmap.prom"
    assert 'lmdbitmap_trusted{disk="sda"} 1.0' in read.read_text()
    owners_file = cli.store / "owners" / cli.json("info", "sda")["uuid"]
    owners_file.unlink()
    owners_file.mkdir()
    run("sh", "-c", recipe, cwd=cli.folder, check=False)
    assert 'lmdbitmap_trusted{disk="sda"} 0.0' in read.read_text()
    (cli.store / "lmdb").rename(cli.store / "gone")
    run("sh", "-c", recipe, cwd=cli.folder, check=False)
    assert 'lmdbitmap_trusted{disk="sda"} 0.0' in read.read_text(), "no figures take the place of others"


@pytest.mark.parametrize(
    "line", re.findall(r"(?<![/\w@-])lmdbitmap ((?:serve|metrics|info|ls)\b[^`\n>]*)", OPERATIONS)
)
def test_commands_of_the_document_are_understood(line: str) -> None:
    verb, *words = shlex.split(line.replace("--socket-group kvm", "--socket-group 0"))
    if "…" not in words:
        verb_named(verb).make_context(verb, words, obj=Session("store"))
