"""Coverage-guided fuzzing: `make fuzz`, or `python -m tests.fuzz [TARGET…] [--runs N]`; it needs atheris.

Each target runs in a process of its own, for libFuzzer leaves through the back door, under a limit of memory and
of time for one input. It begins with the corpus in the tests and with what earlier runs found, which is kept in
`build/fuzz/TARGET`. An input that fails is kept there too; `python -m tests.fuzz TARGET --input FILE` runs it alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.fuzz.inputs import MEMORY

FOUND = Path("build") / "fuzz"
MOST_INPUT_BYTES = 4096
MOST_SECONDS = 20
"""For one input; a busy machine is the measure, an input that does not end is the aim."""
MOST_RESIDENT_MIB = 600
MOST_ADDRESSES = 3 << 30
"""Bytes. An allocation in proportion to a lie fails with `MemoryError`, though it would not be touched."""
_HEAP = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}
"""Large buffers come from the heap and stay there: without it, the kernel clears pages for most of the time."""
_DONE = re.compile(r"#(\d+)\s+DONE\s+cov: (\d+) ft: (\d+) corp: (\d+)/")


def main(arguments: Sequence[str]) -> int:
    from tests.fuzz.targets import TARGETS

    parser = argparse.ArgumentParser(prog="make fuzz ARGS=…")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument(
        "--runs", type=int, help="inputs for each target; by default what each of them is worth"
    )
    parser.add_argument("--input", type=Path, help="run this one input, without atheris")
    asked = parser.parse_args(arguments)
    unknown = [name for name in asked.targets if name not in TARGETS]
    if unknown or (asked.input is not None and len(asked.targets) != 1):
        parser.error(f"name one of {', '.join(TARGETS)}")
    if asked.input is not None:
        TARGETS[asked.targets[0]].check(asked.input.read_bytes())
        return 0
    if importlib.util.find_spec("atheris") is None:
        parser.error("atheris is not installed; there is none for this Python, or: pip install -e '.[fuzz]'")
    names = asked.targets or list(TARGETS)
    failures = [name for name in names if not run(name, asked.runs or TARGETS[name].runs)]
    return 1 if failures else 0


def run(target: str, runs: int) -> bool:
    """Fuzz one target in a child, and print a line of figures or where the failing input is."""
    (FOUND / target).mkdir(parents=True, exist_ok=True)
    log, begun = FOUND / f"{target}.log", time.monotonic()
    in_memory = MEMORY if os.path.isdir(MEMORY) else None
    with (
        tempfile.TemporaryDirectory(prefix="lmdbitmap-fuzz-", dir=in_memory) as folder,
        open(log, "w") as told,
    ):
        command = [sys.executable, "-m", "tests.fuzz.child", target, str(runs)]
        ended = subprocess.run(
            command, stdout=told, stderr=told, env={**os.environ, **_HEAP, "TMPDIR": folder}
        )
    seconds = time.monotonic() - begun
    done = _DONE.search(log.read_text(errors="replace"))
    if ended.returncode or done is None:
        print(
            f"{target}: FAILED with exit code {ended.returncode} after {seconds:.0f} s; see {log}", flush=True
        )
        return False
    inputs, edges, features, kept = map(int, done.groups())
    print(
        f"{target}: {inputs} inputs in {seconds:.0f} s ({inputs / seconds:.0f}/s), "
        f"{edges} edges, {features} features, {kept} kept",
        flush=True,
    )
    return True


def limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MOST_ADDRESSES, MOST_ADDRESSES))


def options_of(target: str, runs: int) -> list[str]:
    """What libFuzzer is told: where to keep what it finds, where to begin, and when to stop."""
    return [
        str(FOUND / target),
        str(Path(__file__).parent / "corpus" / target),
        f"-artifact_prefix={FOUND / target}-",
        f"-runs={runs}",
        f"-max_len={MOST_INPUT_BYTES}",
        f"-timeout={MOST_SECONDS}",
        f"-rss_limit_mb={MOST_RESIDENT_MIB}",
    ]
