"""Verbs about a repository of backups as a whole: verify, prune, copy; and the listing of `ls REPO`.

They import what they need when they run, as in backups.py.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from lmdbitmap.cli.facts import entry_facts
from lmdbitmap.cli.failing import ending_as, failure_facts
from lmdbitmap.cli.options import FOLDER, Session, verb
from lmdbitmap.cli.output import progress, say, say_json, say_table
from lmdbitmap.cli.politeness import waiting
from lmdbitmap.cli.sizes import format_duration, format_size, format_time, iso_time
from lmdbitmap.errors import FormatError

if TYPE_CHECKING:
    from lmdbitmap.repository.manifest import BackupEntry, Manifest
    from lmdbitmap.repository.prune import PruneResult
    from lmdbitmap.repository.transfer import CopyResult
    from lmdbitmap.repository.verify import Flaw, VerifyResult
    from lmdbitmap.work.disks_failed import DisksFailed


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


@verb(
    examples=["lmdbitmap verify /srv/backups", "lmdbitmap verify /srv/backups sda --at 3"],
)
@click.argument("repository", metavar="REPO", type=FOLDER)
@click.argument("name", required=False)
@click.option(
    "--at",
    metavar="BACKUP|TIME",
    help="Only what a restore of that backup needs; named as for `restore`. [default: all]",
)
@click.pass_obj
def verify(asked: Session, repository: str, name: str | None, at: str | None) -> None:
    """Prove backups by their digests, without restoring them.

    Reads every byte of every image of all disks or of one, and checks the images' structure. Damage is reported by
    file and bytes. Nothing is changed. Exit code 1: something is damaged, or its digests cannot be computed here.
    """
    from lmdbitmap.repository.verify import verify as prove

    with progress("verifying", shown=asked.shows_progress) as report:
        result = prove(repository, name, at=at, progress=report)
    if asked.as_json:
        say_json(_verify_facts(result))
    else:
        for flaw in result.flaws:
            whose = flaw.disk if flaw.backup is None else f"{flaw.disk} backup {flaw.backup}"
            say(f"{whose}: {flaw.problem}" + (f"; {flaw.next_step}" if flaw.next_step else ""))
        say(_verify_words(result))
    if not result.is_sound:
        raise FormatError(
            repository,
            expected="sound backups",
            found=plural(result.flaw_count, "flaw"),
            next_step=_step_after(result),
        )


def _step_after(result: VerifyResult) -> str:
    if all(flaw.next_step for flaw in result.flaws):
        return "do what each line above says"
    return "get the files that are named from a copy of the repository, or begin a new chain: `backup --full`"


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
        "offset": flaw.offset, "length": flaw.length, "next_step": flaw.next_step,
    }  # fmt: skip


# --- prune ---

_COUNT = click.IntRange(min=1)


@verb(
    undoes=True,
    examples=[
        "lmdbitmap prune /srv/backups --keep 30",
        "lmdbitmap prune /srv/backups sda --keep-daily 7 --keep-weekly 5 --keep-monthly 12 --dry-run",
        "lmdbitmap prune /srv/backups sda --drop 3",
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
@click.option(
    "--drop",
    "drop",
    multiple=True,
    metavar="BACKUP",
    help="Remove the backup with this number, whatever the rules say; without rules all others stay. May be repeated.",
)
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@waiting("another run that uses REPO")
@click.pass_obj
def prune(
    asked: Session,
    repository: str,
    names: Sequence[str],
    last: int | None,
    daily: int | None,
    weekly: int | None,
    monthly: int | None,
    drop: Sequence[str],
    dry_run: bool,
    lock_wait: float,
) -> None:
    """Remove old backups of all disks in REPO, or of some.

    A backup stays if one of the rules keeps it; days without a backup do not count. A backup that stays is merged with
    the removed ones below it, without the disk and the store, and reads as before. Merging needs room for the images
    that are being written. If a disk fails, it is reported at the end, and the others are pruned.
    """
    from lmdbitmap.repository.prune import PrunesFailed
    from lmdbitmap.repository.prune import prune as let_go
    from lmdbitmap.repository.retention import Retention

    counts = [count or 0 for count in (last, daily, weekly, monthly)]
    keep = Retention(*counts) if any(counts) or not drop else None
    failed: DisksFailed | None = None
    results: Sequence[PruneResult]
    with progress("pruning", shown=asked.shows_progress) as report:
        try:
            results = let_go(
                repository,
                names or None,
                keep=keep,
                drop=drop,
                dry_run=dry_run,
                lock_wait_s=lock_wait,
                progress=report,
            )
        except PrunesFailed as some:
            results, failed = some.results, some
    with ending_as(failed, "not pruned"):
        if asked.as_json:
            facts = {
                "dry_run": dry_run,
                "disks": [*map(_prune_facts, results)],
                "failures": failure_facts(failed),
            }
            say_json(facts)
        else:
            _say_pruned(results, dry_run)


def _say_pruned(results: Sequence[PruneResult], dry_run: bool) -> None:
    for result in results:
        for entry in result.removed if dry_run else ():
            say(f"{result.disk}: would remove backup {_entry_words(entry)}")
        for entry in result.kept if dry_run else ():
            merged = ", merged with what it is stacked on" if entry.id in result.rewritten else ""
            say(f"{result.disk}: would keep backup {_entry_words(entry)}{merged}")
        say(f"{result.disk}: {_prune_words(result)}")


def _entry_words(entry: BackupEntry) -> str:
    return f"{entry.id} of {format_time(entry.time_ns)}, {entry.type_actual.value}"


def _prune_words(result: PruneResult) -> str:
    if result.bytes_after is None:
        return f"would keep {len(result.kept):,} and remove {len(result.removed):,}"
    words = [
        f"kept {plural(len(result.kept), 'backup')}, removed {len(result.removed):,}",
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


# --- copy ---


@verb(
    undoes=True,
    examples=[
        "lmdbitmap copy /srv/backups /mnt/usb/backups",
        "lmdbitmap copy /srv/backups /mnt/usb/backups sda",
    ],
)
@click.argument("repository", metavar="REPO", type=FOLDER)
@click.argument("target", metavar="REPO2", type=FOLDER)
@click.argument("names", metavar="[NAME…]", nargs=-1)
@waiting("another run that uses REPO2")
@click.pass_obj
def copy(asked: Session, repository: str, target: str, names: Sequence[str], lock_wait: float) -> None:
    """Copy backups of all disks, or of some, to another repository.

    Backups that REPO2 has already are not copied again, also after a copy that was killed. Nothing in REPO2 is changed
    or removed: each repository is pruned by itself. Every image is proven by its digest. REPO2 must not hold backups of
    these disks that REPO never had. If a disk fails, it is reported at the end, and the others are copied.
    """
    from lmdbitmap.repository.transfer import CopiesFailed, copy_backups

    failed: DisksFailed | None = None
    results: Sequence[CopyResult]
    with progress("copying", shown=asked.shows_progress) as report:
        try:
            results = copy_backups(repository, target, names or None, lock_wait_s=lock_wait, progress=report)
        except CopiesFailed as some:
            results, failed = some.results, some
    with ending_as(failed, "not copied"):
        if asked.as_json:
            say_json({"disks": [*map(_copy_facts, results)], "failures": failure_facts(failed)})
        else:
            for result in results:
                say(f"{result.disk}: {_copy_words(result)}")


def _copy_words(result: CopyResult) -> str:
    counts = [
        f"copied {plural(len(result.copied), 'backup')}, {result.already_there:,} were there already",
        f"{result.only_there:,} are only there" if result.only_there else "",
        f"{result.left_out:,} had been removed there" if result.left_out else "",
    ]
    words = [
        ", ".join(filter(None, counts)),
        format_size(result.bytes_copied),
        format_duration(result.seconds),
    ]
    return " · ".join(words)


def _copy_facts(result: CopyResult) -> dict[str, object]:
    return {
        "disk": result.disk,
        "copied": [entry.id for entry in result.copied],
        "already_there": result.already_there,
        "only_there": result.only_there,
        "left_out": result.left_out,
        "bytes_copied": result.bytes_copied,
        "seconds": round(result.seconds, 3),
    }


# --- ls REPO ---

_HEADINGS = ("disk", "backup", "time", "type", "size", "changed", "stored", "chain", "trust")


def list_backups(asked: Session, repository: str) -> None:
    """Print all restore points of a repository; a disk whose manifest cannot be read is reported after the others."""
    from lmdbitmap.repository.repository import folders_of, folders_with_backups
    from lmdbitmap.work.disks_failed import DisksFailed
    from lmdbitmap.work.failures import Failures

    folders = folders_of(repository)
    failures = Failures(at_once=len(folders) == 1)
    known = folders_with_backups(folders, failures, named=False)
    failed = DisksFailed("listed", len(known), failures.errors) if failures.errors else None
    listed = [(folder.disk_name, manifest, _depths(manifest)) for folder, manifest in known]
    with ending_as(failed, "not listed"):
        if asked.as_json:
            disks = [
                {
                    "disk": name,
                    "backups": [
                        {**entry_facts(entry), "chain_depth": depths[entry.id]} for entry in manifest.backups
                    ],
                }
                for name, manifest, depths in listed
            ]
            place = os.path.abspath(repository)
            say_json({"repository": place, "disks": disks, "failures": failure_facts(failed)})
        else:
            rows = [
                _point_row(name, entry, depths[entry.id])
                for name, manifest, depths in listed
                for entry in manifest.backups
            ]
            say_table(_HEADINGS, rows, right=("backup", "size", "changed", "stored", "chain"))


def _depths(manifest: Manifest | None) -> dict[str, int]:
    """Return how many images each backup is made of, by its id."""
    depths: dict[str, int] = {}
    for entry in manifest.backups if manifest is not None else ():
        depths[entry.id] = 1 if entry.parent is None else depths[entry.parent] + 1
    return depths


def _point_row(disk: str, entry: BackupEntry, depth: int) -> list[str]:
    return [
        disk,
        entry.id,
        format_time(entry.time_ns),
        entry.type_actual.value,
        format_size(entry.disk_size),
        format_size(entry.bytes_changed),
        format_size(entry.bytes_stored),
        f"{depth:,}",
        entry.trust.value,
    ]
