"""Generate docs/cli.md, docs/map.svg and parts of README.md; with --check, only test whether they are up to date.

docs/cli.md is the help of every command, and docs/map.svg is a picture that `show` draws.

In README.md a part stands between `<!-- NAME -->` and `<!-- end -->`. `session` is a shell session with a real server
that is killed in the middle of it. `speed` comes from the newest benchmark on this machine, and is left alone if there
is none. The comparison ignores sizes, times and names that differ from run to run.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from lmdbitmap import Filter, Store, add
from lmdbitmap.cli.main import run

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
REFERENCE = ROOT / "docs" / "cli.md"
PICTURE = ROOT / "docs" / "map.svg"
SERVE = "lmdbitmap serve sda --socket sda.sock &"
CRASH = "kill -9 %1"
SESSION = [
    "lmdbitmap add sda sda.raw                       # start tracking an image",
    SERVE + "        # the guest writes through NBD",
    "lmdbitmap backup sda backups                    # while it does; the first backup is a full one",
    "qemu-io -f raw -c 'write -q 1G 12M' -c 'write -q -z 1536M 256M' 'nbd+unix:///sda?socket=sda.sock'",
    CRASH + "                                      # the tracker dies without a word",
    "lmdbitmap changes sda",
    "lmdbitmap backup sda backups                    # compares what may have changed, and stores what did",
    "lmdbitmap restore backups sda new.raw",
    "cmp sda.raw new.raw && echo identical",
]


def session() -> str:
    """Run the README's session in a temporary folder; return every command with its output.

    The folder is on a disk, because a file system in memory has no zeroes other than holes.
    """
    with tempfile.TemporaryDirectory() as folder:
        with open(f"{folder}/sda.raw", "wb") as image:
            image.write(os.urandom(20 << 20))
            image.truncate(2 << 30)
        shown = ["```console"]
        server: subprocess.Popen[str] | None = None
        for line in SESSION:
            shown.append(f"$ {line}")
            command = line.partition("  #")[0].strip()
            if command == SERVE:
                server, printed = start_server(command.removesuffix(" &"), folder)
            elif command == CRASH and server is not None:
                server.kill()
                server.communicate()
                printed = ""
            else:
                printed = shell(command, folder)
            shown += printed.splitlines()
        return "\n".join([*shown, "```"])


def start_server(command: str, folder: str) -> tuple[subprocess.Popen[str], str]:
    """Start the server; return it and the two lines that it prints once it listens."""
    server = subprocess.Popen(
        command.split(), cwd=folder, env=environment(folder), stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    return server, "".join(server.stdout.readline().replace(folder, "…") for _ in range(2))


def shell(command: str, folder: str) -> str:
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def environment(folder: str) -> dict[str, str]:
    """Return the environment with our command first on the path, and a store in the folder."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {"PATH": path, "LMDBITMAP_STORE": f"{folder}/store"}


def speed() -> str:
    """Return lines of the newest benchmark with machine and date; if one is missing, the present text of the README."""
    wanted = [("NBD write 4k, depth 32", "qemu-nbd"), ("NBD write 4k, depth 32", "nbdkit file")]
    wanted += [("NBD read 1m, depth 4", "qemu-nbd"), ("NBD first touch, 64 GiB sparse", "untracked")]
    wanted += [("NBD first touch, 64 GiB sparse, --max-armed 32768", "untracked")]
    results = ROOT / "benchmarks" / "results"
    newest = results / "latest.json"
    rows_found = json.loads(newest.read_text()) if newest.exists() else []
    lines = {(row["name"], row["peer"]): row for row in rows_found}
    if not lines.keys() >= set(wanted):
        return between(README.read_text(), "speed")
    machine = json.loads((results / "machine.json").read_text())
    rows = [f"| {name} | {peer} | {lines[name, peer]['ratio']:.2f}x |" for name, peer in wanted]
    head = f"`make bench`, {machine['date']}, {machine['cores']} cores, Python {machine['python']}:"
    tail = (
        "First touch is the worst case: every write is the first to its block, and may wait for a synced commit. With"
        " `serve --max-armed` fewer wait, and a crash may count more as dirty."
    )
    return "\n".join([head, "", "| tracked | against | rate |", "|---|---|---|", *rows, "", tail])


PARTS: dict[str, Callable[[], str]] = {"session": session, "speed": speed}


def between(text: str, name: str) -> str:
    """Return the text between the marks of a part."""
    return text.partition(f"<!-- {name} -->\n")[2].partition("<!-- end -->")[0].rstrip("\n")


def replaced(text: str, name: str, part: str) -> str:
    before, mark, rest = text.partition(f"<!-- {name} -->\n")
    return before + mark + part + "\n<!-- end -->" + rest.partition("<!-- end -->")[2]


def alike(text: str) -> str:
    """Return `text` with everything that differs from run to run made equal.

    The list of extents is left out: how much is armed depends on how long the server lived.
    """
    text = re.sub(r"\n +\d+ .*", "", text)
    text = re.sub(r"backup-\d{8}T\d{6}Z-[0-9a-f]+", "backup-NAME", text)
    text = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "TIME", text)
    return re.sub(r"\d+(\.\d+)?( [KMGT]iB| s)", "N", text)


def command_line() -> str:
    """Return docs/cli.md: the output of `--help`, for the whole program and for every command."""
    whole = help_of()
    verbs = re.findall(r"^  ([a-z]+)  ", whole.partition("Commands:")[2], re.MULTILINE)
    pages = [f"## lmdbitmap {verb}\n\n```\n{help_of(verb)}```\n" for verb in verbs]
    return "\n".join([f"# The command line\n\nMade by `tools/documents.py`.\n\n```\n{whole}```\n", *pages])


def help_of(*words: str) -> str:
    """Return the output of `--help` for a command, without a new process for each."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert run([*words, "--help"]) == 0
    return said.getvalue()


def picture() -> str:
    """Return the picture that `show` draws of a disk with scattered writes, the same each time."""
    with tempfile.TemporaryDirectory() as folder:
        with open(f"{folder}/sda.raw", "wb") as image:
            image.truncate(40 << 30)
        with Store.create(f"{folder}/store") as store:
            add(store, "sda", f"{folder}/sda.raw", granularity_bits=16, durability="deferred")
            with Filter.attach(store, "sda", background=False) as disk:
                disk.checkpoint("monday")
                write_as_a_guest_does(disk)
        shell("lmdbitmap show sda --svg map.svg", folder)
        return Path(folder, "map.svg").read_text()


def write_as_a_guest_does(disk: Filter) -> None:
    """Mark one large file as dirty, and small ones around a few places."""
    disk.mark(23 << 29, 5 << 29)
    chance = random.Random(4)
    for number in range(400):
        place = (2, 5, 9, 17, 30, 31)[number % 6] << 30
        spread = int((chance.random() + chance.random() + chance.random() - 1.5) * (1 << 30))
        disk.mark(place + spread, (4 << 10, 1 << 20, 16 << 20)[number % 5 % 3])


def main(words: list[str]) -> int:
    os.environ["COLUMNS"] = "110"
    text = README.read_text()
    fresh = text
    for name in PARTS if "--check" not in words else ["session"]:
        fresh = replaced(fresh, name, PARTS[name]())
    made = {REFERENCE: command_line(), PICTURE: picture()}
    if "--check" in words:
        stale = [path for path, content in made.items() if content != path.read_text()]
        return int(alike(fresh) != alike(text) or stale != [])
    README.write_text(fresh)
    for path, content in made.items():
        path.write_text(content)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
