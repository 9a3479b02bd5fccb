"""Verbs about a repository of backups as a whole: verify, prune.

What they need is imported when they run, as in backups.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from lmdbitmap.cli.options import Session, verb
from lmdbitmap.cli.output import progress, say, say_json
from lmdbitmap.cli.sizes import format_duration, format_size, format_time, iso_time
from lmdbitmap.errors import FormatError

if TYPE_CHECKING:
    from lmdbitmap.manifest import BackupEntry
    from lmdbitmap.prune import PruneResult
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


_COUNT = click.IntRange(min=1)


@verb(
    examples=[
        "lmdbitmap prune /srv/backups --keep 30",
        "lmdbitmap prune /srv/backups sda --keep-daily 7 --keep-weekly 5 --keep-monthly 12 --dry-run",
    ],
)
@click.argument("repository", metavar="REPO", type=FOLDER)
@click.argument("names", metavar="[NAME…]", nargs=-1)
@click.option("--keep", "last", type=_COUNT, metavar="N", help="The newest N backups.")
@click.option("--keep-daily", "daily", type=_COUNT, metavar="N", help="The newest backup of each of N days.")
@click.option(
    "--keep-weekly", "weekly", type=_COUNT, metavar="N", help="The newest backup of each of N weeks."
)
@click.option(
    "--keep-monthly", "monthly", type=_COUNT, metavar="N", help="The newest backup of each of N months."
)
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@click.pass_obj
def prune(
    asked: Session,
    repository: str,
    names: Sequence[str],
    last: int | None,
    daily: int | None,
    weekly: int | None,
    monthly: int | None,
    dry_run: bool,
) -> None:
    """Let go of old backups, of all disks in REPO or of some.

    A backup stays if one of the rules wants it; days without a backup do not count. What stays is merged with what
    it was stacked on, without the disk and the store, and reads as before. Merging needs room for the images that
    are being written.
    """
    from lmdbitmap.prune import prune as let_go
    from lmdbitmap.retention import Retention

    keep = Retention(last or 0, daily or 0, weekly or 0, monthly or 0)
    with progress("pruning", shown=asked.shows_progress) as report:
        results = let_go(repository, names, keep=keep, dry_run=dry_run, progress=report)
    if asked.as_json:
        say_json({"dry_run": dry_run, "disks": [*map(_prune_facts, results)]})
        return
    for result in results:
        for entry in result.removed if dry_run else ():
            say(f"{result.disk}: would let go of backup {_entry_words(entry)}")
        for entry in result.kept if dry_run else ():
            merged = ", merged with what it is stacked on" if entry.id in result.rewritten else ""
            say(f"{result.disk}: would keep backup {_entry_words(entry)}{merged}")
        say(f"{result.disk}: {_prune_words(result)}")


def _entry_words(entry: BackupEntry) -> str:
    return f"{entry.id} of {format_time(entry.time_ns)}, {entry.type_actual.value}"


def _prune_words(result: PruneResult) -> str:
    if result.bytes_after is None:
        return f"would keep {len(result.kept):,}, and let go of {len(result.removed):,}"
    words = [
        f"kept {plural(len(result.kept), 'backup')}, let go of {len(result.removed):,}",
        f"merged {len(result.rewritten):,}",
        f"{format_size(result.bytes_before)} before, {format_size(result.bytes_after)} now",
        format_duration(result.seconds),
    ]
    return " · ".join(words)


def _prune_facts(result: PruneResult) -> dict[str, object]:
    return {
        "disk": result.disk,
        "kept": [*map(_kept_facts, result.kept)],
        "removed": [*map(_kept_facts, result.removed)],
        "merged": list(result.rewritten),
        "bytes_before": result.bytes_before,
        "bytes_after": result.bytes_after,
        "seconds": round(result.seconds, 3),
    }


def _kept_facts(entry: BackupEntry) -> dict[str, object]:
    return {"backup": entry.id, "type": entry.type_actual.value, "time": iso_time(entry.time_ns)}
