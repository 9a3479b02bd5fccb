"""Make a tree of newer NBD and libvirt programs for tests: those of the Debian release after 12.

    python tools/newer.py FOLDER      makes FOLDER/bin/qemu-img and the others, unless they are there

Nothing is installed, and root is not needed. apt fetches the packages and all their dependencies from this machine's
mirror, with a separate state, and proves their signatures with Debian's keyring; then they are unpacked. The programs
run with the libraries of their own tree. Needs apt-get and dpkg-deb, and Debian's keyring.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

RELEASE = "trixie"
PACKAGES = ("qemu-utils", "libnbd-bin", "python3-libnbd", "libvirt-clients", "libxml2-utils")
ALONE = ("libvirt-daemon-driver-qemu",)
"""Packages without their dependencies. Tests need only the daemon's part that builds a QEMU command line and starts it.
"""
PROGRAMS = ("qemu-img", "qemu-io", "qemu-nbd", "nbdinfo", "nbdcopy", "xmllint", "virt-qemu-run")
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
KEY = f"{RELEASE}: {' '.join(PACKAGES + ALONE)}: {' '.join(PROGRAMS)}, 1\n"
"""What a tree was made from; a tree with another key is made anew."""
RUN = """#!/bin/sh
# {name} of Debian {release}, with the libraries of its own tree.
tree=$(dirname "$0")/..
{environment}exec "$tree/{loader}" --library-path "$tree/{libraries}" --argv0 {name} "$tree/{program}" {arguments}"$@"
"""
PYTHON = """export PYTHONHOME="$tree/usr" PYTHONPATH="$tree/usr/lib/python3/dist-packages" PYTHONDONTWRITEBYTECODE=1
"""


def main(folder: Path) -> None:
    """Make the tree under a temporary name, and rename it when it is whole."""
    if key_of(folder) == KEY:
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as name:
        work = Path(name)
        tree = work / "tree"
        for package in fetched(work / "apt"):
            subprocess.run(["dpkg-deb", "-x", package, tree], check=True)
        add_programs(tree)
        (tree / "key").write_text(KEY)
        put_in_place(tree, folder, work / "older")


def put_in_place(tree: Path, folder: Path, aside: Path) -> None:
    """Rename the tree to `folder`, so that there is never half a tree; an older one is moved to `aside` as a whole.

    A tree that another run made meanwhile stays, because a test may use it already.
    """
    if key_of(folder) == KEY:
        return
    with contextlib.suppress(FileNotFoundError):
        os.rename(folder, aside)
    os.rename(tree, folder)


def key_of(folder: Path) -> str | None:
    try:
        return (folder / "key").read_text()
    except OSError:
        return None


# --- packages ---


def fetched(place: Path) -> list[Path]:
    """Fetch the packages and all their dependencies, as for a machine on which nothing is installed."""
    for folder in ("state/lists/partial", "cache/archives/partial"):
        (place / folder).mkdir(parents=True)
    (place / "status").touch()
    (place / "newer.sources").write_text(
        f"Types: deb\nURIs: {mirror()}\nSuites: {RELEASE}\nComponents: main\nSigned-By: {KEYRING}\n"
    )
    options = apart(place)
    apt(*options, "update")
    apt(*options, "install", "--yes", "--download-only", "--no-install-recommends", *PACKAGES)
    archives = place / "cache/archives"
    apt(*options, "download", *ALONE, cwd=archives)
    return sorted(archives.glob("*.deb"))


def mirror() -> str:
    """Return the URI of the mirror from which this machine gets Debian."""
    told = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE)", "Created-By: Packages"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    places = [line.split() for line in told.stdout.splitlines()]
    for uri, release in places:
        if "-" not in release and uri.rstrip("/").endswith("/debian"):
            return uri
    raise SystemExit("newer: apt's sources name no mirror of Debian")


def apart(place: Path) -> list[str]:
    """Return options with which apt uses nothing of this machine's configuration but how to reach the mirror."""
    settings = {
        "Dir::State": place / "state",
        "Dir::State::status": place / "status",
        "Dir::Cache": place / "cache",
        "Dir::Etc::sourcelist": place / "newer.sources",
        "Dir::Etc::sourceparts": "/dev/null",
        "Dir::Etc::preferencesparts": "/dev/null",
        "Dir::Etc::preferences": "/dev/null",
        "APT::Sandbox::User": "root",
        "Acquire::Languages": "none",
        "Acquire::AllowInsecureRepositories": "false",
    }
    return [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]


def apt(*words: str, cwd: Path | None = None) -> None:
    done = subprocess.run(
        ["apt-get", "-qq", *words], capture_output=True, text=True, stdin=subprocess.DEVNULL, cwd=cwd
    )
    if done.returncode:
        raise SystemExit(f"newer: apt-get could not fetch Debian {RELEASE}'s programs: {done.stderr.strip()}")


# --- programs ---


def add_programs(tree: Path) -> None:
    (tree / "bin").mkdir()
    for name in PROGRAMS:
        add_program(tree, name, f"usr/bin/{name}")
    python = next(tree.glob("usr/bin/python3.??"))
    add_program(tree, "nbdsh", str(python.relative_to(tree)), environment=PYTHON, arguments="-m nbd ")


def add_program(tree: Path, name: str, program: str, *, environment: str = "", arguments: str = "") -> None:
    loader = next(tree.glob("usr/lib*/ld-linux*.so.?"))
    libraries = next(tree.glob("usr/lib/*/libnbd.so.0")).parent
    script = tree / "bin" / name
    words = RUN.format(
        name=name, release=RELEASE, environment=environment, program=program, arguments=arguments,
        loader=loader.relative_to(tree), libraries=libraries.relative_to(tree),
    )  # fmt: skip
    script.write_text(words)
    script.chmod(0o755)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
