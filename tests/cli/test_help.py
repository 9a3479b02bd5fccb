"""Every verb explains itself, with an example that it would understand."""

from __future__ import annotations

import shlex
import subprocess
import sys

import click
import pytest

from lmdbitmap.cli.group import verbs
from lmdbitmap.cli.options import Session, Verb
from tests.cli.conftest import ALL_VERBS, CONTEXT, Cli, verb_named


def test_the_verbs_are_those_that_were_promised() -> None:
    assert {
        "add",
        "ls",
        "info",
        "serve",
        "checkpoint",
        "changes",
        "mark",
        "forget",
        "adopt",
        "rm",
        "check",
        "combine",
    } <= set(ALL_VERBS)


def test_a_verb_is_imported_without_the_others() -> None:
    said = "import sys; from lmdbitmap.cli.main import run; run(['forget', '--help']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True)
    modules = {name for name in done.stdout.split() if name.startswith("lmdbitmap.cli.")}
    assert "lmdbitmap.cli.points" in modules
    assert not modules & {"lmdbitmap.cli.serve", "lmdbitmap.cli.backups", "lmdbitmap.cli.mount"}


@pytest.mark.parametrize("name", ALL_VERBS)
def test_a_verb_has_help_with_an_example(cli: Cli, name: str) -> None:
    said = cli.ok(name, "--help")
    assert f"Usage: lmdbitmap {name} " in said
    assert "Examples:\n  $ lmdbitmap " in said
    assert "--store DIR" in said


@pytest.mark.parametrize("name", ALL_VERBS)
def test_the_examples_would_be_understood(name: str) -> None:
    command = verb_named(name)
    assert isinstance(command, Verb)
    assert command.examples
    for example in command.examples:
        program, called, *words = shlex.split(example)
        assert (program, called) == ("lmdbitmap", name)
        command.make_context(name, words, obj=Session("store"))


@pytest.mark.parametrize("name", ALL_VERBS)
def test_the_list_of_verbs_cuts_no_sentence(cli: Cli, name: str) -> None:
    command = verb_named(name)
    assert not command.get_short_help_str(62).endswith("...")
    assert command.get_short_help_str(62) in verbs.get_help(CONTEXT)


@pytest.mark.parametrize("name", ALL_VERBS)
def test_a_verb_without_its_words_is_not_understood(cli: Cli, name: str) -> None:
    if any(isinstance(p, click.Argument) and p.required for p in verb_named(name).params):
        assert f"see 'lmdbitmap {name} --help'" in cli.fails(2, name)
    else:
        assert f"see 'lmdbitmap {name} --help'" in cli.fails(2, name, "--superfluous")
