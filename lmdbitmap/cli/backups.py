"""Verbs that back up a disk and restore it: backup, restore.

They import what they need when they run, so that the other verbs start in two thirds of the time.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import click

from lmdbitmap.cli.descriptors import allow_many_descriptors
from lmdbitmap.cli.facts import entry_facts, reason_facts
from lmdbitmap.cli.failing import ending_as, failure_facts
from lmdbitmap.cli.kinds import of_a_kind
from lmdbitmap.cli.options import FILE_OR_DEVICE, Session, at_backup, verb
from lmdbitmap.cli.output import progress, say, say_json
from lmdbitmap.cli.politeness import nice_after, owner_limited, polite, waiting
from lmdbitmap.cli.quiesce import Hook, Thaw, hooked
from lmdbitmap.cli.sizes import format_duration, format_size, format_time, iso_time
from lmdbitmap.cli.streams import (
    STDIN,
    StreamOptions,
    folder_or_stdin,
    require_stream_in,
    require_stream_out,
    stream_in,
    stream_out,
    words_of_what_is_behind,
)
from lmdbitmap.errors import LmdbitmapError, NotFound
from lmdbitmap.images.image import is_far
from lmdbitmap.store import Store

if TYPE_CHECKING:
    from lmdbitmap.backups.result import BackupResult, BackupsFailed
    from lmdbitmap.repository.manifest import BackupEntry
    from lmdbitmap.restoring.restore import RestoreResult


@verb(
    undoes=True,
    examples=[
        "lmdbitmap backup sda /srv/backups",
        "lmdbitmap backup sda sdb /srv/backups --full --compress zstd",
        "lmdbitmap backup sda /srv/backups --take-over",
        "lmdbitmap backup sda --stdout --since monday --checkpoint tuesday | rbd import-diff - pool/sda",
    ],
)
@click.argument("words", metavar="NAME… REPO", nargs=-1, required=True)
@of_a_kind
@click.option(
    "--require-incremental", "only_that", is_flag=True,
    help="Fail with exit code 3 if the backup cannot be of the kind that was asked for.",
)  # fmt: skip
@hooked("NAME…")
@polite
@owner_limited
@waiting("another run that uses REPO, or a program that has a disk for itself,")
@click.option(
    "--compress", metavar="zlib|zstd[:LEVEL]",
    help="Compress what is stored, as QEMU reads it: zlib everywhere (level 1 to 9, [6]), zstd faster (1 to 22, [3]).",
)  # fmt: skip
@click.option(
    "--digest", type=click.Choice(["sha256", "blake3"]),
    help="The digest that proves each MiB. blake3 is faster, and needs the extra [fast] wherever digests are made or"
    " proven. [default: as the backup before; for a new chain blake3, if it is installed]",
)  # fmt: skip
@click.option(
    "--take-over", is_flag=True,
    help="Go on with backups in REPO that were made of these very disks while another store tracked them, or before"
    " they were added anew. The disks are compared with them.",
)  # fmt: skip
@click.option(
    "--new-repository", is_flag=True,
    help="Begin a new repository although disks were backed up to REPO before, and it is empty now. Without this option"
    " that is refused: the file system of REPO may not be mounted.",
)  # fmt: skip
@click.option(
    "--stdout",
    "to_stdout",
    is_flag=True,
    help="Instead of REPO: one disk, as a diff stream to standard output.",
)
@click.option("--since", metavar="CHECKPOINT", help="With --stdout: what changed since then. [default: all]")
@click.option("--checkpoint", metavar="NEW", help="With --stdout: what the point in time is to be called.")
@click.option(
    "--diff-version",
    type=click.Choice(["1", "2"]),
    help="With --stdout: `rbd import-diff` reads 1. [default: 1]",
)
@click.pass_obj
def backup(
    asked: Session, words: Sequence[str], kind: str, only_that: bool, hook: Hook, nice: int, speed_limit: int | None,
    owner_limit: float, lock_wait: float, compress: str | None, digest: str | None, take_over: bool,
    new_repository: bool, to_stdout: bool, since: str | None, checkpoint: str | None, diff_version: str | None,
) -> None:  # fmt: skip
    """Back up disks while their guests keep writing.

    All disks are copied as of one point in time, each into its own folder in REPO, as a chain of qcow2 images. Several
    disks must all be unserved, or all served by one process. If one disk fails, it is reported at the end; the others
    are backed up.

    If it is not known what changed, the disk is compared with its last backup, and the answer says why.

    With --stdout one disk goes to standard output, in the format of `rbd export-diff`. Its new checkpoint stays: the
    next stream counts from it.
    """
    options = StreamOptions(since, checkpoint, diff_version)
    if to_stdout:
        require_stream_out()
        if len(words) > 1:
            raise click.UsageError("--stdout takes one NAME, and no REPO.")
        stream_out(asked, words[0], options, hook, nice, owner_limit, lock_wait)
        return
    options.require_none()
    if len(words) < 2:
        raise click.UsageError("Missing argument 'REPO'.")
    wishes = _Wishes(
        kind, only_that, compress, digest, hook, nice, speed_limit, owner_limit, lock_wait, take_over,
        new_repository,
    )  # fmt: skip
    _back_up(asked, words[:-1], words[-1], wishes)


class _Wishes(NamedTuple):
    """The options of a backup into a repository."""

    kind: str
    only_that: bool
    compress: str | None
    digest: str | None
    hook: Hook
    nice: int
    speed_limit: int | None
    owner_limit_s: float
    lock_wait_s: float
    take_over: bool
    new_repository: bool


def _back_up(asked: Session, names: Sequence[str], repository: str, wishes: _Wishes) -> None:
    from lmdbitmap.backups.backup import backup as back_up
    from lmdbitmap.backups.result import BackupsFailed
    from lmdbitmap.repository.manifest import BackupType

    if asked.owns_process:
        allow_many_descriptors()
    thaw = Thaw()
    made: Sequence[BackupResult]
    failed: BackupsFailed | None = None
    with (
        Store.open(asked.store_path) as store,
        progress(f"backing up {', '.join(names)}", shown=asked.shows_progress) as report,
    ):
        try:
            made = back_up(
                store, names, repository,
                kind=BackupType(wishes.kind), only_that=wishes.only_that, compression=wishes.compress,
                digest=wishes.digest,
                quiesced=lambda: nice_after(
                    wishes.hook.freezing(names, thaw), wishes.nice, asked,
                    served=lambda: _is_any_served(store, names),
                ), progress=report,
                freeze_limit_s=wishes.hook.freeze_limit_s, owner_limit_s=wishes.owner_limit_s,
                lock_wait_s=wishes.lock_wait_s,
                bytes_per_s=wishes.speed_limit, take_over=wishes.take_over, new_repository=wishes.new_repository,
            )  # fmt: skip
        except BackupsFailed as some:
            made, failed = some.results, some
    _tell(asked, made, failed, thaw)


def _is_any_served(store: Store, names: Sequence[str]) -> bool:
    from lmdbitmap.access.owners import is_served

    for name in names:
        with contextlib.suppress(LmdbitmapError):  # the backup itself reports an unknown disk
            if is_served(store, name):
                return True
    return False


def _tell(asked: Session, made: Sequence[BackupResult], failed: BackupsFailed | None, thaw: Thaw) -> None:
    """Report each disk; then raise if a disk has no backup, or if a guest may still be frozen."""
    with ending_as(failed, "not backed up", thaw.require):
        if asked.as_json:
            facts = [_backup_facts(result) for result in made]
            say_json({"backups": facts, "failures": failure_facts(failed), "thaw_failure": thaw.problem})
        else:
            for result in made:
                say(f"{result.disk}: {_backup_words(result)}")


def _backup_words(result: BackupResult) -> str:
    entry = result.entry
    words = [
        entry.type_actual.value + ("" if entry.reason is None else f": {entry.reason.words}"),
        f"{format_size(entry.bytes_changed)} of {format_size(entry.disk_size)}",
        f"{format_size(entry.bytes_stored)} stored {_how(entry)}in {entry.file}",
        f"{format_size(result.bytes_read)} read",
        format_duration(result.seconds),
    ]
    if result.digest_reason is not None:
        words.append(f"its digests are {entry.digest_algorithm.title}: {result.digest_reason.words}")
    return " · ".join(words)


def _how(entry: BackupEntry) -> str:
    return "" if entry.compression is None else f"with {entry.compression.value} "


def _backup_facts(result: BackupResult) -> dict[str, object]:
    return {
        "disk": result.disk,
        **entry_facts(result.entry),
        "file": result.path,
        "bytes_read": result.bytes_read,
        "digest_reason": reason_facts(result.digest_reason),
        "seconds": round(result.seconds, 3),
    }


@verb(
    undoes=True,
    examples=[
        "lmdbitmap restore /srv/backups sda sda-restored.raw",
        "lmdbitmap restore /srv/backups sda sda-restored.raw --at 3",
        "lmdbitmap restore /srv/backups sda sda-restored.raw --at '2026-11-29 02:38'",
        "lmdbitmap restore - sda-received.raw",
        "lmdbitmap restore /srv/backups sda /srv/images/sda.raw --in-place",
        "lmdbitmap restore /srv/backups sda nbd://other-host/sda",
    ],
)
@click.argument("repository", metavar="REPO", type=folder_or_stdin)
@click.argument("name", metavar="NAME", required=False)
@click.argument("out", metavar="OUT", type=FILE_OR_DEVICE, required=False)
@at_backup("go back to")
@click.option(
    "--in-place", is_flag=True,
    help="OUT is there already, and only what differs is written to it. If it is the image of a disk that is tracked,"
    " that goes through the tracker, and the disk's next backup is an increment.",
)  # fmt: skip
@click.option(
    "--larger", is_flag=True,
    help="OUT, if it is there already, may be larger than the disk was; what is behind it is zeroed.",
)  # fmt: skip
@click.option(
    "--no-verify", is_flag=True,
    help="Do not prove what is read by its digests; look at the structure only.",
)  # fmt: skip
@click.pass_obj
def restore(
    asked: Session,
    repository: str,
    name: str | None,
    out: str | None,
    at: str | None,
    in_place: bool,
    larger: bool,
    no_verify: bool,
) -> None:
    """Write a disk out as it was at a backup.

    OUT is a new raw file, which will be sparse, or a block device or the URI of an NBD export of the disk's size. With
    --in-place OUT may also be an existing file. The backup is proven by its digests: while a new file is written, or
    before the first write to any other OUT. The store is only asked whether OUT is tracked.

    With - and OUT alone, standard input is a stream in the format of `rbd export-diff`. A full stream makes a new file.
    A diff changes OUT in place; OUT must be the disk that the diff counts from.
    """
    if repository == STDIN:
        require_stream_in()
        target = _given(name, "OUT")
        with _store_that_may_track(asked, target) as store:
            stream_in(asked, target, store, larger=larger)
        return
    name, out = _given(name, "NAME"), _given(out, "OUT")
    from lmdbitmap.restoring.restore import restore as write_out

    with contextlib.ExitStack() as opened:
        store = opened.enter_context(_store_that_may_track(asked, out))
        report = opened.enter_context(progress(f"restoring {name}", shown=asked.shows_progress))
        result = write_out(
            repository,
            name,
            out,
            at=at,
            verify=not no_verify,
            in_place=in_place,
            larger=larger,
            store=store,
            progress=report,
        )
    if asked.as_json:
        say_json(_restore_facts(name, result))
    else:
        say(f"{out}: {name} as of {_restore_words(result, in_place)}")


def _given(argument: str | None, name: str) -> str:
    if argument is None:
        raise click.UsageError(f"Missing argument '{name}'.")
    return argument


@contextlib.contextmanager
def _store_that_may_track(asked: Session, out: str) -> Iterator[Store | None]:
    """Yield the store if OUT exists, so that it may be tracked. A machine that only keeps backups has no store."""
    with contextlib.ExitStack() as opened:
        store = None
        if is_far(out) or os.path.exists(out):
            with contextlib.suppress(NotFound):
                store = opened.enter_context(Store.open(asked.store_path))
        yield store


def _restore_words(result: RestoreResult, in_place: bool) -> str:
    entry = result.entry
    written, size = format_size(result.bytes_written), format_size(entry.disk_size)
    words = [f"{format_time(entry.time_ns)} (backup {entry.id})"]
    if in_place:
        words += [
            f"{written} written and {format_size(result.bytes_zeroed)} zeroed on {size}",
            f"{format_size(result.bytes_read)} read to compare",
        ]
    else:
        words += [f"{written} of data on {size}"]
    words += words_of_what_is_behind(result.bytes_behind)
    if result.tracked is not None:
        words += [f"tracked as {result.tracked}"]
    return " · ".join([*words, format_duration(result.seconds)])


def _restore_facts(name: str, result: RestoreResult) -> dict[str, object]:
    return {
        "disk": name,
        "file": result.path,
        "backup": result.entry.id,
        "time": iso_time(result.entry.time_ns),
        "size": result.entry.disk_size,
        "bytes_written": result.bytes_written,
        "bytes_zeroed": result.bytes_zeroed,
        "bytes_read": result.bytes_read,
        "bytes_behind": result.bytes_behind,
        "tracked": result.tracked,
        "seconds": round(result.seconds, 3),
    }
