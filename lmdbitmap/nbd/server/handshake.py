"""The server's side of NBD option haggling: bytes in, bytes out, no socket and no clock.

    greeting -> client flags -> option, reply, option, reply, … -> `Agreed` (transmission) or `ABORTED`
                                              `START_TLS` -> the caller encrypts, `secured` -> option, reply, …

Feed `receive` whatever arrived, in pieces of any size, and send each answer before you ask for the next one. When
`outcome` is set, haggling is over and `trailing` holds the bytes after it. A client that breaks a MUST of the
specification gets `FormatError` and is to be dropped; one that merely asks for something odd gets an error reply.
Memory is bounded by one option of `MAX_OPTION_LENGTH`, checked before its data is awaited, and by the answer to it. An
answer takes work for at most `MAX_QUERIES`.

The exports are looked up when a client first asks. Where TLS is required, a client learns nothing and chooses nothing
before TLS, so nothing is looked up. TLS voids what the client said in plain text. A client that sent more bytes than it
should have before TLS is dropped: those bytes may be somebody else's.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Final, NamedTuple, TypeAlias

from lmdbitmap.errors import FormatError
from lmdbitmap.nbd import protocol as nbd

MAX_OPTION_LENGTH: Final = 64 << 10
"""Bytes of option data that are accepted; a longer option is an attack, not a question."""
MAX_OPTIONS: Final = 1024
"""Options a client may send before it must have chosen; `nbdinfo --list` sends a handful per export."""
MAX_QUERIES: Final = 256
"""Contexts that one option may ask for. Clients ask for one or two, or for all without naming any."""
_MOST_SHOWN: Final = 200
"""Characters shown of an unknown name."""
MIN_BLOCK_SIZE: Final = 1
PREFERRED_BLOCK_SIZE: Final = 4096
MAX_PAYLOAD: Final = 32 << 20
"""The longest READ or WRITE, in bytes; the specification obliges every server to take it."""


class Export(NamedTuple):
    """What a client may learn of a disk before it chooses it. `flags` lack DF, which haggling decides."""

    name: str
    size: int
    flags: int
    description: str = ""
    contexts: Collection[str] = ()
    beside: bool = False
    """A disk as it was, served beside itself: it does not count when the empty name means the only export."""


class Agreed(NamedTuple):
    """The outcome of haggling. `contexts` pairs the ids given to the client with the names it selected.

    With `extended` headers it does not matter whether structured replies were agreed on.
    """

    export_name: str
    structured: bool
    contexts: tuple[tuple[int, str], ...]
    extended: bool = False


class Ending(enum.Enum):
    ABORTED = enum.auto()
    START_TLS = enum.auto()


ABORTED: Final = Ending.ABORTED
START_TLS: Final = Ending.START_TLS
Outcome: TypeAlias = "Agreed | Ending"


class Handshake:
    """One client's haggling over the exports that `look_up` returns, in plain text or only behind TLS.

    The client gets the export it chooses if `enter` says that the export has room.
    """

    def __init__(
        self,
        look_up: Callable[[], Mapping[str, Export]],
        *,
        tls_required: bool = False,
        enter: Callable[[str], bool] = lambda name: True,
    ) -> None:
        self._look_up = look_up
        self._found: Mapping[str, Export] | None = None
        self._enter = enter
        self._tls_required = tls_required
        self._secured = False
        self._inbox = bytearray()
        self._flags: int | None = None
        self._options_seen = 0
        self.refuse: Callable[[FormatError], None] = lambda refusal: None
        """Called with each error answered that the operator of the server should know of."""
        self._structured = False
        self._extended = False
        self._selected: tuple[str, tuple[tuple[int, str], ...]] = ("", ())
        self.outcome: Outcome | None = None
        self.greeting = nbd.greeting()

    @property
    def _exports(self) -> Mapping[str, Export]:
        """Looked up once. Not a `cached_property`: in Python 3.11 and older all handshakes wait for each other's."""
        if self._found is None:
            self._found = self._look_up()
        return self._found

    @property
    def trailing(self) -> bytes:
        """The bytes after the end of haggling: the client's first requests."""
        return bytes(self._inbox)

    @property
    def wants_tls(self) -> bool:
        return self.outcome is START_TLS

    def secured(self) -> None:
        """Begin haggling anew behind the client's flags: after `START_TLS` the connection is encrypted now."""
        assert self.outcome is START_TLS
        if self._inbox:
            raise nbd.malformed("NBD_OPT_STARTTLS", "nothing more in plain text", f"{len(self._inbox)} bytes")
        self._tls_required, self._secured = False, True
        self.outcome = None

    def receive(self, data: bytes) -> Iterator[bytes]:
        """Take in bytes from the client, and yield the answer to each option they complete.

        Raises `FormatError` when the client must be dropped.
        """
        self._inbox += data
        if self._flags is None and not self._take_client_flags():
            return
        while self.outcome is None and (message := self._take_option()) is not None:
            yield self._answer(*message)

    def _take_client_flags(self) -> bool:
        if len(self._inbox) < nbd.CLIENT_FLAGS.size:
            return False
        self._flags = nbd.parse_client_flags(self._take(nbd.CLIENT_FLAGS.size))
        return True

    def _take_option(self) -> tuple[int, bytes] | None:
        """Return the next whole option and its data, or None. A header is judged before its data comes."""
        if len(self._inbox) < nbd.OPTION.size:
            return None
        option, length = nbd.parse_option_header(bytes(self._inbox[: nbd.OPTION.size]))
        self._judge(option, length)
        if len(self._inbox) < nbd.OPTION.size + length:
            return None
        self._options_seen += 1
        return option, self._take(nbd.OPTION.size + length)[nbd.OPTION.size :]

    def _judge(self, option: int, length: int) -> None:
        if length > MAX_OPTION_LENGTH:
            raise nbd.malformed(f"option {option}", f"at most {MAX_OPTION_LENGTH} bytes", length)
        if self._options_seen >= MAX_OPTIONS:
            raise nbd.malformed("handshake", f"at most {MAX_OPTIONS} options", "one more")
        if option != nbd.NBD_OPT_EXPORT_NAME and not self._has_flag(nbd.NBD_FLAG_C_FIXED_NEWSTYLE):
            raise nbd.malformed("handshake", "NBD_OPT_EXPORT_NAME without fixed newstyle", f"option {option}")

    def _take(self, length: int) -> bytes:
        taken = bytes(self._inbox[:length])
        del self._inbox[:length]
        return taken

    def _has_flag(self, flag: int) -> bool:
        return self._flags is not None and bool(self._flags & flag)

    def _answer(self, option: int, data: bytes) -> bytes:
        if self._tls_required and option not in _OPTIONS_BEFORE_TLS:
            return self._insist_on_tls(option)
        answer = _ANSWERS.get(option)
        if answer is None:
            return _error(option, nbd.NBD_REP_ERR_UNSUP, "this server does not know that option")
        if option in _OPTIONS_WITHOUT_DATA and data:
            return _error(option, nbd.NBD_REP_ERR_INVALID, "this option carries no data")
        try:
            return answer(self, option, data)
        except FormatError as error:
            if option == nbd.NBD_OPT_EXPORT_NAME:
                raise
            return _error(option, nbd.NBD_REP_ERR_INVALID, error.problem)

    def _insist_on_tls(self, option: int) -> bytes:
        if option == nbd.NBD_OPT_EXPORT_NAME:
            raise nbd.malformed("NBD_OPT_EXPORT_NAME", "NBD_OPT_STARTTLS before it", "none")
        self.refuse(nbd.malformed(f"option {option}", "NBD_OPT_STARTTLS before it", "none"))
        return _error(option, nbd.NBD_REP_ERR_TLS_REQD, "this server demands TLS")

    def _answer_starttls(self, option: int, data: bytes) -> bytes:
        if self._secured:
            return _error(option, nbd.NBD_REP_ERR_INVALID, "the connection is encrypted already")
        if not self._tls_required:
            return _error(option, nbd.NBD_REP_ERR_UNSUP, "this server has no certificate for TLS")
        self.outcome = START_TLS
        return nbd.option_reply(option, nbd.NBD_REP_ACK)

    def _find(self, name: str) -> Export | None:
        """Return the export of that name. The empty name means the only export if there is just one."""
        if name == "":
            alone = [export for export in self._exports.values() if not export.beside]
            if len(alone) == 1:
                return alone[0]
        if name not in self._exports:
            self.refuse(_not_served("export name", name))
        return self._exports.get(name)

    def _transmission_flags(self, export: Export) -> int:
        return export.flags | (nbd.NBD_FLAG_SEND_DF if self._in_chunks else 0)

    @property
    def _in_chunks(self) -> bool:
        """Whether replies may come in chunks, which DF and metadata contexts need."""
        return self._structured or self._extended

    def _answer_export_name(self, option: int, data: bytes) -> bytes:
        """Answer the option that has no error reply: an unknown name ends the connection."""
        if self._extended:
            raise nbd.malformed("handshake", "NBD_OPT_GO behind extended headers", "NBD_OPT_EXPORT_NAME")
        name = nbd.parse_export_name(data)
        export = self._find(name)
        if export is None:
            raise _not_served("NBD_OPT_EXPORT_NAME", name)
        if not self._agree(export):
            return b""
        padded = not self._has_flag(nbd.NBD_FLAG_C_NO_ZEROES)
        return nbd.export_name_reply(export.size, self._transmission_flags(export), padded=padded)

    def _answer_abort(self, option: int, data: bytes) -> bytes:
        self.outcome = ABORTED
        return nbd.option_reply(option, nbd.NBD_REP_ACK)

    def _answer_list(self, option: int, data: bytes) -> bytes:
        entries = (nbd.server_entry(export.name, export.description) for export in self._exports.values())
        return _listing(option, nbd.NBD_REP_SERVER, *entries)

    def _answer_info(self, option: int, data: bytes) -> bytes:
        query = nbd.parse_info_query(data)
        export = self._find(query.export_name)
        if export is None:
            return _unknown_export(option, query.export_name)
        if option == nbd.NBD_OPT_GO and not self._agree(export):
            return self._sent_away(option, export.name)
        return _listing(option, nbd.NBD_REP_INFO, *self._describe(export, query.info_types))

    def _sent_away(self, option: int, name: str) -> bytes:
        """Answer who gets no place at an export that was there when it began to haggle."""
        if name in self._look_up():
            return _error(option, nbd.NBD_REP_ERR_POLICY, f"{name!r} has no room for one more client")
        self.refuse(_not_served("export name", name))
        return _unknown_export(option, name)

    def _describe(self, export: Export, wanted: tuple[int, ...]) -> list[bytes]:
        infos = [
            nbd.info_export(export.size, self._transmission_flags(export)),
            nbd.info_block_size(MIN_BLOCK_SIZE, PREFERRED_BLOCK_SIZE, MAX_PAYLOAD),
        ]
        if nbd.NBD_INFO_NAME in wanted:
            infos.append(nbd.info_text(nbd.NBD_INFO_NAME, export.name))
        if nbd.NBD_INFO_DESCRIPTION in wanted:
            infos.append(nbd.info_text(nbd.NBD_INFO_DESCRIPTION, export.description))
        return infos

    def _answer_structured_reply(self, option: int, data: bytes) -> bytes:
        if self._extended:
            return _error(option, nbd.NBD_REP_ERR_EXT_HEADER_REQD, "extended headers are agreed on already")
        self._structured = True
        return nbd.option_reply(option, nbd.NBD_REP_ACK)

    def _answer_extended_headers(self, option: int, data: bytes) -> bytes:
        """Agree on extended headers, from the end of haggling on and for good. They imply structured replies."""
        self._extended = True
        return nbd.option_reply(option, nbd.NBD_REP_ACK)

    def _answer_list_meta_context(self, option: int, data: bytes) -> bytes:
        """List the contexts: all without a query; `namespace:` and `namespace:part:` list those that begin so."""
        query, export = self._meta_query(data)
        if len(query.queries) > MAX_QUERIES:
            return _too_many(option)
        if export is None:
            return _unknown_export(option, query.export_name)
        listed = _matching(query.queries, export.contexts) if query.queries else export.contexts
        return _listing(option, nbd.NBD_REP_META_CONTEXT, *(nbd.meta_context(0, name) for name in listed))

    def _answer_set_meta_context(self, option: int, data: bytes) -> bytes:
        """Select contexts by exact name, and skip names this export lacks. Replaces any earlier selection."""
        self._selected = ("", ())
        query, export = self._meta_query(data)
        if len(query.queries) > MAX_QUERIES:
            return _too_many(option)
        if export is None:
            return _unknown_export(option, query.export_name)
        wanted = set(query.queries)
        chosen = [name for name in export.contexts if name in wanted] if wanted else []
        numbered = tuple(enumerate(chosen, start=1))
        self._selected = (export.name, numbered)
        return _listing(option, nbd.NBD_REP_META_CONTEXT, *(nbd.meta_context(*pair) for pair in numbered))

    def _meta_query(self, data: bytes) -> tuple[nbd.MetaQuery, Export | None]:
        if not self._in_chunks:
            raise nbd.malformed(
                "metadata query", "NBD_OPT_STRUCTURED_REPLY or NBD_OPT_EXTENDED_HEADERS before it", "none"
            )
        query = nbd.parse_meta_query(data)
        return query, self._find(query.export_name)

    def _agree(self, export: Export) -> bool:
        """Agree on the export; without a place there, end haggling and return False.

        Contexts selected for another export do not count for this one.
        """
        if not self._enter(export.name):
            self.outcome = ABORTED
            return False
        name, contexts = self._selected
        selected = contexts if name == export.name else ()
        self.outcome = Agreed(export.name, self._structured, selected, self._extended)
        return True


