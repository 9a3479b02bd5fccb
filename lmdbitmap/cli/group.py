"""The `lmdbitmap` command itself: its help, its own options, and its verbs in the order in which users meet them.

A verb is imported when it is called: importing all of them would double the start of each.
"""

from __future__ import annotations

import importlib
import re
from typing import Final

import click

from lmdbitmap.cli.options import FOLDER, STORE_VARIABLE, default_store, new_session
from lmdbitmap.version import __version__

_AFTERWORD = """\
\b
Sizes take units of 1024: 64K, 4M, 1.5G, 1T.
Exit codes: 0 done, 1 failed, 2 not understood, 3 the bitmap cannot be
trusted and a full backup is needed, 4 busy or locked, 128 and its number
where a signal ended it.
"""


_VERBS: Final = {
    "add": "disks.add",
    "ls": "disks.ls",
    "info": "disks.info",
    "serve": "serve.serve",
    "checkpoint": "points.checkpoint",
    "changes": "changed.changes",
    "show": "show.show",
    "backup": "backups.backup",
    "restore": "backups.restore",
    "sync": "syncing.sync",
    "snapshot": "points.snapshot",
    "release": "points.release",
    "verify": "repositories.verify",
    "prune": "repositories.prune",
    "copy": "repositories.copy",
    "mount": "mount.mount",
    "export": "bitmaps.export",
    "import": "bitmaps.import_",
    "inspect": "bitmaps.inspect",
    "combine": "bitmaps.combine",
    "mark": "points.mark",
    "holds": "holders.holds",
    "forget": "points.forget",
    "adopt": "points.adopt",
    "relocate": "disks.relocate",
    "rm": "disks.rm",
    "check": "soundness.check",
    "metrics": "metrics.metrics",
}
"""The module and function of each verb, in this package."""
_NOTHING: Final = re.compile("(--[a-z-]+=)?")


class Verbs(click.Group):
    """Lists its verbs in the order of `_VERBS`, and imports them one by one."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Refuse an empty word: it is mostly a variable that is not set, and as a path it would be this very folder."""
        if any(map(_NOTHING.fullmatch, args)):
            raise click.UsageError(
                "an argument is empty; leave it out, or set the variable that stands there", ctx
            )
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(dict.fromkeys([*_VERBS, *self.commands]))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.commands and cmd_name in _VERBS:
            self.add_command(_imported(_VERBS[cmd_name]))
        return super().get_command(ctx, cmd_name)


def _imported(place: str) -> click.Command:
    module, _, name = place.partition(".")
    command = getattr(importlib.import_module(f"lmdbitmap.cli.{module}"), name)
    assert isinstance(command, click.Command)
    return command


@click.group(cls=Verbs, invoke_without_command=True, subcommand_metavar="COMMAND …", epilog=_AFTERWORD)
@click.option(
    "--store",
    metavar="DIR",
    envvar=STORE_VARIABLE,
    type=FOLDER,
    help="The folder of the store: all that is known of the disks is in it."
    f" [default: ${STORE_VARIABLE}, or $XDG_STATE_HOME/lmdbitmap, or for root "
    f"{default_store({}, 0)}]",
)
@click.option("--json", "as_json", is_flag=True, help="Answer in JSON, for programs.")
@click.version_option(__version__, message="lmdbitmap %(version)s")
@click.pass_context
def verbs(context: click.Context, store: str | None, as_json: bool) -> None:
    """Remember which blocks of a disk image changed since the last backup, also after a crash."""
    context.obj = new_session(store, as_json, owns_process=context.obj is True)
    if context.invoked_subcommand is None:
        raise click.UsageError("no command given", context)
