"""`backup --stdout` and `restore -`: streams through standard output and input."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from lmdbitmap.cli.kinds import KINDS
from lmdbitmap.cli.options import FOLDER, Session
from lmdbitmap.cli.output import progress, say, say_json
from lmdbitmap.cli.politeness import nice_after
from lmdbitmap.cli.quiesce import Hook, Thaw
from lmdbitmap.cli.sizes import format_duration, format_size
from lmdbitmap.store import Store

if TYPE_CHECKING:
    from lmdbitmap.streams.restore import AppliedResult
    from lmdbitmap.streams.stream import StreamResult

STDIN = "-"

_OUT_TAKES = frozenset({
    "words", "to_stdout", "since", "checkpoint", "diff_version", "hook", "hook_limit", "freeze_limit", "nice",
    "owner_limit", "lock_wait", "store", "json",
})  # fmt: skip
_NOT_OUT = {
    **{kind: f"With --stdout, --since says what to count from: leave out --{kind}." for kind in KINDS},
    "only_that": "A stream with --since is an increment or fails: leave out --require-incremental, or --stdout.",
    "speed_limit": "A stream is as fast as its reader: leave out --speed-limit, and limit the reader, as with pv -L.",
    "compress": "A stream is not compressed: lead it through zstd, and leave out --compress, or --stdout.",
    "digest": "A stream has no digests: leave out --digest, or --stdout.",
    "take_over": "A stream has no REPO: leave out --take-over.",
    "new_repository": "A stream has no REPO: leave out --new-repository.",
}
_IN_TAKES = frozenset({"repository", "name", "larger", "store", "json"})
_NOT_IN = {
    "out": "With - only OUT is named, and no NAME: a stream has one disk.",
    "at": "A stream has one point in time: leave out --at.",
    "in_place": "The stream itself says whether it is a whole disk or changes OUT in place: leave out --in-place.",
    "no_verify": "A stream has no digests to prove it by: leave out --no-verify.",
}


def folder_or_stdin(text: str) -> str:
    """Return a folder's path as `FOLDER` does, or `-`, whatever has that name; for `type=`."""
    return text if text == STDIN else str(FOLDER(text))


def require_stream_out() -> None:
    """Raise `UsageError` for an option that a backup to standard output would ignore."""
    _refuse_others(_OUT_TAKES, _NOT_OUT)


def require_stream_in() -> None:
    """Raise `UsageError` for an option that a restore from standard input would ignore."""
    _refuse_others(_IN_TAKES, _NOT_IN)


def _refuse_others(taken: frozenset[str], refused: Mapping[str, str]) -> None:
    """Raise `UsageError` for every given option that is not in `taken`, also for those not in `refused`."""
    context = click.get_current_context()
    for option in context.command.params:
        assert option.name is not None
        given = context.get_parameter_source(option.name) is ParameterSource.COMMANDLINE
        if given and option.name not in taken:
            unknown = f"{option.opts[-1]} means nothing to a stream: leave it out."
            raise click.UsageError(refused.get(option.name, unknown))


@dataclass(frozen=True)
class StreamOptions:
    """The options that only a backup to standard output has."""

    since: str | None
    checkpoint: str | None
    version: str | None

    def require_none(self) -> None:
        options = {"--since": self.since, "--checkpoint": self.checkpoint, "--diff-version": self.version}
        given = [name for name, value in options.items() if value is not None]
        if given:
            belong = "belongs" if len(given) == 1 else "belong"
            raise click.UsageError(f"{' and '.join(given)} {belong} to a backup with --stdout.")


