"""The libvirt snippet of contrib/, as libvirt reads it, and a guest that libvirt starts on our export with it.

libvirt's usual door to QEMU is a daemon of the whole system. `virt-qemu-run` is the same driver in a process of its
own, with all that it writes in one folder. As root it would look for accounts that a package makes: it runs as nobody.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.helpers.newer import NEWER, newer, requires_newer
from tests.helpers.serving import serving
from tests.helpers.support import Argument, requires, run, spawn, tool_version
from tests.helpers.tracked import NAME, TrackedDisk, quick_folder

SNIPPET = (Path(__file__).parents[2] / "contrib" / "libvirt-disk.xml").read_text()
RECONNECT = "    <reconnect delay='60'/>\n"
SOCKET = "/run/lmdbitmap/sda.sock"
DOMAIN = """<domain type='{kind}'>
  <name>guest</name>
  <memory unit='MiB'>64</memory>
  <os><type arch='x86_64'>hvm</type></os>
  <devices>{disk}</devices>
</domain>
"""
DRIVERS = next(NEWER.glob("usr/lib/*/libvirt/connection-driver"), NEWER)
NOBODY = 65534
AS_NOBODY = [
    "setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups",
    "--inh-caps=+dac_override", "--ambient-caps=+dac_override", "--securebits=+no_setuid_fixup",
]  # fmt: skip
"""Who may go through all folders, so that the programs may lie anywhere; access(2) says so too by the last word."""

AS_ONE = ["sh", "-c", 'exec "$@" 2>&1', "sh"]
"""For a command that says all on standard error."""


def domain(folder: Path, disk: str, kind: str = "qemu") -> Path:
    path = folder / "guest.xml"
    path.write_text(DOMAIN.format(kind=kind, disk=disk))
    return path


def defined(path: Path) -> tuple[int, str]:
    """What libvirt's driver for tests makes of it, once it has compared it with the schema."""
    done = run(
        "virsh", "-q", "-c", "test:///default", f"define --validate {path}; dumpxml guest", check=False
    )
    return done.returncode, done.stdout + done.stderr


@requires("virsh")
def test_every_libvirt_takes_the_snippet_without_reconnect(tmp_path: Path) -> None:
    assert RECONNECT in SNIPPET
    code, said = defined(domain(tmp_path, SNIPPET.replace(RECONNECT, ""), "test"))
    assert code == 0, said
    assert "error_policy='stop' rerror_policy='stop' discard='unmap'" in said
    assert f"<host transport='unix' socket='{SOCKET}'/>" in said


@requires("virsh")
def test_libvirt_9_0_does_not_know_reconnect_and_newer_ones_do(tmp_path: Path) -> None:
    code, said = defined(domain(tmp_path, SNIPPET, "test"))
    if tool_version("virsh").startswith("9.0."):
        assert "failed to validate" in said
    else:
        assert code == 0, said
        assert RECONNECT.strip() in said


@requires_newer
def test_snippet_is_what_the_schema_of_a_newer_libvirt_allows(tmp_path: Path) -> None:
    schema = NEWER / "usr/share/libvirt/schemas/domain.rng"
    run(newer("xmllint"), "--noout", "--relaxng", schema, domain(tmp_path, SNIPPET))
    wrong = SNIPPET.replace("<reconnect delay", "<reconnect patience")
    refused = run(newer("xmllint"), "--noout", "--relaxng", schema, domain(tmp_path, wrong), check=False)
    assert refused.returncode != 0


class Home(NamedTuple):
    """Where a libvirt without a daemon has all its files, and we our socket."""

    folder: Path
    as_user: Sequence[Argument]

    @property
    def socket(self) -> Path:
        return self.folder / "nbd.sock"

    def give_away(self) -> None:
        if self.as_user:
            run("chown", "-R", str(NOBODY), self.folder)


@pytest.fixture
def home() -> Iterator[Home]:
    with quick_folder() as folder:
        (folder / "libvirt" / "etc").mkdir(parents=True)
        (folder / "libvirt" / "etc" / "qemu.conf").write_text('stdio_handler = "file"\n')
        yield Home(folder, AS_NOBODY if os.geteuid() == 0 else [])


@requires_newer
@requires("qemu-system-x86_64")
def test_guest_that_libvirt_starts_with_the_snippet_has_our_disk(tmp_path: Path, home: Home) -> None:
    disk = TrackedDisk(tmp_path, 16 << 20)
    with serving(disk, tmp_path, listening=home.socket) as served:
        xml = domain(home.folder, SNIPPET.replace(SOCKET, str(home.socket)))
        home.give_away()
        environment = {
            "HOME": str(home.folder),
            "XDG_RUNTIME_DIR": str(home.folder),
            "LIBVIRT_DRIVER_DIR": str(DRIVERS),
        }
        command = [*home.as_user, newer("virt-qemu-run"), "-v", f"--root={home.folder}/libvirt", xml]
        with spawn(*AS_ONE, *command, env=environment) as child:
            child.wait_for_line("guest running", timeout=90)
            connected, _ = served.server.traffic(NAME)
            assert connected == 1
            child.process.send_signal(signal.SIGTERM)
            child.wait()
        [log] = (home.folder / "libvirt").glob("log/qemu/guest.log")
    blockdev = re.search(r"-blockdev '(\{\"driver\":\"nbd\".*?\})'", log.read_text())
    assert blockdev is not None
    for said in ('"reconnect-delay":60', f'"export":"{NAME}"', '"discard":"unmap"'):
        assert said in blockdev[1]
