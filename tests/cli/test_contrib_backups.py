"""Nightly backups by the units in contrib/, and its hook for the guest agent, tried without a host."""

from __future__ import annotations

import json
import re
import shlex
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from lmdbitmap.cli.options import Session
from tests.cli.conftest import MIB, Cli, verb_named
from tests.cli.test_operations import CONTRIB, OPERATIONS, allowed, settings
from tests.cli.test_serve import write
from tests.helpers.support import requires, run

SERVICE, TIMER = CONTRIB / "lmdbitmap-backup@.service", CONTRIB / "lmdbitmap-backup@.timer"
HOOK = CONTRIB / "guest-hook.py"

# --- the units ---


def commands(unit: Path = SERVICE, **variables: str) -> list[list[str]]:
    """What the service runs for disk `sda`, as systemd.service(5) says that words and variables are read."""
    text = unit.read_text()
    known = dict(re.findall(r'^Environment="?(\w+)=(.*?)"?$', text, re.MULTILINE)) | variables
    found = []
    for line in re.findall(r"^ExecStart=(.*)$", text, re.MULTILINE):
        words = []
        for word in line.replace("%i", "sda").split():
            if named := re.fullmatch(r"\$\{(\w+)\}", word):
                words.append(known[named[1]])
            elif word.startswith("$"):
                words += shlex.split(known[word[1:]])
            else:
                words.append(word)
        found.append(words)
    return found


@requires("systemd-analyze")
def test_systemd_understands_the_units(tmp_path: Path) -> None:
    program = tmp_path / "lmdbitmap"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    for unit in CONTRIB.glob("lmdbitmap*@.*"):
        (tmp_path / unit.name).write_text(unit.read_text().replace("/usr/local/bin/lmdbitmap", str(program)))
    names = ["./lmdbitmap-backup@sda.service", "./lmdbitmap-backup@sda.timer"]

    def complaints() -> list[str]:
        done = run("systemd-analyze", "verify", *names, cwd=tmp_path, check=False)
        return [line for line in (done.stdout + done.stderr).splitlines() if "lmdbitmap" in line]

    assert complaints() == []
    service = tmp_path / SERVICE.name
    service.write_text(service.read_text().replace("IOWeight", "IOWeigth"))
    assert "IOWeigth" in complaints()[0]
    [calendar] = re.findall(r"^OnCalendar=(.*)$", TIMER.read_text(), re.MULTILINE)
    assert "Next elapse" in run("systemd-analyze", "calendar", calendar).stdout


def test_service_runs_commands_that_are_understood() -> None:
    [setting] = re.findall(r'^BACKUP_OPTIONS="(.*)"$', OPERATIONS, re.MULTILINE)
    for variables in ({}, {"BACKUP_OPTIONS": setting}):
        backup, prune = commands(**variables)
        assert backup[1:4] == ["backup", "sda", "/var/backups/lmdbitmap"]
        assert prune[1:4] == ["prune", "/var/backups/lmdbitmap", "sda"]
        for _, verb, *words in (backup, prune):
            made = verb_named(verb).make_context(verb, list(words), obj=Session("store"))
            if verb == "backup" and variables:
                assert made.params["hook"] == "/usr/local/lib/lmdbitmap/guest-hook.py --domain vm1"


def test_service_that_is_stopped_leaves_the_hook_alone() -> None:
    """It may be thawing the guest just now; the backup gets the signal, and waits for it."""
    assert settings(SERVICE)["KillMode"] == "mixed"


@requires("strace")
@requires("systemd-analyze")
@requires("qemu-io")
def test_service_backs_up_a_served_disk_and_prunes_with_the_system_calls_that_it_is_allowed(cli: Cli) -> None:
    repository, trace = cli.folder / "backups", cli.folder / "trace"
    cli.add("sda")
    with cli.serving("sda") as served:
        for number in range(3):
            write(served.uris["sda"], number * MIB, 65536)
            for _, *words in commands(REPOSITORY=str(repository), KEEP="--keep 2"):
                run("strace", "-f", "-qq", "-A", "-o", trace, *cli.command(*words), "--json")
    assert [entry["backup"] for entry in cli.json("ls", repository)["disks"][0]["backups"]] == ["2", "3"]
    lines = trace.read_text().splitlines()
    made = {match[1] for line in lines if (match := re.match(r"\d+ +(\w+)\(", line))}
    assert made >= {"pwrite64", "fsync", "flock"}
    assert "SystemCallFilter=@system-service\n" in SERVICE.read_text()
    assert made - allowed("@system-service") == set()