_OPTIONS_WITHOUT_DATA: Final = frozenset(
    {nbd.NBD_OPT_LIST, nbd.NBD_OPT_STRUCTURED_REPLY, nbd.NBD_OPT_EXTENDED_HEADERS, nbd.NBD_OPT_STARTTLS}
)
_OPTIONS_BEFORE_TLS: Final = frozenset({nbd.NBD_OPT_STARTTLS, nbd.NBD_OPT_ABORT})

_ANSWERS: Final[Mapping[int, Callable[[Handshake, int, bytes], bytes]]] = {
    nbd.NBD_OPT_EXPORT_NAME: Handshake._answer_export_name,
    nbd.NBD_OPT_ABORT: Handshake._answer_abort,
    nbd.NBD_OPT_LIST: Handshake._answer_list,
    nbd.NBD_OPT_STARTTLS: Handshake._answer_starttls,
    nbd.NBD_OPT_INFO: Handshake._answer_info,
    nbd.NBD_OPT_GO: Handshake._answer_info,
    nbd.NBD_OPT_STRUCTURED_REPLY: Handshake._answer_structured_reply,
    nbd.NBD_OPT_EXTENDED_HEADERS: Handshake._answer_extended_headers,
    nbd.NBD_OPT_LIST_META_CONTEXT: Handshake._answer_list_meta_context,
    nbd.NBD_OPT_SET_META_CONTEXT: Handshake._answer_set_meta_context,
}


