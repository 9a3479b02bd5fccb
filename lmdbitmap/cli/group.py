"""The `lmdbitmap` command itself: its help, its own options, and its verbs in the order in which one meets them."""

from __future__ import annotations

import click

from lmdbitmap.cli.backups import backup, restore
from lmdbitmap.cli.bitmaps import export, import_, inspect
from lmdbitmap.cli.changed import changes
from lmdbitmap.cli.disks import add, info, ls, rm
from lmdbitmap.cli.holding import holds
from lmdbitmap.cli.metrics import metrics
from lmdbitmap.cli.mount import mount
from lmdbitmap.cli.options import STORE_VARIABLE, default_store, new_session
from lmdbitmap.cli.points import adopt, checkpoint, forget, mark, release, snapshot
from lmdbitmap.cli.repositories import copy, prune, verify
from lmdbitmap.cli.serve import serve
from lmdbitmap.cli.soundness import check
from lmdbitmap.cli.syncing import sync
from lmdbitmap.version import __version__

_AFTERWORD = """\
\b
Sizes take units of 1024: 64K, 4M, 1.5G, 1T.
Exit codes: 0 done, 1 failed, 2 not understood, 3 the bitmap cannot be
trusted and a full backup is needed, 4 busy or locked.
"""


class Verbs(click.Group):
    """Lists its verbs in the order in which they were added."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=Verbs, invoke_without_command=True, subcommand_metavar="COMMAND …", epilog=_AFTERWORD)
@click.option(
    "--store",
    metavar="DIR",
    envvar=STORE_VARIABLE,
    type=click.Path(file_okay=False),
    help=f"The folder that remembers. [default: ${STORE_VARIABLE}, or $XDG_STATE_HOME/lmdbitmap, or for root "
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


_VERBS = (
    add,
    ls,
    info,
    serve,
    checkpoint,
    changes,
    backup,
    restore,
    sync,
    snapshot,
    release,
    verify,
    prune,
    copy,
    mount,
    export,
    import_,
    inspect,
    mark,
    holds,
    forget,
    adopt,
    rm,
    check,
    metrics,
)
for _verb in _VERBS:
    verbs.add_command(_verb)
