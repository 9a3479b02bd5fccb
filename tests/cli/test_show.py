"""show: the map in words, in JSON and in pictures, how far it is to be trusted, and what it must not replace."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from lmdbitmap.cli.show import glyphs_for
from lmdbitmap.filter import Filter
from lmdbitmap.nbd.control.control import ControlServer
from lmdbitmap.store import Store
from tests.cli.conftest import MIB, SIZE, Cli
from tests.helpers.support import requires, run

KIB = 1 << 10
COARSE = 256 * MIB
"""A disk of this size has cells of 256 KiB, four blocks each."""


def _all_shades(cli: Cli) -> None:
    """Disk `sda` with two cells full, one with one dirty block of its four, and one with three."""
    cli.add("sda", COARSE)
    cli.ok("checkpoint", "sda", "monday")
    cli.ok("mark", "sda", 0, 512 * KIB)
    cli.ok("mark", "sda", MIB, 1)
    cli.ok("mark", "sda", 32 * MIB, 192 * KIB)


def test_the_map_for_people_is_exactly_this(cli: Cli) -> None:
    _all_shades(cli)
    lines = cli.ok("show", "sda").splitlines()
    assert lines[0] == "sda: 768 KiB of 256 MiB changed since monday; exact"
    assert lines[1] == "       0 B  ██··░" + "·" * 59
    assert lines[2] == "    16 MiB  " + "·" * 64
    assert lines[3] == "    32 MiB  ▓" + "·" * 63
    assert lines[16] == "   240 MiB  " + "·" * 64
    assert lines[17:] == ["· none  ░ some  ▓ most  █ all  of a cell, which is 256 KiB"]


def test_the_answer_for_programs_is_exactly_this(cli: Cli) -> None:
    cli.add("sda", 192 * KIB - 1)
    cli.ok("checkpoint", "sda", "monday")
    cli.ok("mark", "sda", 128 * KIB, 1)
    assert cli.json("show", "sda") == {
        "disk": "sda",
        "size": 192 * KIB - 1,
        "granularity": 64 * KIB,
        "since": "monday",
        "until": None,
        "trust": "exact",
        "reason": None,
        "dirty_bytes": 64 * KIB - 1,
        "svg": None,
        "png": None,
        "cell_bytes": 64 * KIB,
        "cells": [
            {"offset": 0, "length": 64 * KIB, "dirty_bytes": 0, "shade": "none"},
            {"offset": 64 * KIB, "length": 64 * KIB, "dirty_bytes": 0, "shade": "none"},
            {"offset": 128 * KIB, "length": 64 * KIB - 1, "dirty_bytes": 64 * KIB - 1, "shade": "all"},
        ],
    }


def test_the_cells_add_up_to_what_changes_says(cli: Cli) -> None:
    _all_shades(cli)
    shown, listed = cli.json("show", "sda"), cli.json("changes", "sda")
    assert len(shown["cells"]) == 1024
    assert sum(cell["dirty_bytes"] for cell in shown["cells"]) == shown["dirty_bytes"]
    assert {key: shown[key] for key in listed if key != "extents"} == {
        key: listed[key] for key in listed if key != "extents"
    }


@pytest.mark.parametrize(
    ("options", "dirty_cells"),
    [([], [1]), (["--since", "monday"], [0, 1]), (["--since", "monday", "--until", "tuesday"], [0])],
)
def test_since_and_until_choose_the_periods(cli: Cli, options: list[str], dirty_cells: list[int]) -> None:
    cli.add("sda", 3 * 64 * KIB)
    cli.ok("checkpoint", "sda", "monday")
    cli.ok("mark", "sda", 0, 1)
    cli.ok("checkpoint", "sda", "tuesday")
    cli.ok("mark", "sda", 64 * KIB, 1)
    cells = cli.json("show", "sda", *options)["cells"]
    assert [number for number, cell in enumerate(cells) if cell["dirty_bytes"]] == dirty_cells


def test_an_empty_disk_has_a_map(cli: Cli) -> None:
    cli.add("sda", 0)
    said = cli.ok("show", "sda", "--svg", cli.folder / "sda.svg", "--png", cli.folder / "sda.png")
    assert said.startswith("sda: 0 B of 0 B changed since epoch-1; superset")
    assert cli.json("show", "sda")["cells"] == []


# --- trust ---


def test_an_untrusted_map_is_dirty_all_over_and_ends_in_3(cli: Cli) -> None:
    os.utime(_with_monday(cli), ns=(2**61, 2**61))
    picture = cli.folder / "sda.svg"
    code, out, err = cli("show", "sda", "--svg", picture)
    assert code == 3
    assert err == (
        "lmdbitmap: what changed on disk 'sda' is not known: the image was written while it was not tracked;"
        " make a full backup\n"
    )
    reason = "untrusted, so all of it counts as dirty: the image was written while it was not tracked"
    assert out.splitlines()[:2] == [
        f"sda: 8 MiB of 8 MiB changed since monday; {reason}",
        "       0 B  " + "█" * 64,
    ]
    assert reason in picture.read_text()
    assert _shades(picture) == {"all"}


def test_an_untrusted_map_for_programs_is_dirty_all_over_too(cli: Cli) -> None:
    os.utime(_with_monday(cli), ns=(2**61, 2**61))
    code, out, _ = cli("show", "sda", "--json")
    answer = json.loads(out)
    assert (code, answer["trust"], answer["dirty_bytes"]) == (3, "untrusted", SIZE)
    assert {cell["shade"] for cell in answer["cells"]} == {"all"}


def test_a_superset_is_called_one(cli: Cli) -> None:
    cli.add("sda")
    assert cli.ok("show", "sda").splitlines()[0] == (
        "sda: 8 MiB of 8 MiB changed since epoch-1; superset, which may show too much:"
        " everything counts as dirty until the first full backup"
    )


def _with_monday(cli: Cli) -> Path:
    image = cli.add("sda")
    cli.ok("checkpoint", "sda", "monday")
    return image


# --- served disks ---


@requires("qemu-io")
def test_a_served_disk_is_shown_as_it_is_at_the_moment(cli: Cli) -> None:
    _with_monday(cli)
    with cli.serving("sda") as served:
        run("qemu-io", "-f", "raw", "-c", "write -q 1M 64K", served.uris["sda"])
        answer = cli.json("show", "sda")
        assert (answer["trust"], answer["dirty_bytes"]) == ("exact", 64 * KIB)
        assert [cell["offset"] for cell in answer["cells"] if cell["shade"] == "all"] == [MIB]


def test_an_owner_that_lost_track_is_believed(cli: Cli) -> None:
    _with_monday(cli)
    with (
        Store.open(str(cli.store)) as store,
        Filter.attach(store, "sda", background=False) as attached,
        ControlServer({"sda": attached}),
    ):
        attached._voucher.lost = "the store was full"
        code, out, _ = cli("show", "sda")
        attached._voucher.lost = None
    assert code == 3
    assert "untrusted, so all of it counts as dirty: disk 'sda': the store was full" in out


def test_what_an_owner_without_a_socket_is_writing_makes_a_superset(cli: Cli) -> None:
    _with_monday(cli)
    with Store.open(str(cli.store)) as store, Filter.attach(store, "sda", background=False) as attached:
        attached.pwrite(b"x", 0)
        answer = cli.json("show", "sda")
    assert (answer["trust"], answer["reason"]) == (
        "superset",
        "some of it was being written, or its record is damaged",
    )
    assert [cell["shade"] for cell in answer["cells"]] == ["all"] * 64 + ["none"] * 64


# --- pictures ---


def test_pictures_are_written_and_written_again(cli: Cli) -> None:
    _all_shades(cli)
    svg, png = cli.folder / "sda.svg", cli.folder / "sda.png"
    said = cli.ok("show", "sda", "--svg", svg, "--png", png)
    assert said.splitlines()[-2:] == [f"drawn: {svg}", f"drawn: {png}"]
    drawn = png.read_bytes()
    assert _shades(svg) == {"none", "all"}  # its cells are smaller: a block each
    cli.ok("mark", "sda", 0, COARSE)
    told = cli.json("show", "sda", "--svg", svg, "--png", png)
    assert (told["svg"], told["png"]) == (str(svg), str(png))
    assert _shades(svg) == {"all"}
    assert png.read_bytes()[:8] == drawn[:8] != png.read_bytes()
    assert stat.S_IMODE(svg.stat().st_mode) == stat.S_IMODE(png.stat().st_mode) == 0o600
    assert sorted(path.name for path in cli.folder.iterdir()) == ["sda.png", "sda.raw", "sda.svg", "store"]


def _shades(svg: Path) -> set[str]:
    page = ElementTree.fromstring(svg.read_bytes())
    return {path.attrib["class"] for path in page.iter("{http://www.w3.org/2000/svg}path")}


@pytest.mark.parametrize(("option", "signature"), [("--svg", b"<svg"), ("--png", b"\x89PNG")])
def test_a_picture_on_standard_output_is_alone_there(cli: Cli, option: str, signature: bytes) -> None:
    _all_shades(cli)
    (cli.folder / "-").write_bytes(b"a file of that name")
    done = subprocess.run(
        cli.command("show", "sda", option, "-", "--json"), cwd=cli.folder, capture_output=True, timeout=30
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(signature)
    assert json.loads(done.stderr)["dirty_bytes"] == 768 * KIB
    assert (cli.folder / "-").read_bytes() == b"a file of that name"


def test_a_picture_that_could_not_be_written_is_not_said_to_be_drawn(cli: Cli) -> None:
    cli.add("sda")
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            cli.command("show", "sda", "--svg", "-"), stdout=full, stderr=subprocess.PIPE, timeout=30
        )
    assert done.returncode == 1
    assert done.stderr.startswith(b"lmdbitmap: standard output: No space left on device")


def test_a_picture_is_whole_though_the_answer_beside_it_cannot_be_written(cli: Cli) -> None:
    cli.add("sda")
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            cli.command("show", "sda", "--svg", "-"), stdout=subprocess.PIPE, stderr=full, timeout=30
        )
    assert (done.returncode, done.stdout[-7:]) == (1, b"</svg>\n")


def test_standard_output_takes_one_picture(cli: Cli) -> None:
    cli.add("sda")
    assert "name a file for the other" in cli.fails(2, "show", "sda", "--svg", "-", "--png", "-")


def test_a_terminal_takes_no_picture(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    cli.add("sda")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert "this is a terminal" in cli.fails(2, "show", "sda", "--png", "-")


@pytest.mark.parametrize(("option", "kind"), [("--svg", "an SVG picture"), ("--png", "a PNG picture")])
@pytest.mark.parametrize("content", [b"\0", b"<?xml version='1.0'?><domain/>", b"GIF89a"])
def test_nothing_but_a_picture_is_replaced(cli: Cli, option: str, kind: str, content: bytes) -> None:
    cli.add("sda")
    victim = cli.folder / "victim"
    victim.write_bytes(content)
    assert cli.fails(1, "show", "sda", option, victim) == (
        f"{victim} is there and is not {kind}; name another file, or remove that one"
    )
    assert victim.read_bytes() == content


def test_an_image_is_not_replaced_by_its_picture(cli: Cli) -> None:
    image = cli.add("sda")
    assert "is there and is not a PNG picture" in cli.fails(1, "show", "sda", "--png", image)
    assert image.stat().st_size == SIZE


def test_one_file_cannot_be_both_pictures(cli: Cli) -> None:
    cli.add("sda")
    both = cli.folder / "both"
    assert "is not a PNG picture" in cli.fails(1, "show", "sda", "--svg", both, "--png", both)
    assert _shades(both) == {"all"}


@pytest.mark.parametrize(
    ("place", "code", "said"),
    [
        (".", 2, "is a directory"),
        ("missing/sda.svg", 1, "missing; make it"),
        ("fifo", 2, "is not a regular file"),
        ("/dev/null", 2, "/dev/null is not a regular file"),
    ],
)
def test_places_for_a_picture_that_make_no_sense_are_refused(
    cli: Cli, place: str, code: int, said: str
) -> None:
    cli.add("sda")
    os.mkfifo(cli.folder / "fifo")
    assert said in cli.fails(code, "show", "sda", "--svg", cli.folder / place)


def test_a_picture_that_cannot_be_finished_leaves_the_old_one(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli.add("sda")
    svg = cli.folder / "sda.svg"
    svg.write_bytes(b"<svg />")

    def full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    assert "No space left" in cli.fails(1, "show", "sda", "--svg", svg)
    assert svg.read_bytes() == b"<svg />"
    assert sorted(path.name for path in cli.folder.iterdir()) == ["sda.raw", "sda.svg", "store"]


# --- questions and terminals ---


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["sdx"], 1, "'sdx'"),
        (["sda", "--since", "sunday"], 1, "has no checkpoint 'sunday'"),
        (["sda", "--since", "monday", "--until", "monday"], 2, "'monday' is not after 'monday'"),
    ],
)
def test_questions_that_make_no_sense_draw_nothing(cli: Cli, words: list[str], code: int, said: str) -> None:
    _with_monday(cli)
    svg = cli.folder / "sda.svg"
    assert said in cli.fails(code, "show", *words, "--svg", svg)
    assert not svg.exists()


@pytest.mark.parametrize(
    ("encoding", "letters"),
    [("utf-8", "·░▓█"), ("cp437", "·░▓█"), ("ascii", ".-+#"), ("iso8859-1", ".-+#"), (None, ".-+#")],
)
def test_an_output_gets_letters_that_it_can_hold(encoding: str | None, letters: str) -> None:
    assert "".join(glyphs_for(encoding).values()) == letters


def test_a_pipe_that_holds_ascii_only_gets_plain_letters(cli: Cli) -> None:
    _all_shades(cli)
    done = run(*cli.command("show", "sda"), env={"PYTHONIOENCODING": "ascii"})
    assert done.stdout.splitlines()[1] == "       0 B  ##..-" + "." * 59
    assert done.stdout.isascii()
    assert "\x1b" not in done.stdout
