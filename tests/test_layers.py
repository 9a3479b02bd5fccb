"""The law of the house: a module imports only from its own room and those below it, and keeps to what it may do.

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

ROOMS: tuple[tuple[str, ...], ...] = (
    ("errors", "extents", "geometry", "interfaces", "bits", "version"),
    ("work",),
    ("qcow2",),
    ("system",),
    ("nbd",),
    ("nbd.client",),
    ("images",),
    ("storage", "store"),
    ("notes",),
    ("tracker", "filter"),
    ("upkeep",),
    ("nbd.server",),
    ("copying",),
    ("repository",),
    ("targets",),
    ("restoring",),
    ("access",),
    ("flat_file", "format", "export"),
    ("backups",),
    ("streams",),
    ("syncs",),
    ("nbd.control",),
    ("render",),
    ("",),
    ("cli",),
    ("__main__",),
)
"""From the ground up. A room is a folder and the modules beside it that are named with it; a folder in a folder is a
room of its own. What is listed nowhere has no room, and breaks the law: say first where it belongs."""

HEIGHTS = {name: height for height, room in enumerate(ROOMS) for name in room}

PRIVATE_LIBRARIES: dict[str, set[str]] = {
    "lmdb": {"storage"},
    "msgpack": {"storage.schema", "flat_file.plain_map"},
    "bitarray": {"bits", "tracker.lane"},
    "compression": {"qcow2.compression"},
    "backports": {"qcow2.compression"},
    "blake3": {"copying.digest_algorithms"},
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
    if _room(module) is None:
        return [f"{module} has no room: list it in ROOMS"]
    return [
        *_wrong_rooms(module, tree, modules),
        *_foreign_libraries(module, tree),
        *_surface_business(module, tree),
        *_import_time_effects(module, tree),
        *_late_annotations(tree),
        *_own_locks(tree),
    ]


def _room(module: str) -> int | None:
    """How many rooms lie below that of a module, or of the innermost folder that has one."""
    while module not in HEIGHTS and "." in module:
        module = module.rpartition(".")[0]
    return HEIGHTS.get(module)


def _within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def _wrong_rooms(module: str, tree: ast.Module, modules: set[str]) -> Iterator[str]:
    mine = _room(module)
    for line, name in _imports(tree):
        if name.startswith("."):
            yield f"line {line}: import of {name} is relative"
        elif _within(name, "lmdbitmap"):
            theirs = _room(_own_module(name, modules))
            if mine is None or theirs is None or theirs > mine:
                yield f"line {line}: {name} is in a room above that of {module}"


def _own_module(name: str, modules: set[str]) -> str:
    """The module that an imported name, `lmdbitmap.store.Store`, lives in: `store`."""
    inside = name.removeprefix("lmdbitmap").removeprefix(".")
    known = modules | HEIGHTS.keys()
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


def _own_locks(tree: ast.Module) -> Iterator[str]:
    """A condition lets go of its lock in Python, and a signal right before that leaves it held for ever.

    So a condition gets a lock, whose own `with`, done in C, is used instead.
    """
    for node in ast.walk(tree):
        is_condition = isinstance(node, ast.Call) and _dotted(node.func) == "threading.Condition"
        if isinstance(node, ast.Call) and is_condition and not node.args:
            yield f"line {node.lineno}: a condition without a lock for `with`"


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


def test_no_imports_go_in_a_circle() -> None:
    imports = {
        module: {
            _own_module(name, set(SOURCES))
            for _, name in _imports(ast.parse(source))
            if _within(name, "lmdbitmap")
        }
        for module, source in SOURCES.items()
    }
    assert sum(map(len, imports.values())) > 500
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
    "nbd.protocol",
    "nbd.server.server",
    "storage.schema",
    "storage.records",
}
FUTURE = "from __future__ import annotations\n"


@pytest.mark.parametrize(
    ("module", "source", "said"),
    [
        ("attic", "", "no room"),
        ("attic.trunk", "", "no room"),
        ("geometry", "import lmdbitmap.store", "lmdbitmap.store is in a room above that of geometry"),
        ("geometry", "from lmdbitmap import store", "lmdbitmap.store is in a room above"),
        ("geometry", "from lmdbitmap.store import Store", "lmdbitmap.store.Store is in a room above"),
        ("geometry", "from lmdbitmap import __version__", "lmdbitmap.__version__ is in a room above"),
        ("geometry", "def late() -> None:\n    import lmdbitmap.store", "in a room above"),
        ("geometry", "if TYPE_CHECKING:\n    import lmdbitmap.store", "in a room above"),
        ("nbd.protocol", "from lmdbitmap.nbd.server.server import Server", "in a room above"),
        ("nbd.client.link", "import lmdbitmap.storage", "in a room above"),
        ("store", "from lmdbitmap.cli.main import main", "in a room above that of store"),
        ("store", "from . import errors", "relative"),
        ("filter", "import lmdb", "lmdb belongs to storage"),
        ("bits", "from lmdb import Environment as E", "lmdb belongs to storage"),
        ("store", "import msgpack", "msgpack belongs to flat_file.plain_map, storage.schema"),
        ("store", "from bitarray import bitarray", "bitarray belongs to bits, tracker.lane"),
        ("store", "import socket", "socket belongs to nbd"),
        ("export", "import ssl", "ssl belongs to nbd"),
        ("export", "import selectors", "selectors belongs to nbd"),
        ("export", "import click", "click belongs to cli"),
        ("export", "from rich.table import Table", "rich belongs to cli"),
        ("cli.main", "import argparse", "argparse belongs to nobody"),
        ("cli.main", "import lmdb", "lmdb belongs to storage"),
        ("export", "f()", "a Expr statement runs at import"),
        ("export", "for i in range(3): pass", "a For statement runs at import"),
        ("export", "try:\n    import lzma\nexcept ImportError: pass", "a Try statement runs at import"),
        ("export", "HELD = open('/etc/passwd')", "open is called at import"),
        ("export", "import os\nHERE = os.getcwd()", "os.getcwd is called at import"),
        ("export", "from subprocess import run\nX: int = len([run('true')])", "subprocess.run is called"),
        ("export", "import time\nassert time.time() > 0", "time.time is called at import"),
        ("export", "import threading\nT = threading.Thread()", "threading.Thread is called at import"),
        ("export", "import threading\nC = threading.Condition()", "a condition without a lock"),
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
            "storage.records",
            FUTURE + "import lmdb, os\nfrom lmdbitmap import errors\nWORD = getattr(os, 'O_PATH', 0)",
        ),
        ("format", FUTURE + "import struct\nHEADER = struct.Struct('<Q')\nassert HEADER.size == 8"),
        (
            "geometry",
            FUTURE + "import threading, logging\nlock = threading.Lock()\nlog = logging.getLogger(__name__)",
        ),
        ("geometry", FUTURE + "def parse(print: str) -> None:\n    self.exit()\n    os.fsync(3)"),
        ("nbd.server.server", FUTURE + "import socket, ssl, selectors\nfrom lmdbitmap.filter import Filter"),
        ("cli.main", FUTURE + "import click, sys\nfrom lmdbitmap.cli.sizes import size\nprint(sys.argv)"),
        ("storage.records", FUTURE + "from lmdbitmap.storage.schema import Disk"),
        ("store", FUTURE + "from lmdbitmap.storage import records"),
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


def test_design_describes_every_room_from_the_top_down() -> None:
    """Its table is how a newcomer finds a line."""
    design = (PACKAGE.parent / "DESIGN.md").read_text()
    table = design.split("## The house")[1].split("\n## ")[0]
    rows = [line.split("|")[1].split() for line in table.splitlines() if line.startswith("| `")]
    told = [{name.strip("`") for name in row} for row in rows]
    rooms = [{_on_disk(name) for name in room} for room in reversed(ROOMS)]
    assert told == rooms


def _on_disk(name: str) -> str:
    if not name:
        return "__init__.py"
    path = name.replace(".", "/")
    return f"{path}/" if (PACKAGE / path).is_dir() else f"{path}.py"


def test_every_folder_says_what_it_is_for() -> None:
    folders = {
        name: source for name, source in SOURCES.items() if (PACKAGE / name.replace(".", "/")).is_dir()
    }
    assert len(folders) > 20
    assert [name for name, source in folders.items() if not ast.get_docstring(ast.parse(source))] == []
