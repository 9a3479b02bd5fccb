"""The threat model of DESIGN.md, claim by claim: who may reach what, and that no name ever leads elsewhere."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import MIB, Cli
from tests.cli.test_serve import write
from tests.helpers.nbd_raw import GO, RawClient, string
from tests.helpers.support import requires

NOBODY = 65534
REFUSED, LET_IN = 3, 4
UNKNOWN_EXPORT = 2**31 + 6

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@pytest.fixture
def open_house(capsys: pytest.CaptureFixture[str]) -> Iterator[Cli]:
    """A folder that everybody may enter, and a user who forbids nobody anything (umask 0)."""
    with tempfile.TemporaryDirectory(prefix="lmdbitmap-test-") as folder:
        os.chmod(folder, 0o755)
        before = os.umask(0)
        try:
            yield Cli(Path(folder), capsys)
        finally:
            os.umask(before)


@contextlib.contextmanager
def lived_in(cli: Cli) -> Iterator[Path]:
    """A store, a server at work, a repository, a restored image and a bitmap file; answers the repository."""
    cli.add("sda")
    repository = cli.folder / "backups"
    with cli.serving("sda") as served:
        write(served.uris["sda"], MIB, 4096)
        cli.ok("export", "sda", cli.folder / "sda.dbm")
        yield repository
    cli.ok("backup", "sda", repository)
    cli.ok("restore", repository, "sda", cli.folder / "restored.raw")


def modes_below(*places: Path) -> dict[str, int]:
    found = [path for place in places for path in (place, *place.rglob("*"))]
    return {str(path): path.lstat().st_mode for path in found}


@requires("qemu-io")
def test_nothing_that_is_made_is_open_to_other_users(open_house: Cli) -> None:
    with lived_in(open_house) as repository:
        modes = modes_below(open_house.store, open_house.folder / "sda.sock")
    modes |= modes_below(repository, open_house.folder / "sda.dbm", open_house.folder / "restored.raw")
    kinds = {stat.S_IFMT(mode) for mode in modes.values()}
    assert kinds == {stat.S_IFDIR, stat.S_IFREG, stat.S_IFSOCK}
    open_to_others = {path: oct(mode) for path, mode in modes.items() if mode & 0o077}
    assert open_to_others == {}


def as_another_user(act: Callable[[], object]) -> bool:
    """Whether `act` is permitted to user `nobody`."""
    child = os.fork()
    if child == 0:
        code = LET_IN
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            act()
        except PermissionError:
            code = REFUSED
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (LET_IN, REFUSED)
    return code == LET_IN


def connect(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as caller:
        caller.connect(str(path))


@as_root
@requires("qemu-io")
def test_another_user_reaches_no_socket_no_store_and_no_backup(open_house: Cli) -> None:
    with lived_in(open_house) as repository:
        [control] = (open_house.store / "control").iterdir()
        assert not as_another_user(lambda: connect(open_house.folder / "sda.sock"))
        assert not as_another_user(lambda: connect(control))
        assert not as_another_user(lambda: os.listdir(open_house.store))
        assert as_another_user(lambda: os.listdir(open_house.folder))  # the way there is free
    assert not as_another_user(lambda: os.listdir(repository))
    assert not as_another_user((open_house.folder / "restored.raw").read_bytes)


@as_root
def test_control_socket_turns_away_a_user_who_got_through_the_folder(open_house: Cli) -> None:
    """Somebody opened the doors by hand: who calls is looked at all the same."""

    def call(path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as caller:
            caller.connect(str(path))
            told = caller.makefile().readline()
            if "error" in json.loads(told):
                raise PermissionError(told)

    open_house.add("sda")
    with open_house.serving("sda", log=True):
        [control] = (open_house.store / "control").iterdir()
        for place in (open_house.store, control.parent):
            place.chmod(0o755)
        control.chmod(0o666)
        assert not as_another_user(lambda: call(control))
        call(control)


@pytest.mark.parametrize(
    "name", ["../sda", "/sda", "./sda", "sda/", "sda\0", "sda/../sda", "/etc/passwd", "control", "SDA", "sda@", "%73da"]
)  # fmt: skip
def test_export_name_is_looked_up_and_never_followed(cli: Cli, name: str) -> None:
    cli.add("sda")
    with cli.serving("sda", log=True), RawClient.connect(str(cli.folder / "sda.sock")) as client:
        client.greet()
        assert client.ask(GO, string(name) + b"\0\0")[-1][0] == UNKNOWN_EXPORT
        assert client.ask(GO, string("sda") + b"\0\0")[-1] == (1, b"")


def test_manifest_cannot_lead_a_restore_out_of_its_folder(cli: Cli) -> None:
    """Not even to a backup that is sound, where it lies."""
    cli.add("sda")
    cli.ok("backup", "sda", cli.folder / "backups")
    place = cli.folder / "backups" / "sda"
    [image] = place.glob("*.qcow2")
    outside = image.rename(cli.folder / image.name)
    for name in (f"../../{image.name}", str(outside)):
        changed = json.loads((place / "manifest.json").read_text())
        changed["backups"][0]["file"] = name
        (place / "manifest.json").write_text(json.dumps(changed))
        told = cli.fails(1, "restore", cli.folder / "backups", "sda", cli.folder / "out.raw")
        assert str(place / "manifest.json") in told
    assert not (cli.folder / "out.raw").exists()


def test_image_of_a_repository_is_no_link_to_elsewhere(cli: Cli) -> None:
    cli.add("sda")
    cli.ok("backup", "sda", cli.folder / "backups")
    [image] = (cli.folder / "backups" / "sda").glob("*.qcow2")
    image.symlink_to(image.rename(cli.folder / "elsewhere.qcow2"))
    told = cli.fails(1, "restore", cli.folder / "backups", "sda", cli.folder / "out.raw")
    assert "expected a regular file" in told
    assert not (cli.folder / "out.raw").exists()


@pytest.mark.parametrize(
    ("name", "code"),
    [("manifest.json", 1), ("manifest.json.copy", 0), ("manifest.next", 1), ("unfinished", 0)],
)
def test_no_link_in_a_repository_leads_a_backup_to_write_elsewhere(cli: Cli, name: str, code: int) -> None:
    """Whoever may write the repository may not lead root anywhere."""
    cli.add("sda")
    cli.ok("backup", "sda", cli.folder / "backups")
    place, elsewhere = cli.folder / "backups" / "sda", cli.folder / "elsewhere"
    manifest = (place / "manifest.json").read_bytes()
    content = b"" if name == "unfinished" else manifest + b"\n"
    elsewhere.write_bytes(content)
    (place / name).unlink(missing_ok=True)
    (place / name).symlink_to(elsewhere)
    assert cli("backup", "sda", cli.folder / "backups").code == code
    assert elsewhere.read_bytes() == content
    assert (place / name).is_symlink() is (code != 0)
    if code:
        assert sorted(place.glob("*.qcow2")) == [place / "000001-full.qcow2"]


def test_names_in_a_bitmap_file_are_words_and_not_places(cli: Cli) -> None:
    """What the metadata of a file calls its disk is shown, and names nothing here."""
    cli.add("sda")
    cli.ok("export", "sda", cli.folder / "sda.dbm")
    for name in ("../x", "/tmp/x", "a/b"):
        cli.ok("import", cli.folder / "sda.dbm", name)
        cli.ok("rm", name)
    assert sorted(path.name for path in cli.folder.iterdir()) == ["sda.dbm", "sda.raw", "store"]
