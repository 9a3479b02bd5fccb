"""What a fork must not have is told so in the child, before anything else runs there, and only there."""

from __future__ import annotations

import sys

from tests.helpers.support import run

FORK = """
import gc, os
from lmdbitmap.work import forks

class Thing:
    def __init__(self, name):
        self.name = name
    def forsake(self):
        print("forsaken", self.name, flush=True)

kept, dropped = Thing("kept"), Thing("dropped")
for thing in (kept, dropped, kept):
    forks.is_not_for_children(thing)
del thing, dropped
gc.collect()
for generation in range(2):
    child = os.fork()
    if child == 0:
        print("child", flush=True)
        grandchild = os.fork()
        if grandchild:
            os.waitpid(grandchild, 0)
        os._exit(0)
    os.waitpid(child, 0)
    print("parent", flush=True)
"""


FAILING = """
import os
from lmdbitmap.work import forks

class Thing:
    def forsake(self):
        print("forsaken", flush=True)
        raise OSError("by intent")

things = [Thing() for _ in range(3)]
for thing in things:
    forks.is_not_for_children(thing)
for _ in range(2):
    child = os.fork()
    if child == 0:
        os._exit(len(forks._heirlooms))
    print(os.waitpid(child, 0)[1], flush=True)
"""


def test_everything_is_forsaken_although_something_fails() -> None:
    assert run(sys.executable, "-c", FAILING).stdout.split() == ["forsaken", "forsaken", "forsaken", "0"] * 2


def test_child_is_told_before_it_runs_and_once() -> None:
    said = run(sys.executable, "-c", FORK).stdout.splitlines()
    assert said == ["forsaken kept", "child", "parent"] * 2
