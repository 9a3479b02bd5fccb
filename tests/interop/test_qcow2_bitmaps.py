"""Bitmaps in qcow2 images, both ways with QEMU: what we export it reads, what it stores we import, bit for bit."""

from __future__ import annotations

import contextlib
import json
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lmdbitmap.flat_file import in_qcow2
from lmdbitmap.qcow2 import bitmaps
from tests.cli.conftest import Cli
from tests.contract.implementations import can_make_loop_devices, loop_node
from tests.helpers.support import Child, requires, run, spawn, wait_for_socket

pytestmark = [
    requires("qemu-img"), requires("qemu-io"), requires("qemu-nbd"), requires("nbdinfo")
]  # fmt: skip

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

Runs = list[tuple[int, int]]


@pytest.fixture
def cli(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(tmp_path, capsys)


def random_runs(size: int, seed: int, count: int = 40) -> Runs:
    """(offset, length) in whole sectors."""
    dice = random.Random(seed)
    starts = [dice.randrange(0, size, 512) for _ in range(count)]
    return [(start, min(512 * dice.randint(1, 300), size - start)) for start in starts]


def outward(runs: Runs, size: int, granularity: int) -> Runs:
    """The ranges that a naive bitmap of that granularity calls dirty, joined."""
    touched = [range(offset // granularity, -(-(offset + length) // granularity)) for offset, length in runs]
    dirty = sorted({block for blocks in touched for block in blocks})
    joined: Runs = []
    for block in dirty:
        start, end = block * granularity, min((block + 1) * granularity, size)
        if joined and sum(joined[-1]) == start:
            joined[-1] = (joined[-1][0], end - joined[-1][0])
        else:
            joined.append((start, end - start))
    return joined


def changed(cli: Cli, name: str) -> Runs:
    """What our own answer calls dirty."""
    extents = cli.json("changes", name, "--since", "never-wrong")["extents"]
    return [(extent["offset"], extent["length"]) for extent in extents]


def marked_disk(cli: Cli, name: str, size: int, granularity: int, runs: Runs) -> None:
    image = cli.folder / f"{name}.raw"
    with image.open("xb") as made:
        made.truncate(size)
    cli.ok("add", name, image, "--granularity", granularity)
    cli.ok("checkpoint", name, "never-wrong")
    for offset, length in runs:
        cli.ok("mark", name, offset, length)


def qemu_info(image: Path) -> Any:
    told = json.loads(run("qemu-img", "info", "--output=json", image).stdout)
    return told["format-specific"]["data"].get("bitmaps", [])


def qemu_dirty(image: Path, name: str, folder: Path) -> Runs:
    """What qemu-nbd and nbdinfo call dirty."""
    socket = folder / "qemu.sock"
    words = ["--read-only", "--persistent", "--format=qcow2", f"--bitmap={name}", f"--socket={socket}"]
    with spawn("qemu-nbd", *words, image) as child:
        wait_for_socket(socket, child)
        answer = run("nbdinfo", f"--map=qemu:dirty-bitmap:{name}", "--json", f"nbd+unix:///?socket={socket}")
    socket.unlink(missing_ok=True)
    return [(extent["offset"], extent["length"]) for extent in json.loads(answer.stdout) if extent["type"]]


def check(image: Path) -> None:
    """`qemu-img check` fails for corruptions and for leaks."""
    assert json.loads(run("qemu-img", "check", "--output=json", image).stdout)["check-errors"] == 0


def qemu_image(
    path: Path, size: int, granularities: dict[str, int], runs: Runs, cluster: int = 65536
) -> Path:
    """An image whose bitmaps recorded these writes."""
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster}", path, str(size))
    for name, granularity in granularities.items():
        run("qemu-img", "bitmap", "--add", "-g", str(granularity), path, name)
    write(path, runs)
    return path


def write(path: Path, runs: Runs) -> None:
    run(
        "qemu-io",
        "-f",
        "qcow2",
        *(word for run in runs for word in ("-c", f"write -q {run[0]} {run[1]}")),
        path,
    )


# --- QEMU reads what we export ---


@pytest.mark.parametrize(
    ("size", "granularity"), [(100 * MIB, 512), (10 * GIB, 65536), (3 * GIB + 512, 4096), (MIB, 4 * MIB)]
)
def test_qemu_calls_dirty_what_we_exported(cli: Cli, size: int, granularity: int) -> None:
    runs, image = random_runs(size, granularity), cli.folder / "sda.qcow2"
    marked_disk(cli, "sda", size, granularity, runs)
    cli.ok("export", "sda", image, "--since", "never-wrong", "--format", "qcow2")
    check(image)
    assert qemu_info(image) == [{"name": "sda", "granularity": granularity, "flags": []}]
    expected = outward(runs, size, granularity)
    assert qemu_dirty(image, "sda", cli.folder) == expected == changed(cli, "sda")


def test_qemu_reads_the_longest_name(cli: Cli) -> None:
    name, image = "é" * 511 + "x", cli.folder / "long.qcow2"
    marked_disk(cli, "sda", MIB, 65536, [(65536, 1)])
    cli.ok("export", "sda", cli.folder / "sda.dbm", "--since", "never-wrong")
    cli.ok("import", cli.folder / "sda.dbm", name)
    cli.ok("export", name, image, "--format", "qcow2")
    check(image)
    assert qemu_info(image) == [{"name": name, "granularity": 65536, "flags": []}]
    assert qemu_dirty(image, name, cli.folder) == [(65536, 65536)]


@pytest.mark.parametrize("is_dirty", [True, False])
def test_a_disk_of_one_kind_costs_no_bits(cli: Cli, is_dirty: bool) -> None:
    """An entry of its table says it for a cluster of bits: they would be 16 MiB."""
    size, image = 8 << 40, cli.folder / "sda.qcow2"
    marked_disk(cli, "sda", size, 65536, [(0, size)] if is_dirty else [])
    cli.ok("export", "sda", image, "--since", "never-wrong", "--format", "qcow2")
    assert image.stat().st_size <= MIB
    check(image)
    assert qemu_dirty(image, "sda", cli.folder) == ([(0, size)] if is_dirty else [])


def test_qemu_merges_ours_as_we_do(cli: Cli) -> None:
    size = 2 * GIB
    made = {"one": random_runs(size, 1), "other": random_runs(size, 2)}
    for name, runs in made.items():
        marked_disk(cli, name, size, 65536, runs)
        cli.ok("export", name, cli.folder / f"{name}.qcow2", "--since", "never-wrong", "--format", "qcow2")
        cli.ok("import", cli.folder / f"{name}.qcow2", f"{name}-kept")
    images = {name: cli.folder / f"{name}.qcow2" for name in made}
    run("qemu-img", "bitmap", "--merge", "other", "-b", images["other"], "-F", "qcow2", images["one"], "one")
    cli.ok("combine", "one-kept", "or", "other-kept")
    cli.ok("export", "one-kept", cli.folder / "ours.qcow2", "--format", "qcow2")
    theirs = qemu_dirty(images["one"], "one", cli.folder)
    assert qemu_dirty(cli.folder / "ours.qcow2", "one-kept", cli.folder) == theirs
    assert theirs == outward(made["one"] + made["other"], size, 65536)


# --- we import what QEMU stores ---


@pytest.mark.parametrize("cluster", [512, 65536])
def test_each_bitmap_of_a_guest_that_was_shut_down_is_read_bit_for_bit(cli: Cli, cluster: int) -> None:
    size = 300 * MIB
    granularities, runs = {"fine": 512, "Wöchentlich, groß": 1 << 20}, random_runs(size, 3)
    image = qemu_image(cli.folder / "guest.qcow2", size, granularities, runs, cluster)
    for number, (name, granularity) in enumerate(granularities.items()):
        cli.ok("import", image, f"kept-{number}", "--bitmap", name)
        cli.ok("export", f"kept-{number}", cli.folder / f"{number}.dbm")
        told = cli.json("inspect", cli.folder / f"{number}.dbm")
        expected = outward(runs, size, granularity)
        assert (told["size"], told["granularity"], told["trust"]) == (size, granularity, "superset")
        assert told["dirty_bytes"] == sum(length for _, length in expected)
        cli.ok("export", f"kept-{number}", cli.folder / f"{number}.qcow2", "--format", "qcow2")
        assert qemu_dirty(cli.folder / f"{number}.qcow2", f"kept-{number}", cli.folder) == expected
    assert "has several bitmaps: 'fine', 'Wöchentlich, groß'" in cli.fails(2, "import", image, "new")
    assert "no bitmap 'fein'" in cli.fails(1, "import", image, "new", "--bitmap", "fein")


@pytest.mark.skipif(not can_make_loop_devices(), reason="loop devices cannot be made here")
def test_an_image_on_a_block_device_is_known_as_one(cli: Cli) -> None:
    """As on logical volumes."""
    with loop_node(cli.folder, 16 * MIB) as device:
        run("qemu-img", "create", "-q", "-f", "qcow2", device, str(8 * MIB))
        run("qemu-img", "bitmap", "--add", device, "b0")
        write(device, [(MIB, 64 * KIB)])
        assert cli.json("import", device, "kept")["dirty_bytes"] == 64 * KIB
        assert f"{device} looks like a qcow2 image" in cli("add", "sda", device).err


def test_changes_that_qemu_recorded_go_into_a_tracked_disk(cli: Cli) -> None:
    """As of a guest that moves from QEMU's tracking to ours: its next increment holds them too."""
    runs = [(5 * MIB, 64 * KIB), (9 * MIB, 512)]
    image = qemu_image(cli.folder / "guest.qcow2", 16 * MIB, {"b0": 65536}, runs)
    marked_disk(cli, "sda", 16 * MIB, 65536, [(0, 512)])
    cli.ok("import", image, "qemu", "--into", "sda")
    assert changed(cli, "sda") == [(0, 64 * KIB), (5 * MIB, 64 * KIB), (9 * MIB, 64 * KIB)]


def test_what_qemu_cut_off_a_disk_does_not_come_back_with_its_growth(cli: Cli) -> None:
    """Nor is a byte of the image changed by reading it."""
    image = qemu_image(cli.folder / "guest.qcow2", 16 * MIB, {"b0": 65536}, [(MIB, 512), (10 * MIB, 6 * MIB)])
    found = []
    for size, option in (
        (12 * MIB - 512, "--shrink"),
        (16 * MIB, "--preallocation=off"),
        (5 * MIB, "--shrink"),
    ):
        run("qemu-img", "resize", "-q", option, image, str(size))
        expected, before = qemu_dirty(image, "b0", cli.folder), image.read_bytes()
        kept, ours = f"kept-{size}", cli.folder / f"{size}.qcow2"
        cli.ok("import", image, kept)
        cli.ok("export", kept, ours, "--format", "qcow2")
        assert qemu_dirty(ours, kept, cli.folder) == expected
        assert image.read_bytes() == before
        found.append([length for _, length in expected])
    assert found == [[65536, 2 * MIB - 512], [65536, 2 * MIB], [65536]]


def test_a_bitmap_of_a_program_that_was_killed_is_trusted_by_nobody(cli: Cli) -> None:
    image = qemu_image(cli.folder / "guest.qcow2", 16 * MIB, {"b0": 65536}, [(0, MIB)])
    with running(image, cli.folder) as child:
        child.process.send_signal(signal.SIGKILL)
        child.wait()
    assert "in-use" in qemu_info(image)[0]["flags"]
    said = cli.fails(3, "import", image, "kept")
    assert "bitmap 'b0' was not stored when its program ended, or is in use" in said
    cli.ok("import", image, "kept", "--all-dirty")
    assert cli.json("ls")["bitmaps"][0]["dirty_bytes"] == 16 * MIB


def test_an_image_is_not_read_while_a_guest_runs_on_it(cli: Cli) -> None:
    image = qemu_image(cli.folder / "guest.qcow2", 16 * MIB, {"b0": 65536}, [(0, MIB)])
    with running(image, cli.folder):
        assert "guest.qcow2" in cli.fails(4, "import", image, "kept")
    cli.ok("import", image, "kept")


def test_bits_are_not_taken_from_an_image_that_a_guest_without_locks_changes_meanwhile(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU stores the bitmap elsewhere then, and the guest's zeroes lie where its bits were."""
    image = qemu_image(cli.folder / "guest.qcow2", GIB, {"b0": 512}, [(0, 512), (900 * MIB, 512)])
    options = f"driver=qcow2,file.driver=file,file.locking=off,file.filename={image}"

    def read_slowly(*words: Any) -> Iterator[tuple[int, bytes]]:
        parts = bitmaps.bits_of(*words)
        yield next(parts)
        run("qemu-io", "--image-opts", options, "-c", "write -q 1M 4k", "-c", "write -q -P 0 300M 2M")
        yield from parts

    monkeypatch.setattr(in_qcow2, "bits_of", read_slowly)
    assert "guest.qcow2 was written while it was read" in cli.fails(4, "import", image, "kept")
    assert cli.json("ls")["bitmaps"] == []
    monkeypatch.undo()
    assert cli.json("import", image, "kept")["dirty_bytes"] == 2 * 512 + 4 * KIB + 2 * MIB


@contextlib.contextmanager
def running(image: Path, folder: Path) -> Iterator[Child]:
    """A program that has the image open to write to it."""
    socket = folder / "running.sock"
    with spawn("qemu-nbd", "--persistent", "--format=qcow2", f"--socket={socket}", image) as child:
        wait_for_socket(socket, child)  # it listens before it opens the image
        run("nbdinfo", "--size", f"nbd+unix:///?socket={socket}")
        yield child


def test_bitmaps_that_another_program_wrote_past_are_out_of_date(cli: Cli) -> None:
    """It clears the autoclear feature, as it does not know what that is."""
    image = qemu_image(cli.folder / "guest.qcow2", 16 * MIB, {"b0": 65536}, [(0, MIB)])
    with image.open("r+b") as file:
        file.seek(95)
        file.write(b"\0")
    said = cli.fails(3, "import", image, "kept")
    assert "a program that knows nothing of its bitmaps has written to it" in said
    assert said.endswith("; qemu-img check -r leaks gives their room back")
    leaky = run("qemu-img", "check", image, check=False)
    assert "leaked clusters were found" in leaky.stdout
    run("qemu-img", "check", "-q", "-r", "leaks", image)
    check(image)
    assert "has no bitmap" in cli.fails(1, "import", image, "kept")


def test_the_bitmap_of_a_disk_without_bytes_is_not_exported_as_qemu_opens_no_image_with_one(cli: Cli) -> None:
    image = cli.folder / "sda.qcow2"
    marked_disk(cli, "sda", 0, 65536, [])
    said = cli.fails(2, "export", "sda", image, "--since", "never-wrong", "--format", "qcow2")
    assert "'sda' has a bitmap of 0 bytes" in said
    assert not image.exists()


def test_what_is_advised_for_an_image_that_is_not_read_keeps_its_bitmaps(cli: Cli) -> None:
    image, plain = cli.folder / "guest.qcow2", cli.folder / "plain.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "extended_l2=on", image, str(16 * MIB))
    run("qemu-img", "bitmap", "--add", image, "b0")
    write(image, [(MIB, MIB)])
    advised = "make a plain copy with qemu-img convert -O qcow2 (and --bitmaps if it has any) and use that"
    assert cli.fails(1, "import", image, "kept").endswith(f"extended L2 entries; {advised}")
    run("qemu-img", "convert", "-O", "qcow2", "--bitmaps", image, plain)
    assert cli.json("import", plain, "kept")["dirty_bytes"] == MIB


def test_the_limit_is_qemus(tmp_path: Path) -> None:
    """The largest bitmap that it stores is the largest that we write; at the next size it refuses too."""
    assert bitmaps.MAX_BITS_BYTES * 8 * 512 == 2 << 40
    path = tmp_path / "large.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", path, str(2 << 40))
    run("qemu-img", "bitmap", "--add", "-g", "512", path, "fits")
    run("qemu-img", "create", "-q", "-f", "qcow2", path, str((2 << 40) + 512))
    refused = run("qemu-img", "bitmap", "--add", "-g", "512", path, "larger", check=False)
    assert refused.returncode != 0
