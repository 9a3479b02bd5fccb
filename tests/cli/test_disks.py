"""add, ls, info, relocate, rm: the beginning and the end of a disk, and how it stands, and where, in between."""

from __future__ import annotations

import json
import os
import shutil
from typing import Any

import pytest

from lmdbitmap.access import operations
from lmdbitmap.store import Store
from lmdbitmap.tracker import changes
from tests.cli.conftest import MIB, SIZE, Cli
from tests.helpers.support import make_raw_image, run


def test_a_disk_is_added_and_all_of_it_counts_as_dirty(cli: Cli) -> None:
    image = cli.add("sda")
    [disk] = cli.json("ls")["disks"]
    assert disk == {
        "name": "sda", "uuid": disk["uuid"], "image": str(image), "size": SIZE, "granularity": 65536,
        "durability": "write-ahead", "policy": "guest-first", "attached": False, "trust": "superset",
        "reason": "everything counts as dirty until the first full backup",
        "dirty_bytes": SIZE, "since": "epoch-1", "holds": [],
    }  # fmt: skip


def test_adding_says_what_was_added(cli: Cli) -> None:
    image = cli.folder / "sda.raw"
    image.write_bytes(bytes(SIZE))
    said = cli.ok("add", "sda", image, "--granularity", "4K", "--policy", "strict")
    assert said == "sda: 8 MiB in blocks of 4 KiB, all dirty until the first full backup\n"
    assert cli.json("info", "sda")["policy"] == "strict"


def test_adding_answers_in_json_what_ls_lists(cli: Cli) -> None:
    image = cli.folder / "sda.raw"
    image.write_bytes(b"")
    assert cli.json("add", "sda", image, "--durability", "deferred") == cli.json("ls")["disks"][0]


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("ssh://host/image", "is a URI of a kind that cannot be tracked; serve it with qemu-nbd or nbdkit"),
        (
            "nbds://host/sda?tls-type=psk",
            "TLS is spoken with certificates alone (tls-type=x509); write nbd://",
        ),
        ("nbd+unix:///sda", "it does not say which socket (?socket=/path); write nbd://HOST:PORT/EXPORT or"),
    ],
)
def test_a_uri_of_no_use_is_refused_with_a_way_round(cli: Cli, uri: str, said: str) -> None:
    assert said in cli.fails(2, "add", "sda", uri)
    assert not cli.store.exists(), "nothing was made for it"


@pytest.mark.parametrize(
    ("beginning", "kind"), [(b"QFI\xfb", "qcow2"), (b"KDMV", "VMDK"), (b"vhdxfile", "VHDX")]
)
def test_an_image_of_another_format_is_tracked_with_a_warning(cli: Cli, beginning: bytes, kind: str) -> None:
    """Its bytes are all that is served, backed up and restored: the disk inside of it is another size."""
    image = cli.folder / "sda.img"
    image.write_bytes(beginning.ljust(SIZE, b"\0"))
    done = cli("add", "sda", image)
    assert (done.code, done.out) == (
        0,
        "sda: 8 MiB in blocks of 64 KiB, all dirty until the first full backup\n",
    )
    assert done.err.startswith(
        f"lmdbitmap: {image} looks like a {kind} image, and is tracked and served as the"
    )
    assert "`lmdbitmap rm sda`, serve the image with qemu-nbd" in done.err
    other = cli.folder / "sdb.img"
    other.write_bytes(beginning[:-1].ljust(SIZE, b"\0"))
    cli.ok("add", "sdb", other)


@pytest.mark.parametrize("name", ["caf\udce9.raw", "link"])
def test_an_image_whose_name_cannot_be_kept_is_refused(cli: Cli, name: str) -> None:
    (cli.folder / "caf\udce9.raw").touch()
    (cli.folder / "link").symlink_to(cli.folder / "caf\udce9.raw")
    assert "is no UTF-8 name of a file; rename it" in cli.fails(2, "add", "sda", cli.folder / name)
    assert not cli.store.exists()


@pytest.mark.parametrize("granularity", ["3000", "256", "4G", "many"])
def test_an_impossible_granularity_is_not_understood(cli: Cli, granularity: str) -> None:
    assert "see 'lmdbitmap add --help'" in cli.fails(2, "add", "sda", "x", "--granularity", granularity)
    assert not cli.store.exists(), "nothing was made for it"


def test_a_name_or_an_image_that_is_taken_is_refused(cli: Cli) -> None:
    image = cli.add("sda")
    other = cli.folder / "other.raw"
    other.write_bytes(b"")
    assert "a disk is called 'sda' already" in cli.fails(1, "add", "sda", other)
    assert "is tracked already, as 'sda'" in cli.fails(1, "add", "sdb", image)