def test_document_names_all_files() -> None:
    for unit in (SERVICE, TIMER, HOOK):
        assert f"contrib/{unit.name}" in OPERATIONS, unit.name


# --- the hook, through libvirt ---


def hook(*words: object, thaw_s: float = 5.0, **environment: str) -> subprocess.CompletedProcess[str]:
    """With a `virsh` that may be another one, and no patience; all of `thaw_s` passes if a thaw never succeeds."""
    code = f"import runpy, sys; sys.argv = {['hook', *map(str, words)]!r};"
    code += f"hook = runpy.run_path({str(HOOK)!r});"
    code += f"hook['main'].__globals__.update(THAW_S={thaw_s}, BETWEEN_THAWS_S=0.01);"
    code += "hook['main'].__globals__.update(AGENT_S=5.0); sys.exit(hook['main']())"
    path = "/usr/sbin:/usr/bin:/sbin:/bin"
    return run(
        sys.executable, "-c", code, env={"PATH": path, **environment}, check=False,
    )  # fmt: skip


@requires("virsh")
def test_hook_freezes_and_thaws_a_domain_of_libvirts() -> None:
    where: dict[str, Any] = {"LIBVIRT_DEFAULT_URI": "test:///default"}
    assert hook("--domain", "test", "freeze", "sda", **where).returncode == 0
    assert hook("--domain", "test", "thaw", "sda", **where).returncode == 0
    done = hook("--domain", "nix", "freeze", "sda", **where)
    assert (done.returncode, "failed to get domain 'nix'" in done.stderr) == (1, True)
    assert hook("freeze", "sda").returncode == 2


@pytest.fixture
def virsh(tmp_path: Path) -> Path:
    """A folder with one that notes what it is asked, and fails at what stands in a file, as often as it says."""
    program = tmp_path / "virsh"
    program.write_text(
        f"""#!/bin/sh
echo "$2 $4" >> '{tmp_path}/asked'
[ "$2" = domstate ] && {{ cat "{tmp_path}/$4.state" 2>/dev/null || echo running; exit 0; }}
left=$(cat "{tmp_path}/$2.$4.fails" 2>/dev/null || echo 0)
[ "$left" = 0 ] && exit 0
echo $((left - 1)) > "{tmp_path}/$2.$4.fails"
echo "error: Guest agent is not responding" >&2
exit 1
"""
    )
    program.chmod(0o755)
    return tmp_path


def told(virsh: Path, *words: str, thaw_s: float = 5.0) -> tuple[int, list[str], str]:
    asked = virsh / "asked"
    asked.unlink(missing_ok=True)
    done = hook(*words, thaw_s=thaw_s, PATH=f"{virsh}:/usr/bin:/bin")
    lines = asked.read_text().splitlines() if asked.exists() else []
    return done.returncode, [line for line in lines if not line.startswith("domstate")], done.stderr


def test_hook_freezes_each_guest_once_and_stops_at_one_that_does_not(virsh: Path) -> None:
    both = ("--domain", "a", "--domain", "b")
    assert told(virsh, *both, "freeze", "sda", "sdb") == (0, ["domfsfreeze a", "domfsfreeze b"], "")
    (virsh / "domfsfreeze.a.fails").write_text("1")
    said = "virsh domfsfreeze a: error: Guest agent is not responding\n"
    assert told(virsh, *both, "freeze", "sda") == (1, ["domfsfreeze a"], said)


def test_hook_thaws_again_until_all_are_thawed_or_it_is_too_late(virsh: Path) -> None:
    (virsh / "domfsthaw.a.fails").write_text("2")
    code, asked, said = told(virsh, "--domain", "a", "--domain", "b", "thaw", "sda")
    assert (code, said, len(asked)) == (0, "", 4)
    assert {"domfsthaw a", "domfsthaw b"} == set(asked)
    (virsh / "domfsthaw.a.fails").write_text("99999")
    code, asked, said = told(virsh, "--domain", "a", "thaw", "sda", thaw_s=2.0)
    assert (code, said) == (1, "virsh domfsthaw a: error: Guest agent is not responding\n")
    assert len(asked) >= 2


NONSENSE = [b"[]\n", b"5\n", b'"return"\n', b'{"error": 5}\n', b"[" * 60000 + b"\n", b"x" * 99999]
"""What the agent of a guest that is anybody's may say."""


