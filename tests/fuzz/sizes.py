"""Sizes and names on the command line."""

from __future__ import annotations

import contextlib
import re

import click

from lmdbitmap.cli import options
from lmdbitmap.cli.sizes import format_size, parse_size
from lmdbitmap.errors import InvalidArgument
from tests.fuzz.inputs import Input, check_words

POWERS = {unit: 1024**power for power, unit in enumerate(" KMGTPE")}


def sizes(data: bytes) -> None:
    source = Input(data)
    number = source.number(8)
    text = source.rest().decode(errors="surrogateescape")
    check_text(text)
    shown = format_size(number)
    assert re.fullmatch(r"[0-9]+(\.[0-9])? ([KMGTPE]i)?B", shown)
    with contextlib.suppress(InvalidArgument):
        assert abs(parse_size(shown.replace(" ", "")) - number) <= number / 20
    assert number >= 2**63 or parse_size(str(number)) == number


def check_text(text: str) -> None:
    try:
        size = parse_size(text)
    except InvalidArgument as refusal:
        check_words(refusal)
    else:
        assert 0 <= size < 2**63
        assert size == worth(text)
    for kind in (options.size, options.granularity, options.names):
        with contextlib.suppress(click.BadParameter):
            kind(text)


def worth(text: str) -> int:
    """The digits as one integer, shifted by the decimals."""
    match = re.fullmatch(r"(\d+)\.?(\d*)([kmgtpe]?)(i?b)?", text.lower(), re.ASCII)
    assert match is not None
    whole, decimals, unit, _ = match.groups()
    numerator = int(whole + decimals) * POWERS[unit.upper() or " "]
    assert numerator % 10 ** len(decimals) == 0
    return int(numerator // 10 ** len(decimals))