def test_a_folder_that_is_no_store_is_left_alone(cli: Cli) -> None:
    cli.store.mkdir()
    (cli.store / "holiday.jpg").touch()
    image = cli.folder / "sda.raw"
    image.touch()
    assert "holiday.jpg" in cli.fails(1, "add", "sda", image)
    assert os.listdir(cli.store) == ["holiday.jpg"]


@pytest.mark.parametrize(
    "words",
    [
        ["ls"], ["info", "sda"], ["rm", "sda"], ["check"], ["changes", "sda"], ["checkpoint", "sda", "a"],
        ["forget", "sda", "a"], ["mark", "sda", "0", "1"], ["adopt", "sda"], ["serve", "sda", "--socket", "s"],
    ],
    ids=lambda words: words[0],
)  # fmt: skip
def test_only_add_and_import_make_a_store(cli: Cli, words: list[str]) -> None:
    assert "is not a store; name another, or make one with `lmdbitmap add`" in cli.fails(1, *words)
    assert not cli.store.exists()


def test_ls_is_a_table_for_people(cli: Cli) -> None:
    first, second = cli.add("a"), cli.add("b", 3 * MIB)
    cli.ok("checkpoint", "a,b", "monday")
    cli.ok("mark", "b", MIB, 1)
    assert cli.ok("ls").splitlines() == [
        "disk   size   dirty  since   trust  attached  holders  image",
        f"a     8 MiB     0 B  monday  exact  no              0  {first}",
        f"b     3 MiB  64 KiB  monday  exact  no              0  {second}",
    ]


def test_ls_of_nothing_says_how_to_begin(cli: Cli) -> None:
    cli.add("a")
    cli.ok("rm", "a")
    assert cli.ok("ls") == "nothing is tracked yet; begin with `lmdbitmap add`\n"
    assert cli.json("ls") == {"store": str(cli.store), "disks": [], "bitmaps": [], "failures": []}


def test_info_tells_every_period(cli: Cli) -> None:
    cli.add("sda")
    cli.ok("checkpoint", "sda", "monday")
    cli.ok("mark", "sda", 0, MIB)
    cli.ok("checkpoint", "sda", "tuesday")
    told = cli.json("info", "sda")
    assert told["epoch"]["number"] == 1
    assert told["since"] == "tuesday"
    assert [(c["name"], c["dirty_bytes"], c["epoch"]) for c in told["checkpoints"]] == [
        ("epoch-1", SIZE, told["epoch"]["uuid"]),
        ("monday", MIB, told["epoch"]["uuid"]),
        ("tuesday", 0, told["epoch"]["uuid"]),
    ]
    assert told["checkpoints"][0]["time"].endswith("Z")


def test_info_is_a_portrait_for_people(cli: Cli) -> None:
    image = cli.add("sda")
    cli.ok("checkpoint", "sda", "monday")
    lines = cli.ok("info", "sda").splitlines()
    assert lines[:9] == [
        "disk        sda, 8 MiB in blocks of 64 KiB",
        f"image       {image}",
        "attached    no",
        "dirty       0 B since checkpoint monday",
        "trust       exact",
        "epoch       1: tracking began here",
        "durability  write-ahead, guest-first",
        "",
        "checkpoint  made                 changed until the next  held by",
    ]
    assert lines[9].startswith("epoch-1     20")
    assert lines[9].endswith("  8 MiB  the tracker")


def test_a_new_epoch_is_told_with_its_reason(cli: Cli) -> None:
    image = cli.add("sda")
    cli.ok("checkpoint", "sda", "monday")
    os.utime(image, ns=(2**61, 2**61))
    assert cli.json("info", "sda")["trust"] == "untrusted"
    assert "the image was written while it was not tracked" in cli.ok("info", "sda")
    cli.ok("checkpoint", "sda", "tuesday")
    told = cli.json("info", "sda")
    assert (told["trust"], told["epoch"]["number"]) == ("exact", 2)
    assert [c["dirty_bytes"] for c in told["checkpoints"]] == [None, None, SIZE, 0]
    assert cli.ok("info", "sda").count("not known any more") == 2


def test_json_is_plain_ascii_whatever_the_names(cli: Cli) -> None:
    cli.add("größe")
    said = cli.ok("ls", "--json")
    assert said.isascii()
    assert json.loads(said)["disks"][0]["name"] == "größe"
    assert cli.ok("changes", "größe", "--json").isascii()


def test_names_cannot_reach_the_terminal(cli: Cli) -> None:
    cli.add("sda")
    cli.fails(2, "checkpoint", "sda", "\x1b[2J")
    assert "\x1b" not in cli.ok("info", "sda")


def test_rm_forgets_the_disk_and_leaves_the_image(cli: Cli) -> None:
    image = cli.add("sda")
    assert cli.ok("rm", "sda") == "sda: removed from the store\n"
    assert image.stat().st_size == SIZE
    assert cli.json("ls")["disks"] == []
    assert cli.json("check")["findings"] == []
    assert "no disk or bitmap is called 'sda'" in cli.fails(1, "rm", "sda")