def stream_out(
    asked: Session, name: str, options: StreamOptions, hook: Hook, nice: int, owner_limit_s: float,
    lock_wait_s: float,
) -> None:  # fmt: skip
    """Stream a disk to standard output; everything else is printed on stderr."""
    from lmdbitmap.access.owners import is_served
    from lmdbitmap.streams.stream import stream_backup

    thaw = Thaw()
    with (
        _standard(1, "wb") as out,
        Store.open(asked.store_path) as store,
        progress(f"streaming {name}", shown=asked.shows_progress) as report,
    ):
        made = stream_backup(
            store, name, out,
            since=options.since, checkpoint=options.checkpoint, version=int(options.version or 1),
            quiesced=lambda: nice_after(
                hook.freezing([name], thaw), nice, asked, served=lambda: is_served(store, name)
            ),
            progress=report,
            owner_limit_s=owner_limit_s, freeze_limit_s=hook.freeze_limit_s, lock_wait_s=lock_wait_s,
        )  # fmt: skip
    if asked.as_json:
        say_json({**_stream_facts(made), "thaw_failure": thaw.problem}, aside=True)
    else:
        say(f"{name}: {_stream_words(made)}", aside=True)
    thaw.require()


def _stream_words(made: StreamResult) -> str:
    counts = made.streamed
    words = [
        "full" if made.since is None else f"changes since {made.since}",
        f"{format_size(counts.bytes_changed)} of {format_size(made.size)}",
        f"{format_size(counts.bytes_streamed)} streamed",
        f"checkpoint {made.checkpoint}",
        format_duration(made.seconds),
    ]
    return " · ".join(words)


def _stream_facts(made: StreamResult) -> dict[str, object]:
    return {
        "disk": made.disk,
        "since": made.since,
        "checkpoint": made.checkpoint,
        "size": made.size,
        "trust": made.trust.value,
        **made.streamed._asdict(),
        "seconds": round(made.seconds, 3),
    }


def stream_in(asked: Session, out: str, store: Store | None, *, larger: bool) -> None:
    from lmdbitmap.streams.restore import apply_stream

    with (
        _standard(0, "rb") as stream,
        progress(f"restoring {out}", shown=asked.shows_progress) as report,
    ):
        made = apply_stream(stream, out, larger=larger, store=store, progress=report)
    if asked.as_json:
        say_json(_applied_facts(made))
    else:
        say(_applied_words(made))


def _applied_words(made: AppliedResult) -> str:
    head = made.head
    since = "" if head.from_name is None else f", changed since {head.from_name}"
    words = [
        f"{made.path}: as of {head.to_name or 'a moment without a name'}{since}",
        f"{format_size(made.bytes_written)} of data on {format_size(head.size)}",
        *words_of_what_is_behind(made.bytes_behind),
        format_duration(made.seconds),
    ]
    return " · ".join(words)


def words_of_what_is_behind(length: int) -> list[str]:
    """Return the words for the zeroed rest of a target that is larger than the disk."""
    return [f"zeroes on the {format_size(length)} behind it"] if length else []


def _applied_facts(made: AppliedResult) -> dict[str, object]:
    head = made.head
    return {
        "file": made.path,
        "size": head.size,
        "since": head.from_name,
        "checkpoint": head.to_name,
        "diff_version": head.version,
        "bytes_written": made.bytes_written,
        "bytes_zero": made.bytes_zero,
        "bytes_behind": made.bytes_behind,
        "seconds": round(made.seconds, 3),
    }


def _standard(descriptor: int, mode: str) -> io.FileIO:
    """Return standard input or output without a buffer; raise `UsageError` if it is a terminal, or was closed."""
    if (sys.__stdin__, sys.__stdout__)[descriptor] is None:  # /dev/null is in its place (main.py)
        name = ("input", "output")[descriptor]
        raise click.UsageError(f"Standard {name} is closed; lead the stream into a pipe or a file.")
    if os.isatty(descriptor):
        where = "into a pipe or a file" if descriptor else "out of a pipe or a file"
        raise click.UsageError(f"The stream is for programs, and this is a terminal; lead it {where}.")
    os.set_blocking(descriptor, True)  # another process that shares the pipe may have made it non-blocking
    return io.FileIO(os.dup(descriptor), mode)
