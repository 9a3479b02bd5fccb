"""The law of the house: a module imports only from lower floors, and keeps to what its floor may do.

Modules are read with `ast`, never run. Every rule has a little fake module below that breaks it, so that
the checker itself is known to bite.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lmdbitmap"

FLOORS: dict[str, float] = {
    # 0 vocabulary. Decimals order neighbours on one floor: geometry speaks in errors.
    "errors": 0,
    "apart": 0.5,
    "version": 0,
    "disks_failed": 0.5,
    "extents": 0.5,
    "geometry": 0.5,
    "interfaces": 0.5,
    "forks": 0.5,
    "latencies": 0.5,
    "buffers": 0,
    "crew": 0,
    "pace": 0.5,
    "nbd": 0,  # the package itself: empty
    # 1 codecs: values in, values out
    "bits": 1,
    "format": 1.5,
    "plain_map": 1,
    "checksum": 1,
    "schema": 1.5,
    "tally": 1.5,
    "cluster_states": 1.5,
    "armed": 1.5,
    "qcow2.layout": 1,
    "qcow2.compression": 1.1,
    "qcow2.first_table": 1.1,
    "qcow2.reader": 1.2,
    "qcow2.writer": 1.2,
    "qcow2.compressing": 1.4,
    "qcow2.chain": 1.4,
    "qcow2": 1.6,
    "digest_algorithms": 1,
    "json_fields": 1,
    "moments": 1,
    "manifest": 1.1,
    "rbd_diff": 1,
    "nbd.protocol": 1,
    "nbd.uri": 1.3,
    "nbd.client_handshake": 1.3,
    "nbd.handshake": 1.3,
    "nbd.requests": 1.5,
    "nbd.forms": 1.5,
    "nbd.control_wire": 1.5,
    # 2 resources: files, devices, sockets, the store
    "linux": 2,
    "kernel": 2,
    "image_locks": 2,
    "files": 2.2,
    "device": 2.5,
    "owner": 2.5,
    "nbd.doubts": 2.15,
    "nbd.keepalive": 2.15,
    "nbd.client_tls": 2.15,
    "nbd.client_link": 2.2,
    "nbd.client_dial": 2.25,
    "nbd.client_windows": 2.25,
    "nbd.client_kept": 2.25,
    "nbd.client_errors": 2.22,
    "nbd.client_flushes": 2.25,
    "nbd.edges": 2.15,
    "nbd.client_session": 2.3,
    "nbd.client": 2.5,
    "nbd.client_statuses": 2.25,
    "nbd.kept_question": 2.5,
    "nbd.through_owner": 2.8,
    "nbd.control_client": 2.5,
    "nbd.tls": 2.1,
    "nbd.supervisor": 2.5,
    "image": 2.6,
    "whereabouts": 2.7,
    "identity": 2.6,
    "flatfile": 2.5,
    "scratch": 2.2,
    "plain": 2.7,
    "read_only": 2.5,
    "direct": 2.7,
    "measured": 2.8,
    "presence": 2.3,
    "highwater": 2.3,
    "lmdb_tree": 2.3,
    "lmdb_errors": 2.4,
    "lmdb_opening": 2.5,
    "environment": 2.6,
    "records": 2.62,
    "founding": 2.64,
    "salvage": 2.66,
    "store": 2.7,
    # 3 model
    "period": 3,
    "flushing": 3,
    "continuity": 3,
    "manifest_file": 2.7,
    "repository": 3,
    "sync_note": 3,
    "holds": 3.1,
    "retention": 3,
    "hashing": 2.7,
    "file_pool": 2.7,
    "merge": 3.3,
    "file_copy": 2.7,
    "backup_chain": 3.1,
    "chain_tables": 3.15,
    "restore_points": 3.1,
    "copier": 3.2,
    "rescan": 3.2,
    "making_ready": 3.2,
    "readable": 2.9,
    "loads": 2.95,
    "pieces": 3,
    "gang": 2.9,
    "carriers": 3.1,
    "digests": 3.05,
    "proof": 3.08,
    "chain": 3.5,
    "standalone": 3.6,
    "mending": 3.6,
    "session": 3.7,
    "vouching": 3.7,
    # 4 tracker
    "lane": 4,
    "snapshot": 4.2,
    "holding": 4.25,
    "front": 4.2,
    "changes": 4,
    "tracking": 4.3,
    "points": 4.4,
    "filter": 4.5,
    "target": 4.6,
    "differences": 4.65,
    "putting_back": 4.7,
    "carrying_back": 4.8,
    "sync_target": 4.7,
    "mirror": 4.75,
    # 5 jobs
    "nbd.contexts": 5,
    "nbd.kept_context": 5.3,
    "nbd.dirty_contexts": 5.5,
    "nbd.inlet": 5,
    "nbd.notice": 4.9,
    "nbd.complaints": 4.9,
    "nbd.traffic": 5.3,
    "nbd.quiet": 5.3,
    "nbd.listeners": 5,
    "nbd.conduit": 4.9,
    "nbd.replies": 5,
    "nbd.commands": 5.2,
    "nbd.deeds": 5.2,
    "nbd.connection": 5.4,
    "nbd.rounds": 5.45,
    "nbd.visit": 5.5,
    "nbd.server": 5.6,
    "nbd.watch": 5.7,
    "reach": 5.1,
    "access_ways": 5.15,
    "access": 5.2,
    "nbd.held": 5.7,
    "nbd.orders": 5.8,
    "nbd.control": 5.9,
    "check_folder": 5,
    "check": 5.1,
    "export": 5,
    "bitmap_file": 5.2,
    "backup_plan": 5.3,
    "backup_result": 5.3,
    "leftovers": 5.3,
    "backup_image": 5.4,
    "consumers": 5.4,
    "backup_place": 5.45,
    "backup_server": 5.7,
    "served_snapshots": 5.3,
    "backup": 5.5,
    "sync_plan": 5.3,
    "sync": 5.5,
    "restore": 5,
    "stream": 5.5,
    "stream_restore": 5,
    "verify": 5,
    "prune": 5.2,
    "transfer": 5,
    # 6 surface: what embedders import, and over it the command line
    "render": 5.9,
    "": 6,
    "cli": 7,
    "__main__": 8,
}
"""A module that is not listed breaks the law: say first where it belongs. All of `cli.` is one floor."""

PRIVATE_LIBRARIES: dict[str, set[str]] = {
    "lmdb": {"records", "environment", "lmdb_errors", "lmdb_opening", "lmdb_tree"},
    "msgpack": {"schema", "plain_map"},
    "bitarray": {"bits", "lane"},
    "compression": {"qcow2.compression"},
    "backports": {"qcow2.compression"},
    "blake3": {"digest_algorithms"},
    "socket": {"nbd"},
    "ssl": {"nbd"},
    "selectors": {"nbd"},
    "click": {"cli"},
    "rich": {"cli"},
    "prometheus_client": {"cli"},
    "argparse": set(),
}
"""Who may import what: a module, or every module of a package."""

SURFACE_ONLY = {
    "print", "input", "exit", "quit", "breakpoint", "SystemExit",
    "sys.exit", "sys.argv", "sys.stdin", "sys.stdout", "sys.stderr",
    "os.environ", "os.environb", "os.getenv", "os.putenv", "os.fork", "os._exit",
    "logging.basicConfig", "signal.signal",
}  # fmt: skip
"""Printing, exiting, the environment and the process itself belong to the command line."""

IMPORT_TIME_EFFECTS = (
    "open", "exec", "eval", "__import__", "importlib.", "os.", "subprocess.", "socket.", "tempfile.", "time.",
    "random.", "lmdb.", "atexit.", "threading.Thread", "threading.Timer",
)  # fmt: skip
"""What module-level constants and assertions must not call; names ending in a dot are whole modules."""

HARMLESS_STATEMENTS = (
    ast.Import,
    ast.ImportFrom,
    ast.FunctionDef,
    ast.AsyncFunctionDef,
    ast.ClassDef,
    ast.Assign,
    ast.AnnAssign,
    ast.Assert,
)


# --- the checker ---


def breaches(module: str, source: str, modules: set[str]) -> list[str]:
    """Every way in which the source of `module`, named without `lmdbitmap.`, breaks the law."""
    tree = ast.parse(source)
    if _floor(module) is None:
        return [f"{module} has no floor: list it in FLOORS"]
    return [
        *_wrong_floors(module, tree, modules),
        *_foreign_libraries(module, tree),
        *_surface_business(module, tree),
        *_import_time_effects(module, tree),
        *_late_annotations(tree),
    ]


def _floor(module: str) -> float | None:
    return FLOORS["cli"] if module.startswith("cli.") else FLOORS.get(module)


def _within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def _wrong_floors(module: str, tree: ast.Module, modules: set[str]) -> Iterator[str]:
    mine = _floor(module)
    for line, name in _imports(tree):
        if name.startswith("."):
            yield f"line {line}: import of {name} is relative"
        elif _within(name, "lmdbitmap"):
            target = _own_module(name, modules)
            theirs = _floor(target)
            siblings = _within(module, "cli") and _within(target, "cli")
            if not siblings and (mine is None or theirs is None or theirs >= mine):
                yield f"line {line}: floor {mine} imports {name} of floor {theirs}"


def _own_module(name: str, modules: set[str]) -> str:
    """The module that an imported name, `lmdbitmap.store.Store`, lives in: `store`."""
    inside = name.removeprefix("lmdbitmap").removeprefix(".")
    known = modules | FLOORS.keys()
    while inside not in known and "." in inside:
        inside = inside.rpartition(".")[0]
    return inside if inside in known else ""


def _foreign_libraries(module: str, tree: ast.Module) -> Iterator[str]:
    for line, name in _imports(tree):
        library = name.partition(".")[0]
        homes = PRIVATE_LIBRARIES.get(library)
        if homes is not None and not any(_within(module, home) for home in homes):
            yield f"line {line}: {library} belongs to {', '.join(sorted(homes)) or 'nobody'}"


def _surface_business(module: str, tree: ast.Module) -> Iterator[str]:
    if _within(module, "cli") or module == "__main__":
        return
    for line, name in _used_names(tree, tree):
        if name in SURFACE_ONLY:
            yield f"line {line}: {name} belongs to cli/"


def _import_time_effects(module: str, tree: ast.Module) -> Iterator[str]:
    if _within(module, "cli") or module == "__main__":
        return
    for statement in tree.body:
        if not (
            isinstance(statement, HARMLESS_STATEMENTS)
            or _is_docstring(statement)
            or _is_typing_only(statement)
        ):
            yield f"line {statement.lineno}: a {type(statement).__name__} statement runs at import"
        elif isinstance(statement, (ast.Assign, ast.AnnAssign, ast.Assert)):
            for line, name in _called_names(tree, statement):
                if _runs_something(name):
                    yield f"line {line}: {name} is called at import"


def _runs_something(name: str) -> bool:
    return any(
        name == effect or (effect[-1] == "." and name.startswith(effect)) for effect in IMPORT_TIME_EFFECTS
    )


def _late_annotations(tree: ast.Module) -> Iterator[str]:
    statements = [statement for statement in tree.body if not _is_docstring(statement)]
    if all(isinstance(statement, ast.Assign) for statement in statements):
        return  # nothing here that could hold an annotation
    first = statements[0]
    if not (
        isinstance(first, ast.ImportFrom)
        and first.module == "__future__"
        and first.names[0].name == "annotations"
    ):
        yield f"line {first.lineno}: from __future__ import annotations comes first"


def _imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything imported anywhere, `from a import b` as `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield node.lineno, f"{'.' * node.level}{node.module or ''}.{alias.name}"


def _used_names(tree: ast.Module, part: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every name read in `part`, with what `tree` imported spelled out."""
    spelled = _spelled_out(tree)
    for node in ast.walk(part):
        if isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Load):
            name = _dotted(node)
            head, dot, rest = name.partition(".")
            yield node.lineno, spelled.get(head, head) + dot + rest


