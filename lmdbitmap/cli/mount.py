"""The verb `mount`: a disk as it was at a backup, over NBD and read-only, until a signal asks for the end.

Users want a few files of a large chain, and at once. So each chunk of an image is proven by its digest when it is first
read. A chunk that does not match its digest is an error for the client, and so is a corrupt table.
"""

from __future__ import annotations

import os

import click

from lmdbitmap.cli import logs
from lmdbitmap.cli.descriptors import allow_many_descriptors
from lmdbitmap.cli.options import FOLDER, Session, at_backup, verb
from lmdbitmap.cli.places import ListenAddresses
from lmdbitmap.cli.serving import Ending, announce, listening, logging_as_asked
from lmdbitmap.images.plain import PlainDisk
from lmdbitmap.nbd.server.server import Server
from lmdbitmap.nbd.supervisor import Supervisor


@verb(
    examples=[
        "lmdbitmap mount /srv/backups sda --socket /run/sda-backup.sock",
        "lmdbitmap mount /srv/backups sda --at 3 --listen 127.0.0.1:10809 --verify",
    ]
)
@click.argument("repository", metavar="REPO", type=FOLDER)
@click.argument("name")
@at_backup("look at")
@click.option(
    "--verify",
    is_flag=True,
    help="Prove the backup as a whole by its digests before the first client is let in, for which all of it is read."
    " Without it each piece is proven when it is read for the first time.",
)
@listening("read the disk")
@logging_as_asked
@click.pass_obj
def mount(
    asked: Session,
    repository: str,
    name: str,
    at: str | None,
    verify: bool,
    places: ListenAddresses,
    log_style: str,
    verbose: bool,
) -> None:
    """Serve a disk as it was at a backup, read-only.

    Single files can then be fetched with guestfish, nbdcopy or nbd-client. The disk is exported over NBD under its name
    and as the default export. Prints `ready` and the URIs once clients can connect; SIGTERM or Ctrl-C ends it. It needs
    no store, and changes nothing.
    """
    from lmdbitmap.repository.backup_chain import open_backup
    from lmdbitmap.restoring.backup_server import ended, prove_first

    logs.choose(log_style, verbose=verbose)
    logs.never_wait()
    allow_many_descriptors()
    supervisor = Supervisor(os.environ.pop("NOTIFY_SOCKET", ""))
    with Ending() as ending, open_backup(repository, name, at) as chain:
        prove_first(name, chain, wanted=verify, stopped=lambda: ending.is_wished)
        with ended(Server({name: PlainDisk(chain)})) as server:
            places.open_all(server)
            ending.ends(server)
            if not ending.is_wished:
                announce(asked, server.uris)
                supervisor.tell("READY=1")
            server.serve_forever()
            supervisor.tell("STOPPING=1")