def test_an_image_that_was_moved_is_tracked_on(cli: Cli) -> None:
    image = cli.add("sda")
    cli.ok("checkpoint", "sda", "monday")
    moved = image.rename(cli.folder / "moved.raw")
    assert "lmdbitmap relocate sda IMAGE" in cli.ok("info", "sda")
    assert cli.ok("relocate", "sda", moved) == f"sda: its image is {moved}, exact\n"
    assert cli.dirty("sda", "--since", "monday") == ("exact", [])
    assert cli.json("relocate", "sda", moved) == {**cli.json("ls")["disks"][0], "next_step": None}


def test_a_copy_that_takes_the_place_of_an_image_wants_to_be_vouched_for(cli: Cli) -> None:
    image = cli.add("sda")
    cli.ok("checkpoint", "sda", "monday")
    shutil.copy2(image, cli.folder / "copy.raw")
    said, next_step = cli.ok("relocate", "sda", cli.folder / "copy.raw").splitlines()
    assert "untrusted: the image is another file than the one that was tracked" in said
    assert "`lmdbitmap adopt sda`" in next_step
    cli.ok("adopt", "sda")
    assert cli.dirty("sda", "--since", "monday") == ("exact", [])


def test_an_image_cannot_be_relocated_to_where_nothing_is(cli: Cli) -> None:
    image = cli.add("sda")
    assert "none.raw" in cli.fails(1, "relocate", "sda", cli.folder / "none.raw")
    assert "is a URI of a kind that cannot be tracked" in cli.fails(2, "relocate", "sda", "ssh://host/image")
    assert cli.json("ls")["disks"][0]["image"] == str(image)


@pytest.mark.parametrize("verb", ["ls", "metrics"])
def test_a_disk_that_is_removed_meanwhile_hides_no_other(
    cli: Cli, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli.add("sda")
    cli.add("sdb")
    ask = changes._ask

    def removed_first(store: Store, name: str, *how: Any) -> changes.Changes:
        if name == "sda":
            operations.remove(store, name)
        return ask(store, name, *how)

    monkeypatch.setattr(changes, "_ask", removed_first)
    told = cli.json(verb)
    assert ([disk["name"] for disk in told["disks"]], told["failures"]) == (["sdb"], [])


def test_a_disk_whose_owners_file_cannot_be_read_hides_no_other(cli: Cli) -> None:
    cli.add("sda")
    cli.add("sdb")
    cli.ok("checkpoint", "sda,sdb", "monday")
    owners_file = cli.store / "owners" / cli.json("info", "sda")["uuid"]
    owners_file.unlink()
    owners_file.mkdir()  # so that root cannot read it either
    code, out, err = cli("ls", "--json")
    told = json.loads(out)
    unknown, known = told["disks"]
    assert (code, unknown["trust"], unknown["dirty_bytes"], unknown["attached"]) == (
        1,
        "untrusted",
        SIZE,
        None,
    )
    assert (known["trust"], known["dirty_bytes"], known["since"]) == ("exact", 0, "monday")
    assert [one["disk"] for one in told["failures"]] == ["sda"]
    assert err.startswith(f"lmdbitmap: sda: not known: {owners_file}: Is a directory")
    rows = [line.split()[:6] for line in cli("ls").out.splitlines()]
    assert rows[1] == ["sda", "8", "MiB", "8", "MiB", "?"]
    assert rows[2] == ["sdb", "8", "MiB", "0", "B", "monday"]
    code, out, err = cli("metrics", "--json")
    unknown, known = json.loads(out)["disks"]
    assert (code, unknown["trust"], unknown["dirty_bytes"], unknown["checkpoints"]) == (
        1,
        "untrusted",
        SIZE,
        None,
    )
    assert (known["trust"], known["dirty_bytes"], known["checkpoints"]) == ("exact", 0, 2)
    assert "sda: not known: " in err
    told = cli("metrics").out
    assert 'lmdbitmap_trusted{disk="sda"} 0.0' in told
    assert 'lmdbitmap_trusted{disk="sdb"} 1.0' in told
    assert 'lmdbitmap_served{disk="sda"}' not in told, "nobody knows"


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_an_image_is_known_where_the_locale_lacks_its_letters(cli: Cli, locale: str) -> None:
    env = {"LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    image, other = (
        make_raw_image(cli.folder / "d\u00fc.raw", SIZE),
        make_raw_image(cli.folder / "sdb.raw", SIZE),
    )
    cli.ok("add", "sda", image)
    added = run(*cli.command("add", "sdb", other), env=env, check=False)
    assert (added.returncode, added.stderr) == (0, "")
    cli.ok("backup", "sdb", cli.folder / "backups")
    words = cli.command("restore", cli.folder / "backups", "sdb", image)
    refused = run(*words, env=env, check=False)
    assert refused.returncode == 1
    assert "is the image of disk 'sda'" in refused.stderr