def _matching(queries: Iterable[str], contexts: Iterable[str]) -> list[str]:
    """The contexts that a query names exactly, or as a prefix that ends with a colon."""
    wanted = set(queries)
    beginnings = tuple(query for query in wanted if query.endswith(":"))
    return [name for name in contexts if name in wanted or name.startswith(beginnings)]


def _listing(option: int, reply_type: int, *payloads: bytes) -> bytes:
    replies = [nbd.option_reply(option, reply_type, payload) for payload in payloads]
    return b"".join(replies) + nbd.option_reply(option, nbd.NBD_REP_ACK)


def _error(option: int, reply_type: int, message: str) -> bytes:
    return nbd.option_reply(option, reply_type, nbd.bounded_text(message))


def _too_many(option: int) -> bytes:
    return _error(option, nbd.NBD_REP_ERR_TOO_BIG, f"ask for {MAX_QUERIES} contexts at most")


def _not_served(place: str, name: str) -> FormatError:
    return FormatError(
        f"NBD {place}",
        expected="the name of a served disk",
        found=repr(name[:_MOST_SHOWN]),
        next_step="name one that `nbdinfo --list` shows",
    )


def _unknown_export(option: int, name: str) -> bytes:
    return _error(option, nbd.NBD_REP_ERR_UNKNOWN, f"no disk named {name!r} is served here")
