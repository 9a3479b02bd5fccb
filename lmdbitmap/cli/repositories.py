"""Verbs about a repository of backups as a whole: verify.

What they need is imported when they run, as in backups.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from lmdbitmap.cli.options import Session, verb
from lmdbitmap.cli.output import progress, say, say_json
from lmdbitmap.cli.sizes import format_duration, format_size
from lmdbitmap.errors import FormatError

if TYPE_CHECKING:
    from lmdbitmap.verify import Flaw, VerifyResult

FOLDER = click.Path(file_okay=False)


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


@verb(
    examples=["lmdbitmap verify /srv/backups", "lmdbitmap verify /srv/backups sda --at 3"],
)
@click.argument("repository", metavar="REPO", type=FOLDER)
@click.argument("name", required=False)
@click.option(
    "--at", metavar="BACKUP", help="Only what a restore of the backup with this number needs. [default: all]"
)
@click.pass_obj
def verify(asked: Session, repository: str, name: str | None, at: str | None) -> None:
    """Prove backups by their digests, without restoring them.

    Every byte of every image is read, and its structure is looked at: of all disks, or of one. What is damaged is
    told by file and bytes. Nothing is changed. Exit code 1: something is damaged.
    """
    from lmdbitmap.verify import verify as prove

    with progress("verifying", shown=asked.shows_progress) as report:
        result = prove(repository, name, at=at, progress=report)
    if asked.as_json:
        say_json(_verify_facts(result))
    else:
        for flaw in result.flaws:
            whose = flaw.disk if flaw.backup is None else f"{flaw.disk} backup {flaw.backup}"
            say(f"{whose}: {flaw.problem}")
        say(_verify_words(result))
    if not result.is_sound:
        raise FormatError(
            repository,
            expected="sound backups",
            found=plural(result.flaw_count, "flaw"),
            next_step="get the files that are named from a copy of the repository, or make a full backup",
        )


def _verify_words(result: VerifyResult) -> str:
    words = [
        f"{', '.join(result.disks) or 'no disk'}: {plural(result.image_count, 'image')}"
        + (" sound" if result.is_sound else f", {plural(result.flaw_count, 'flaw')}"),
        f"{format_size(result.bytes_read)} read",
        format_duration(result.seconds),
    ]
    return " · ".join(words)


def _verify_facts(result: VerifyResult) -> dict[str, object]:
    return {
        "sound": result.is_sound,
        "disks": list(result.disks),
        "images": result.image_count,
        "bytes_read": result.bytes_read,
        "flaw_count": result.flaw_count,
        "flaws": [*map(_flaw_facts, result.flaws)],
        "seconds": round(result.seconds, 3),
    }


def _flaw_facts(flaw: Flaw) -> dict[str, object]:
    return {
        "disk": flaw.disk, "backup": flaw.backup, "file": flaw.path, "problem": flaw.problem,
        "offset": flaw.offset, "length": flaw.length,
    }  # fmt: skip