def test_hook_thaws_a_guest_beside_those_whose_agents_say_anything(tmp_path: Path) -> None:
    """All at once, as each of them costs the time that the hook tries again."""
    bad = [tmp_path / f"bad-{number}" for number in range(len(NONSENSE))]
    with ExitStack() as stack:
        for path, says in zip(bad, NONSENSE, strict=True):
            stack.enter_context(agent(path, refuses="guest-fsfreeze-thaw", refusal=says, visits=99))
        asked = stack.enter_context(agent(tmp_path / "good"))
        agents = [word for path in (*bad, tmp_path / "good") for word in ("--agent", path)]
        done = hook(*agents, "thaw", "sda", "sdb")
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    problems = done.stderr.split("; ")
    assert len(problems) == len(NONSENSE)
    for path, problem in zip(bad, problems, strict=True):
        assert problem.startswith(f"guest-fsfreeze-thaw at {path}: ")
    assert asked == ["guest-sync-delimited", "guest-fsfreeze-thaw"]


def test_hook_says_that_there_is_no_virsh(tmp_path: Path) -> None:
    for deed in ("freeze", "thaw"):
        done = hook("--domain", "a", deed, "sda", thaw_s=1.0, PATH=str(tmp_path))
        said = "virsh domstate a: [Errno 2] No such file or directory: 'virsh'\n"
        assert (done.returncode, done.stderr) == (1, said)


def test_hook_leaves_a_domain_alone_that_is_shut_off(virsh: Path) -> None:
    (virsh / "a.state").write_text("shut off\n")
    for deed in ("freeze", "thaw"):
        assert told(virsh, "--domain", "a", deed, "sda") == (0, [], "")


def test_a_backup_freezes_and_thaws_by_it(cli: Cli, virsh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cli.add("sda")
    monkeypatch.setenv("PATH", f"{virsh}:/usr/bin:/bin")
    with cli.serving("sda"):
        cli.ok("backup", "sda", cli.folder / "backups", "--hook", f"{HOOK} --domain vm1")
    asked = (virsh / "asked").read_text().splitlines()
    assert asked == ["domstate vm1", "domfsfreeze vm1", "domstate vm1", "domfsthaw vm1"]


# --- the hook, through an agent's socket ---


REFUSAL = b'{"error": {"class": "GenericError", "desc": "no such disk"}}\n'


@contextmanager
def agent(
    path: Path, before: bytes = b"", refuses: str | None = None, refusal: bytes = REFUSAL, visits: int = 1
) -> Iterator[list[str]]:
    """One as QEMU's: it has half an answer for somebody else yet, and does what it is told."""
    asked: list[str] = []

    def serve(listening: socket.socket) -> None:
        for _ in range(visits):
            try:
                sock, _ = listening.accept()
            except OSError:  # closed
                return
            with suppress(OSError):
                serve_one(sock)

    def serve_one(sock: socket.socket) -> None:
        with sock, sock.makefile("rwb") as line:
            line.write(before)
            for words in line:
                request = json.loads(words.lstrip(b"\xff"))
                asked.append(request["execute"])
                if request["execute"] == "guest-sync-delimited":
                    line.write(b"\xff" + json.dumps({"return": request["arguments"]["id"]}).encode() + b"\n")
                elif request["execute"] == refuses:
                    line.write(refusal)
                else:
                    line.write(b'{"return": 2}\n')
                line.flush()

    with closing(socket.socket(socket.AF_UNIX)) as listening:
        listening.bind(str(path))
        listening.listen()
        thread = threading.Thread(target=serve, args=[listening])
        thread.start()
        yield asked
        listening.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.mark.parametrize("before", [b"", b'{"return": 17}\n{"ret'])
def test_hook_tells_an_agent_and_takes_no_others_answer_for_its_own(tmp_path: Path, before: bytes) -> None:
    for deed in ("freeze", "thaw"):
        with agent(tmp_path / deed, before) as asked:
            done = hook("--agent", tmp_path / deed, deed, "sda")
        assert (done.returncode, done.stderr) == (0, "")
        assert asked == ["guest-sync-delimited", f"guest-fsfreeze-{deed}"]


def test_hook_says_what_an_agent_refuses(tmp_path: Path) -> None:
    with agent(tmp_path / "qga", refuses="guest-fsfreeze-freeze"):
        done = hook("--agent", tmp_path / "qga", "freeze", "sda")
    assert (done.returncode, done.stderr) == (
        1,
        f"guest-fsfreeze-freeze at {tmp_path}/qga: no such disk\n",
    )
    done = hook("--agent", tmp_path / "none", "thaw", "sda", thaw_s=1.0)
    assert (done.returncode, "No such file or directory" in done.stderr) == (1, True)
