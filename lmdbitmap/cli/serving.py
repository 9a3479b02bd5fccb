"""What the verbs that serve share: where they listen, how they announce that they are ready, how they end.

A signal only requests the end. A second or tenth signal changes nothing and interrupts nothing. Under nohup, SIGHUP
stays ignored: the server outlives its terminal.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import click

from lmdbitmap.cli.logs import HUMAN, STYLES, VARIABLE, choose
from lmdbitmap.cli.options import Function, Session, utf8_path
from lmdbitmap.cli.output import say
from lmdbitmap.cli.places import (
    ListenAddresses,
    group_id,
    host_and_port,
    is_loopback,
    passed_sockets,
    socket_mode,
)
from lmdbitmap.errors import InvalidArgument
from lmdbitmap.nbd.listeners import passed_host
from lmdbitmap.nbd.server.server import Server

_ENDING_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def listening(power: str) -> Callable[[Function], Function]:
    """Add the options that say where to listen; the verb gets them as `places`. `power` is what a client may do."""

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def with_places(*arguments: Any, **options: Any) -> Any:
            own = {name: options.pop(name) for name in _OPTIONS}
            return function(*arguments, places=_places(power, **own), **options)

        made: Function = with_places
        for option in _listening_options(power):
            made = option(made)
        return made

    return decorate


_OPTIONS = ("socket", "socket_mode", "socket_group", "listen", "tls", "insecure")


def _listening_options(power: str) -> list[Callable[[Function], Function]]:
    """Return the options in the order in which decorators are applied: last one first."""
    return [
        click.option(
            "--insecure",
            is_flag=True,
            help=f"Listen without TLS where other hosts can reach it: each of them may {power}.",
        ),
        click.option(
            "--tls",
            metavar="FOLDER",
            type=utf8_path,
            help="Over TCP, serve only clients with a certificate that the authority in ca-cert.pem signed. That folder"
            " also has server-cert.pem and server-key.pem, as for QEMU.",
        ),
        click.option(
            "--listen",
            metavar="HOST:PORT",
            help="Serve at this TCP address; port 0 is any that is free.",
        ),
        click.option(
            "--socket-group", metavar="GROUP", type=group_id,
            help="The group of the socket of --socket: its members get in if --socket-mode lets them.",
        ),
        click.option(
            "--socket-mode", metavar="MODE", type=socket_mode,
            help="Permissions of the socket of --socket, in octal: 0660 lets a group in. [default: 0600]",
        ),
        click.option(
            "--socket", metavar="PATH", type=utf8_path, help="Serve at this unix socket, for its owner only."
        ),
    ]  # fmt: skip


def logging_as_asked(function: Function) -> Function:
    """Add the options `log_style` and `verbose`."""
    with_verbose = click.option(
        "--verbose", is_flag=True, help="Also log clients that connect and leave, and checkpoints."
    )(function)
    return click.option(
        "--log", "log_style", type=click.Choice(STYLES), envvar=VARIABLE, show_envvar=True,
        default=HUMAN, show_default=True, is_eager=True, callback=_log_so_from_now_on,
        help="Write the log on stderr as sentences, or as one JSON object a line. JSON includes what --verbose adds.",
    )(with_verbose)  # fmt: skip


def _log_so_from_now_on(context: click.Context, option: click.Parameter, style: str) -> str:
    """Let errors of the options to come be in that style too."""
    choose(style, verbose=False)
    return style


def _places(
    power: str,
    *,
    socket: str | None,
    socket_mode: int | None,
    socket_group: int | None,
    listen: str | None,
    tls: str | None,
    insecure: bool,
) -> ListenAddresses:
    passed = passed_sockets(os.environ)
    remedy = "give certificates with --tls, or serve at a unix socket, or say --insecure"
    is_safe = insecure or tls is not None
    address = None if listen is None else address_of(listen, power, remedy, insecure=is_safe)
    for host in filter(None, map(passed_host, passed)):
        require_private(host, power, remedy, insecure=is_safe)
    if socket is None and address is None and not passed:
        raise click.UsageError("say where to serve: --socket PATH or --listen HOST:PORT")
    if socket is None and not (socket_mode is None and socket_group is None):
        raise click.UsageError("--socket-mode and --socket-group are for --socket")
    if tls is not None and address is None and not passed:
        raise click.UsageError("--tls is for --listen: a unix socket is the owner's alone")
    file = None if socket is None else (socket, 0o600 if socket_mode is None else socket_mode, socket_group)
    return ListenAddresses(file, address, passed, tls, insecure=insecure)


def address_of(text: str, power: str, remedy: str, *, insecure: bool) -> tuple[str, int]:
    """Return the host and port of HOST:PORT; raise as `require_private` does."""
    host, port = host_and_port(text)
    require_private(host, power, remedy, insecure=insecure)
    return host, port


def require_private(host: str, power: str, remedy: str, *, insecure: bool) -> None:
    """Raise `InvalidArgument` if other hosts could reach `host` and have `power`, unless `insecure` allows it."""
    if not insecure and not is_loopback(host):
        raise InvalidArgument(f"every host that reaches {host} could {power}", next_step=remedy)


def announce(asked: Session, uris: list[str], metrics_url: str | None = None) -> None:
    """Print `ready` and the URIs: clients can connect from now on."""
    if asked.as_json:
        metrics = {} if metrics_url is None else {"metrics": metrics_url}
        print(json.dumps({"ready": True, "uris": uris, **metrics}), flush=True)
        return
    for line in ("ready", *uris, *([] if metrics_url is None else [f"metrics {metrics_url}"])):
        say(line)
    sys.stdout.flush()


def _heeded() -> Iterator[signal.Signals]:
    for number in _ENDING_SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            yield number


class Ending:
    """Turns signals into requests to end, permanently; only a block that fails gets the old signal handlers back."""

    def __init__(self) -> None:
        self._wished = False
        self._server: Server | None = None

    def __enter__(self) -> Ending:
        self._before = {number: signal.signal(number, self._wish) for number in _heeded()}
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        if failure is not None:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def ends(self, server: Server) -> None:
        """Let signals end this server from now on; a signal that came before ends it at once."""
        self._server = server
        if self._wished:
            server.request_stop()

    @property
    def is_wished(self) -> bool:
        return self._wished

    def _wish(self, number: int, frame: FrameType | None) -> None:
        self._wished = True
        if self._server is not None:
            self._server.request_stop()
