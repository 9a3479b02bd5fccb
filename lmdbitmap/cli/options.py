"""What all verbs share: the store's path, JSON or words, and the types of arguments.

`--store` and `--json` are accepted before the verb and after it; the latter wins.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import click

from lmdbitmap.cli.signals import undoing
from lmdbitmap.cli.sizes import parse_size
from lmdbitmap.errors import InvalidArgument
from lmdbitmap.geometry import granularity_bits_of
from lmdbitmap.work.patience import MOST_S

Function: TypeAlias = Callable[..., Any]
"""A verb, or a function that is being decorated to become one."""

STORE_VARIABLE = "LMDBITMAP_STORE"

FOLDER = click.Path(file_okay=False, readable=False)
FILE = click.Path(dir_okay=False, readable=False)
FILE_OR_DASH = click.Path(dir_okay=False, readable=False, allow_dash=True)
FILE_OR_DEVICE = click.Path(readable=False)
"""Whether it may be read is not asked here: whoever reads it says what to do if not, and some verbs do not read it."""


@dataclass
class Session:
    """One run of the command: its settings apart from the verb and its arguments."""

    store_path: str
    as_json: bool = False
    owns_process: bool = False
    """Whether this process runs nothing but the command."""

    @property
    def shows_progress(self) -> bool:
        return not self.as_json and sys.stderr.isatty()


def default_store(environment: Mapping[str, str], uid: int) -> str:
    """Return the default path of the store: the system's for root, else the user's own."""
    if uid == 0:
        return "/var/lib/lmdbitmap"
    state_home = environment.get("XDG_STATE_HOME", "")
    if not os.path.isabs(state_home):  # unset, or relative, which the XDG specification says to ignore
        home = environment.get("HOME") or os.path.expanduser("~")
        state_home = os.path.join(home, ".local", "state")
    return os.path.join(state_home, "lmdbitmap")


def new_session(store: str | None, as_json: bool, *, owns_process: bool) -> Session:
    return Session(store or default_store(os.environ, os.getuid()), as_json, owns_process)


class Verb(click.Command):
    """A command that also takes `--store` and `--json`, and shows examples below its options."""

    def __init__(self, *args: Any, examples: Sequence[str] = (), undoes: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = examples
        self.undoes = undoes
        self.params += [_store_option(), _json_option()]

    def invoke(self, ctx: click.Context) -> Any:
        with undoing() if self.undoes and ctx.ensure_object(Session).owns_process else nullcontext():
            return super().invoke(ctx)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Examples"):
            for example in self.examples:
                formatter.write(f"{'':{formatter.current_indent}}$ {example}\n")


def verb(
    *, examples: Sequence[str], name: str | None = None, undoes: bool = False
) -> Callable[[Callable[..., None]], Verb]:
    """Make a verb of a function; its docstring is the help. With `undoes`, signals undo its work as a failure does."""
    return click.command(name, cls=Verb, examples=examples, undoes=undoes)


def _store_option() -> click.Option:
    return click.Option(
        ["--store"],
        metavar="DIR",
        type=FOLDER,
        expose_value=False,
        callback=_choose_store,
        help="The folder of the store.",
    )


def _choose_store(context: click.Context, _: click.Parameter, value: str | None) -> None:
    if value is not None:
        context.ensure_object(Session).store_path = value


def _json_option() -> click.Option:
    return click.Option(
        ["--json"],
        is_flag=True,
        expose_value=False,
        callback=_choose_json,
        help="Answer in JSON, for programs.",
    )


def _choose_json(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        context.ensure_object(Session).as_json = True


def at_backup(purpose: str) -> Callable[[Function], Function]:
    """Add the option that chooses a backup of a disk; the verb gets it as `at`. `purpose` follows "the backup to"."""
    return click.option(
        "--at",
        metavar="BACKUP|TIME",
        help=f"The number of the backup to {purpose}, or a time, for the newest backup not later: 2026-11-29 is the end"
        " of that day, 2026-11-29T02:38:24 the local clock's, and with a Z behind it UTC's. [default: the newest]",
    )


# --- kinds of arguments, for `type=` ---


def size(text: str) -> int:
    """Return the bytes of a size with or without a unit."""
    try:
        return parse_size(text)
    except InvalidArgument as error:
        raise click.BadParameter(str(error)) from error


class Seconds(click.FloatRange):
    """A duration or a time limit in seconds; it cannot be infinite."""

    def __init__(self, *, may_be_0: bool = False) -> None:
        super().__init__(min=0, max=MOST_S, min_open=not may_be_0)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        seconds = super().convert(value, param, ctx)
        if math.isnan(seconds):
            self.fail(f"{value} is no time", param, ctx)
        return seconds


def granularity(text: str) -> int:
    """Return the exponent of a granularity given in bytes."""
    try:
        return granularity_bits_of(parse_size(text))
    except InvalidArgument as error:
        raise click.BadParameter(str(error)) from error


def utf8_path(text: str) -> str:
    """Return a path unchanged if it and its target are UTF-8, so that a store or a URI can hold both."""
    try:
        os.path.realpath(text).encode()
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is no UTF-8 name of a file; rename it") from error
    return text


def names(text: str) -> list[str]:
    """Return the names in a comma-separated list; no two may be equal."""
    found = text.split(",")
    if "" in found:
        raise click.BadParameter(
            f"{text!r} has an empty name between its commas; write NAME,NAME without spaces"
        )
    if len(set(found)) < len(found):
        raise click.BadParameter(f"{text!r} names a disk twice; name each one once")
    return found
