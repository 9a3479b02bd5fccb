"""Every verb explains itself, with an example that it would understand."""

from __future__ import annotations

import shlex

import click
import pytest

from lmdbitmap.cli.group import verbs
from lmdbitmap.cli.options import Session, Verb
from tests.cli.conftest import Cli

ALL = sorted(verbs.commands)


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
    } <= set(ALL)


@pytest.mark.parametrize("name", ALL)
def test_a_verb_has_help_with_an_example(cli: Cli, name: str) -> None:
    said = cli.ok(name, "--help")
    assert f"Usage: lmdbitmap {name} " in said
    assert "Examples:\n  $ lmdbitmap " in said
    assert "--store DIR" in said


@pytest.mark.parametrize("name", ALL)
def test_the_examples_would_be_understood(name: str) -> None:
    command = verbs.commands[name]
    assert isinstance(command, Verb)
    assert command.examples
    for example in command.examples:
        program, called, *words = shlex.split(example)
        assert (program, called) == ("lmdbitmap", name)
        command.make_context(name, words, obj=Session("store"))


@pytest.mark.parametrize("name", ALL)
def test_the_list_of_verbs_cuts_no_sentence(cli: Cli, name: str) -> None:
    command = verbs.commands[name]
    context = click.Context(verbs)
    assert not command.get_short_help_str(62).endswith("...")
    assert command.get_short_help_str(62) in verbs.get_help(context)


@pytest.mark.parametrize("name", ALL)
def test_a_verb_without_its_words_is_not_understood(cli: Cli, name: str) -> None:
    if any(isinstance(p, click.Argument) and p.required for p in verbs.commands[name].params):
        assert f"see 'lmdbitmap {name} --help'" in cli.fails(2, name)
    else:
        assert f"see 'lmdbitmap {name} --help'" in cli.fails(2, name, "--superfluous")
