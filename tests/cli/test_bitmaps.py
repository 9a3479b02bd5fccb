"""export, import, inspect, and `serve --bitmap-file`: bitmaps as files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lmdbitmap import Store
from lmdbitmap.flat_file.flatfile import FlatFile
from lmdbitmap.tracker import standalone
from tests.cli.conftest import MIB, SIZE, Cli
from tests.cli.test_serve import write
from tests.helpers.support import requires

KIB = 1 << 10
DIRTY_COUNT_BYTE = 72
FIRST_BITS_BYTE = 4096


@pytest.fixture
def flat(cli: Cli) -> Path:
    """The exported changes of disk `sda` since `monday`: 128 KiB at 1 MiB."""
    cli.add("sda")
    cli.ok("checkpoint", "sda", "monday")
    cli.ok("mark", "sda", MIB, 128 * KIB)
    path = cli.folder / "sda.dbm"
    cli.ok("export", "sda", path)
    return path


def _with_byte(path: Path, position: int, change: int) -> Path:
    changed = bytearray(path.read_bytes())
    changed[position] ^= change
    path.write_bytes(changed)
    return path


def _unclean(cli: Cli, path: Path) -> Path:
    """The same file, as a writer that died leaves it."""
    with FlatFile.open(path, writable=True) as file:
        file.clear_clean()
    return path


# --- out ---


def test_an_export_says_what_it_wrote(cli: Cli, flat: Path) -> None:
    assert (
        cli.ok("export", "sda", flat) == f"{flat}: 8 MiB in blocks of 64 KiB, 2 of 128 blocks dirty, exact\n"
    )
    told = cli.json("export", "sda", flat, "--since", "monday")
    assert (told["file"], told["dirty_count"], told["recording"]) == (str(flat), 2, True)


def test_a_closed_period_is_exported_as_such(cli: Cli, flat: Path) -> None:
    cli.ok("checkpoint", "sda", "tuesday")
    told = cli.json("export", "sda", flat, "--since", "monday", "--until", "tuesday")
    assert (told["dirty_count"], told["recording"]) == (2, False)
    assert told["until_uuid"] == cli.json("info", "sda")["checkpoints"][-1]["uuid"]


def test_what_is_not_known_is_not_exported(cli: Cli, flat: Path) -> None:
    before = flat.read_bytes()
    (cli.folder / "sda.raw").touch()
    assert "make a full backup" in cli.fails(3, "export", "sda", flat)
    assert flat.read_bytes() == before


def test_an_export_to_nowhere_is_told(cli: Cli, flat: Path) -> None:
    assert "there is no folder" in cli.fails(1, "export", "sda", cli.folder / "nowhere" / "x.dbm")
    assert "no disk or bitmap is called 'sdx'" in cli.fails(1, "export", "sdx", flat)


@pytest.mark.parametrize("name", ["sda", "kept"])
def test_an_export_takes_the_place_of_bitmaps_and_of_nothing_else(cli: Cli, flat: Path, name: str) -> None:
    cli.ok("import", flat, "kept")
    manifest = cli.folder / "manifest.json"
    manifest.write_text("{}")
    said = cli.fails(1, "export", name, manifest)
    assert said == (
        f"{manifest}: expected a flat bitmap file of this version, an empty file or none, found a file with something"
        " else in it; name a new file: nothing was written"
    )
    assert manifest.read_text() == "{}"
    manifest.write_bytes(b"")
    cli.ok("export", name, manifest)
    cli.ok("export", name, _with_byte(manifest, FIRST_BITS_BYTE, 1))
    assert cli.json("inspect", manifest)["trust"] == "exact"


@pytest.mark.parametrize("name", ["sda", "kept"])
def test_an_export_never_takes_the_place_of_an_image(cli: Cli, flat: Path, name: str) -> None:
    """Not even of one whose guest wrote what a bitmap begins with, nor by another name."""
    cli.ok("import", flat, "kept")
    image, other = cli.add("sdb"), cli.folder / "other.raw"
    with image.open("r+b") as file:
        file.write(flat.read_bytes()[:4096])
    other.hardlink_to(image)
    before = image.stat()
    for path in (image, other):
        assert "is the image of disk 'sdb'" in cli.fails(1, "export", name, path)
    assert (image.stat().st_ino, image.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_an_export_goes_to_a_file_alone(cli: Cli, flat: Path) -> None:
    fifo = cli.folder / "fifo"
    os.mkfifo(fifo)
    assert "is not a regular file" in cli.fails(2, "export", "sda", fifo)
    assert "is a directory" in cli.fails(2, "export", "sda", cli.folder)
    assert fifo.is_fifo()


# --- described ---


def test_inspect_tells_what_a_file_holds(cli: Cli, flat: Path) -> None:
    told = cli.json("inspect", flat)
    disk = cli.json("info", "sda")
    assert told == {
        "file": str(flat), "size": SIZE, "granularity": 64 * KIB, "clean": True, "recording": True,
        "superset": False, "bit_count": 128, "dirty_count": 2, "bitmap_uuid": told["bitmap_uuid"],
        "disk_uuid": disk["uuid"], "epoch_uuid": disk["epoch"]["uuid"],
        "since_uuid": disk["checkpoints"][-1]["uuid"], "until_uuid": None,
        "since_time": disk["checkpoints"][-1]["time"], "trust": "exact", "dirty_bytes": 128 * KIB,
        "metadata": {"checkpoint": "monday", "disk": "sda"}, "problems": [],
    }  # fmt: skip


def test_inspect_is_a_portrait_for_people(cli: Cli, flat: Path) -> None:
    lines = cli.ok("inspect", flat).splitlines()
    assert lines[:5] == [
        f"file        {flat}",
        "size        8 MiB in blocks of 64 KiB",
        "dirty       128 KiB in 2 blocks",
        "trust       exact",
        "flags       CLEAN RECORDING",
    ]
    assert lines[6] == "until       still recording"
    assert lines[-1] == "names       checkpoint monday, disk sda"


def test_a_portrait_names_no_checkpoint_for_bits_that_count_from_none(cli: Cli, flat: Path) -> None:
    cli.ok("import", flat, "one")
    cli.ok("combine", "one", "or", "one", "--into", "two")
    cli.ok("export", "two", flat)
    lines = cli.ok("inspect", flat).splitlines()
    assert [line.split()[0] for line in lines[4:]] == ["flags", "bitmap", "disk", "names"]
    assert not any("00000000-0000" in line or "1970" in line or "recording" in line for line in lines)


def test_inspect_needs_no_store(cli: Cli, flat: Path) -> None:
    assert cli.json("inspect", flat, "--store", cli.folder / "none")["dirty_count"] == 2


def test_a_file_that_was_not_closed_cleanly_is_worth_nothing(cli: Cli, flat: Path) -> None:
    code, out, err = cli("inspect", _unclean(cli, flat), "--json")
    told = json.loads(out)
    assert code == 3
    assert "its CLEAN flag is not set" in err
    assert (told["clean"], told["trust"], told["dirty_bytes"]) == (False, "untrusted", SIZE)
    assert "dirty       8 MiB in 128 blocks" in cli("inspect", flat).out.splitlines()


def test_bits_that_are_not_those_that_were_written_are_worth_nothing(cli: Cli, flat: Path) -> None:
    _with_byte(flat, FIRST_BITS_BYTE, 1)
    assert "expected checksum" in json.loads(cli("inspect", flat, "--json").out)["problems"][0]
    assert cli("inspect", flat).code == 3
    assert "expected checksum" in cli.fails(1, "import", flat, "kept")


def test_damage_of_the_header_is_named(cli: Cli, flat: Path) -> None:
    assert "header_checksum at byte 252" in cli.fails(1, "inspect", _with_byte(flat, DIRTY_COUNT_BYTE, 1))
    flat.write_bytes(b"\x1b[2J" * 2000)
    assert "magic at byte 0" in cli.fails(1, "inspect", flat)
    flat.write_bytes(b"")
    assert "at least 256 bytes" in cli.fails(1, "inspect", flat)
    assert "does not exist" in cli.fails(1, "inspect", cli.folder / "nothing.dbm")


# --- in ---


def test_a_file_becomes_a_bitmap_of_its_own(cli: Cli, flat: Path) -> None:
    assert cli.ok("import", flat, "kept") == "kept: 8 MiB in blocks of 64 KiB, 128 KiB dirty\n"
    [bitmap] = cli.json("ls")["bitmaps"]
    assert bitmap == cli.json("info", "kept")
    assert (bitmap["name"], bitmap["dirty_bytes"], bitmap["trust"]) == ("kept", 128 * KIB, "exact")
    assert bitmap["origin_disk"] == cli.json("info", "sda")["uuid"]
    assert cli.ok("ls").splitlines()[-1] == "kept    8 MiB  128 KiB  exact"
    assert "trust       exact" in cli.ok("info", "kept")


def test_a_bitmap_is_not_called_unknown_where_a_disk_is_wanted(cli: Cli, flat: Path) -> None:
    cli.ok("import", flat, "kept")
    said = "'kept' is a stand-alone bitmap, not a disk; `lmdbitmap ls` lists those there are"
    assert said in cli.fails(1, "changes", "kept")
    assert said in cli.fails(1, "backup", "kept", "backups")


def test_a_bitmap_goes_out_again_as_it_came(cli: Cli, flat: Path) -> None:
    cli.ok("import", flat, "kept")
    again = cli.folder / "again.dbm"
    cli.ok("export", "kept", again)
    ignored = ("file", "metadata")
    came, went = cli.json("inspect", flat), cli.json("inspect", again)
    assert {k: v for k, v in came.items() if k not in ignored} == {
        k: v for k, v in went.items() if k not in ignored
    }
    assert "is no disk" in cli.fails(2, "export", "kept", again, "--since", "monday")


def test_an_import_makes_a_store(cli: Cli, flat: Path) -> None:
    elsewhere = cli.folder / "elsewhere"
    cli.ok("import", flat, "kept", "--store", elsewhere)
    assert cli.json("ls", "--store", elsewhere)["bitmaps"][0]["name"] == "kept"


def test_an_import_of_no_flat_file_makes_no_store(cli: Cli) -> None:
    elsewhere = cli.folder / "elsewhere"
    assert "does not exist" in cli.fails(1, "import", cli.folder / "no.dbm", "kept", "--store", elsewhere)
    assert not elsewhere.exists()


def test_an_import_into_a_disk_adds_to_its_period(cli: Cli, flat: Path) -> None:
    cli.ok("checkpoint", "sda", "tuesday")
    cli.ok("mark", "sda", 0, 1)
    assert cli.ok("import", flat, "kept", "--into", "sda").endswith(", also in sda\n")
    assert cli.dirty("sda")[1] == [(0, 64 * KIB), (MIB, 128 * KIB)]


def test_a_file_that_is_not_clean_is_imported_as_everything_dirty_or_not_at_all(cli: Cli, flat: Path) -> None:
    _unclean(cli, flat)
    told = cli.fails(3, "import", flat, "kept", "--into", "sda")
    assert "not closed cleanly" in told
    assert "import it with --all-dirty" in told
    assert cli.json("ls")["bitmaps"] == []
    assert cli.dirty("sda") == ("exact", [(MIB, 128 * KIB)])
    cli.ok("import", flat, "kept", "--into", "sda", "--all-dirty")
    assert cli.dirty("sda") == ("superset", [(0, SIZE)])


def test_a_name_that_is_taken_is_refused(cli: Cli, flat: Path) -> None:
    assert "a disk is called 'sda' already" in cli.fails(1, "import", flat, "sda")
    cli.ok("import", flat, "kept")
    cli.ok("import", flat, "kept")  # the same again, as after a death that left the asker in doubt
    assert "a bitmap is called 'kept' already" in cli.fails(1, "import", flat, "kept", "--all-dirty")


def test_a_disk_of_another_size_is_refused(cli: Cli, flat: Path) -> None:
    cli.add("small", MIB)
    assert "has 1048576 bytes" in cli.fails(2, "import", flat, "kept", "--into", "small")
    assert cli.json("ls")["bitmaps"] == []


def test_a_bitmap_can_be_thrown_away(cli: Cli, flat: Path) -> None:
    cli.ok("import", flat, "kept")
    assert cli.ok("rm", "kept") == "kept: removed from the store\n"
    assert cli.json("ls")["bitmaps"] == []
    assert len(cli.json("ls")["disks"]) == 1


# --- beside a disk that is served ---


@requires("qemu-io")
def test_a_served_disk_is_exported_up_to_the_moment(cli: Cli, flat: Path) -> None:
    with cli.serving("sda") as served:
        write(served.uris["sda"], 5 * MIB, 1)
        assert cli.json("export", "sda", flat)["dirty_count"] == 3


def test_an_import_into_a_served_disk_is_done_by_its_owner(cli: Cli, flat: Path) -> None:
    cli.ok("checkpoint", "sda", "tuesday")
    with cli.serving("sda"):
        cli.ok("import", flat, "kept", "--into", "sda")
        assert cli.dirty("sda")[1] == [(MIB, 128 * KIB)]
    assert cli.dirty("sda")[1] == [(MIB, 128 * KIB)]


@requires("qemu-io")
def test_a_bitmap_file_is_unclean_while_served_and_whole_afterwards(cli: Cli, flat: Path) -> None:
    with cli.serving("sda", f"--bitmap-file={flat}") as served:
        assert json.loads(cli("inspect", flat, "--json").out)["clean"] is False
        write(served.uris["sda"], 5 * MIB, 1)
    told = cli.json("inspect", flat)
    assert (told["clean"], told["dirty_count"], told["trust"]) == (True, 3, "exact")


def test_a_bitmap_file_is_made_where_none_was(cli: Cli) -> None:
    cli.add("sda")
    path = cli.folder / "new.dbm"
    with cli.serving("sda", f"--bitmap-file={path}"):
        assert not path.exists()
    assert cli.json("inspect", path)["dirty_count"] == 128


def test_after_a_kill_the_bitmap_file_is_worth_nothing_and_the_store_is(cli: Cli, flat: Path) -> None:
    with cli.serving("sda", f"--bitmap-file={flat}") as served:
        served.child.process.kill()
        served.child.wait()
    assert cli("inspect", flat).code == 3
    assert cli.dirty("sda") == ("superset", [(MIB, 128 * KIB)])
    with cli.serving("sda", f"--bitmap-file={flat}", log=True) as served:
        pass
    assert "the next backup reads the whole disk" in served.child.stderr
    assert cli.json("inspect", flat)["dirty_count"] == 128


def test_a_bitmap_file_is_of_one_disk(cli: Cli) -> None:
    cli.add("a")
    cli.add("b")
    said = cli.fails(2, "serve", "a", "b", "--socket", "s", "--bitmap-file", "x.dbm")
    assert said.startswith("a bitmap file is of one disk")


def test_a_bitmap_file_that_is_something_else_is_left_alone(cli: Cli) -> None:
    cli.add("sda")
    path = cli.folder / "letter.txt"
    path.write_bytes(b"Dear Sir or Madam, " * 300)
    before = path.read_bytes()
    cli.fails(1, "serve", "sda", "--socket", cli.folder / "s", "--bitmap-file", path)
    assert path.read_bytes() == before
    assert cli.json("info", "sda")["attached"] is False


def test_a_bitmap_with_a_damaged_record_is_not_called_exact(cli: Cli, flat: Path) -> None:
    cli.ok("import", flat, "kept")
    assert cli.json("info", "kept")["trust"] == "exact"
    with Store.open(str(cli.store)) as store, store.read() as reader:
        bitmap = standalone.find(reader, "kept")
    with Store.open(str(cli.store)) as store:
        key = bitmap.id.to_bytes(8, "big") + bytes(8)
        store.update(lambda writer: writer._put("regions", key, b"\xff" * 100))
    told = cli.json("info", "kept")
    assert (told["trust"], told["reason"]) == (
        "superset",
        "a record of it is damaged and counts as all dirty",
    )
    assert cli.json("ls")["bitmaps"][0]["trust"] == "superset"
    cli.ok("export", "kept", cli.folder / "again.dbm")
    assert cli.json("inspect", cli.folder / "again.dbm")["trust"] == "superset"
