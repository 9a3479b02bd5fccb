"""Run all benchmarks: a table for people on stdout, the same as JSON in benchmarks/results/latest.json.

    make bench                     everything, about twenty minutes
    make bench ARGS="core"         only benchmarks/core.py, or another one of PARTS

Ratios are measured against a peer in the same run. The machine and the date are part of the JSON.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks import backups, chains, compressed, core, live, restarts, restored, tracked
from benchmarks.table import Line, as_text, write_json

ROOT = Path(__file__).resolve().parent.parent

PARTS: dict[str, Callable[[], Iterator[Line]]] = {
    "core": core.measure,
    "tracked": tracked.measure,
    "compressed": compressed.measure,
    "backups": backups.measure,
    "restored": restored.measure,
    "chains": chains.measure,
    "live": live.measure,
    "restarts": restarts.measure,
}
RESULTS = ROOT / "benchmarks" / "results"


def main(names: list[str]) -> None:
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        sys.exit(f"{unknown[0]!r} is no part: {', '.join(PARTS)}")
    lines = []
    for name in names or list(PARTS):
        for line in PARTS[name]():
            lines.append(line)
            print(as_text([line]).splitlines()[-1], file=sys.stderr, flush=True)
    RESULTS.mkdir(exist_ok=True)
    write_json(lines, RESULTS / "latest.json")
    (RESULTS / "machine.json").write_text(json.dumps(machine(), indent=2) + "\n")
    print(as_text(lines))


def machine() -> dict[str, str]:
    """Return the machine and the date of the measurement."""
    models = [
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")
    ]
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "python": platform.python_version(),
        "kernel": platform.release(),
        "processor": models[0].partition(": ")[2] if models else platform.machine(),
        "cores": str(os.cpu_count()),
    }


if __name__ == "__main__":
    main(sys.argv[1:])
