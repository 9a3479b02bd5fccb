"""verify: what is sound, what is damaged, and by which exit code a script can tell."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Cli
from tests.cli.test_backups import _write, repository
from tests.unit.test_verify import flip

__all__ = ["repository"]

KIB = 1 << 10


@pytest.fixture
def chain(cli: Cli, repository: Path) -> Path:
    """Four backups of disk `sda`, each with another block."""
    for number in range(1, 4):
        _write(cli, number * 64 * KIB, bytes([number]) * 64 * KIB)
        cli.ok("backup", "sda", repository)
    return repository


def test_sound_backups_are_called_sound(cli: Cli, chain: Path) -> None:
    said = cli.ok("verify", chain)
    assert said.startswith("sda: 4 images sound · ")
    assert cli.ok("verify", chain, "sda", "--at", "1").startswith("sda: 1 image sound · ")
    told = cli.json("verify", chain)
    stored = sum(path.stat().st_size for path in (chain / "sda").glob("*.qcow2"))
    assert told == {
        "sound": True, "disks": ["sda"], "images": 4, "bytes_read": stored, "flaw_count": 0, "flaws": [],
        "seconds": told["seconds"],
    }  # fmt: skip


def test_a_flipped_bit_is_named_and_the_exit_code_is_1(cli: Cli, chain: Path) -> None:
    image = chain / "sda" / "000002-incremental.qcow2"
    flip(image, 70 * KIB)
    size = image.stat().st_size
    done = cli("verify", chain)
    assert done.code == 1
    assert done.out.splitlines()[0] == (
        f"sda backup 2: {image}: bytes 0..{size}: the data is not what was backed up"
    )
    assert done.out.splitlines()[1].startswith("sda: 4 images, 1 flaw · ")
    assert f"{chain}: expected sound backups, found 1 flaw; " in done.err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["sdx"], 1, "has no backup of a disk called 'sdx'; name another: it has backups of sda"),
        (["sda", "--at", "9"], 1, "has no backup 9"),
        (["--at", "1"], 2, "of which disk; name the disk too"),
        (["../sda"], 2, "starts with . or -"),
    ],
)
def test_what_cannot_be_verified_is_told(
    cli: Cli, repository: Path, words: list[str], code: int, said: str
) -> None:
    assert said in cli.fails(code, "verify", repository, *words)


def test_a_folder_without_backups_is_told(cli: Cli) -> None:
    (cli.folder / "empty").mkdir()
    assert "has no backups; name a repository" in cli.fails(1, "verify", cli.folder / "empty")
    assert "does not exist" in cli.fails(1, "verify", cli.folder / "none")