def _called_names(tree: ast.Module, part: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(part):
        if isinstance(node, ast.Call):
            yield next(_used_names(tree, node.func), (node.lineno, ""))


def _spelled_out(tree: ast.Module) -> dict[str, str]:
    """What local names stand for: `from sys import exit as leave` gives {"leave": "sys.exit"}."""
    spelled = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            spelled.update({alias.asname: alias.name for alias in node.names if alias.asname is not None})
        elif isinstance(node, ast.ImportFrom):
            spelled.update(
                {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            )
    return spelled


def _dotted(node: ast.expr) -> str:
    """`a.b.c` of an attribute chain; what does not begin with a name begins with `?`."""
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def _is_docstring(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def _is_typing_only(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.If)
        and _dotted(statement.test).endswith("TYPE_CHECKING")
        and not statement.orelse
    )


def _import_cycle(imports: dict[str, set[str]]) -> list[str]:
    """A way round from a module to itself, or [] when there is none."""
    proven: set[str] = set()

    def walk(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module not in proven:
            for target in sorted(imports.get(module, set())):
                if found := walk(target, [*path, module]):
                    return found
            proven.add(module)
        return []

    return next((found for module in sorted(imports) if (found := walk(module, []))), [])


# --- the house as it stands ---


def _module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")


SOURCES = {_module_name(path): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}


def test_there_is_a_house_to_look_at() -> None:
    assert {"errors", "geometry", "nbd"} <= set(SOURCES)


@pytest.mark.parametrize("module", SOURCES, ids=lambda module: module or "lmdbitmap")
def test_module_keeps_the_law(module: str) -> None:
    assert breaches(module, SOURCES[module], set(SOURCES)) == []


def test_command_line_modules_import_each_other_without_cycles() -> None:
    command_line = {module: source for module, source in SOURCES.items() if _within(module, "cli")}
    imports = {
        module: {_own_module(name, set(SOURCES)) for _, name in _imports(ast.parse(source))}
        & command_line.keys()
        for module, source in command_line.items()
    }
    assert _import_cycle(imports) == []


def test_importing_the_package_stays_light() -> None:
    heavy = ["click", "rich", "ssl", "asyncio", "http", "urllib.request", "multiprocessing", "hypothesis"]
    code = f"import sys, lmdbitmap; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert (done.stdout, done.stderr) == ("[]\n", "")


# --- the checker bites ---

MODULES = {
    "",
    "errors",
    "geometry",
    "bits",
    "store",
    "filter",
    "export",
    "cli",
    "cli.main",
    "cli.sizes",
    "nbd.server",
}
FUTURE = "from __future__ import annotations\n"


@pytest.mark.parametrize(
    ("module", "source", "said"),
    [
        ("attic", "", "no floor"),
        ("geometry", "import lmdbitmap.store", "floor 0.5 imports lmdbitmap.store of floor 2.7"),
        ("geometry", "from lmdbitmap import store", "imports lmdbitmap.store"),
        ("geometry", "from lmdbitmap.store import Store", "imports lmdbitmap.store.Store"),
        ("geometry", "from lmdbitmap import __version__", "of floor 6"),
        ("geometry", "def late() -> None:\n    import lmdbitmap.store", "imports lmdbitmap.store"),
        ("geometry", "if TYPE_CHECKING:\n    import lmdbitmap.store", "imports lmdbitmap.store"),
        ("export", "from lmdbitmap import export", "of floor 5"),
        ("store", "from lmdbitmap.cli.main import main", "of floor 7"),
        ("store", "from . import errors", "relative"),
        ("filter", "import lmdb", "lmdb belongs to environment, lmdb_errors"),
        ("bits", "from lmdb import Environment as E", "lmdb belongs to environment, lmdb_errors"),
        ("store", "import msgpack", "msgpack belongs to plain_map, schema"),
        ("store", "from bitarray import bitarray", "bitarray belongs to bits, lane"),
        ("store", "import socket", "socket belongs to nbd"),
        ("export", "import ssl", "ssl belongs to nbd"),
        ("export", "import selectors", "selectors belongs to nbd"),
        ("export", "import click", "click belongs to cli"),
        ("export", "from rich.table import Table", "rich belongs to cli"),
        ("cli.main", "import argparse", "argparse belongs to nobody"),
        ("cli.main", "import lmdb", "lmdb belongs to environment, lmdb_errors"),
        ("export", "f()", "a Expr statement runs at import"),
        ("export", "for i in range(3): pass", "a For statement runs at import"),
        ("export", "try:\n    import lzma\nexcept ImportError: pass", "a Try statement runs at import"),
        ("export", "HELD = open('/etc/passwd')", "open is called at import"),
        ("export", "import os\nHERE = os.getcwd()", "os.getcwd is called at import"),
        ("export", "from subprocess import run\nX: int = len([run('true')])", "subprocess.run is called"),
        ("export", "import time\nassert time.time() > 0", "time.time is called at import"),
        ("export", "import threading\nT = threading.Thread()", "threading.Thread is called at import"),
    ],
)  # fmt: skip
def test_a_breach_is_named(module: str, source: str, said: str) -> None:
    found = breaches(module, FUTURE + source, MODULES)
    assert len(found) == 1
    assert said in found[0]


@pytest.mark.parametrize(
    ("imports", "statement", "name"),
    [
        ("", "print()", "print"),
        ("", "raise SystemExit(1)", "SystemExit"),
        ("import sys", "sys.exit(1)", "sys.exit"),
        ("from sys import exit as leave", "leave(1)", "sys.exit"),
        ("import sys", "sys.stdout.write('')", "sys.stdout"),
        ("import os", "os.environ.get('HOME')", "os.environ"),
        ("import os as o", "o.environ['HOME']", "os.environ"),
        ("from os import environ", "environ['HOME']", "os.environ"),
        ("import os", "os.getenv('HOME')", "os.getenv"),
        ("import os", "os.fork()", "os.fork"),
        ("import logging", "logging.basicConfig()", "logging.basicConfig"),
        ("import signal", "signal.signal(1, 2)", "signal.signal"),
    ],
)
def test_the_library_leaves_the_process_alone(imports: str, statement: str, name: str) -> None:
    source = f"{FUTURE}{imports}\ndef f() -> None:\n    {statement}\n"
    assert breaches("export", source, MODULES) == [f"line 4: {name} belongs to cli/"]
    assert breaches("cli.main", source, MODULES) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("errors", ""),
        ("errors", '"""Only prose."""\nVERSION = "1"'),
        (
            "records",
            FUTURE + "import lmdb, os\nfrom lmdbitmap import errors\nWORD = getattr(os, 'O_PATH', 0)",
        ),
        ("format", FUTURE + "import struct\nHEADER = struct.Struct('<Q')\nassert HEADER.size == 8"),
        (
            "geometry",
            FUTURE + "import threading, logging\nlock = threading.Lock()\nlog = logging.getLogger(__name__)",
        ),
        ("geometry", FUTURE + "def parse(print: str) -> None:\n    self.exit()\n    os.fsync(3)"),
        ("nbd.server", FUTURE + "import socket, ssl, selectors\nfrom lmdbitmap.filter import Filter"),
        ("cli.main", FUTURE + "import click, sys\nfrom lmdbitmap.cli.sizes import size\nprint(sys.argv)"),
        ("", FUTURE + "from lmdbitmap.filter import Filter"),
        ("cli", FUTURE + "from lmdbitmap import Filter"),
    ],
)
def test_what_is_allowed_is_not_reported(module: str, source: str) -> None:
    assert breaches(module, source, MODULES) == []


@pytest.mark.parametrize(
    "source", ["import os", "def f() -> None: ...", '"""Prose."""\nimport os\n' + FUTURE, "x: int = 1"]
)
def test_annotations_must_be_late_from_the_first_line(source: str) -> None:
    assert any("comes first" in line for line in breaches("errors", source, MODULES))


def test_a_cycle_is_found_and_a_diamond_is_none() -> None:
    assert _import_cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c", "a"]
    assert _import_cycle({"a": {"b", "c"}, "b": {"d"}, "c": {"d"}, "d": set()}) == []


def test_design_says_where_every_module_lives() -> None:
    """Its table of floors is how a newcomer finds a line; `qcow2/` and `cli/` stand for what is in them."""
    design = (PACKAGE.parent / "DESIGN.md").read_text()
    table = design.split("## The house")[1].split("\n## ")[0]
    places = [path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if path.name != "__main__.py"]
    names = {f"{place.parts[0]}/" if place.parts[0] in ("cli", "qcow2") else str(place) for place in places}
    names -= {"nbd/__init__.py"}
    assert {name for name in names if f"`{name}`" not in table} == set()
    assert len(names) > 50
