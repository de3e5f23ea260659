"""How the findings of a preflight are shown: warnings, notes, and one example with its loss mask."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from posttrain.errors import Problem

Piece = tuple[str, bool]
"""A stretch of rendered text, and whether its tokens carry loss (of a reward model: whether it is scored)."""

_PIECES, _CHARACTERS = 8, 240


def print_findings(
    name: str, warnings: Sequence[Problem], notes: Sequence[str], example: Sequence[Piece], console: Console
) -> None:
    """Print a stage's warnings, notes and example."""
    for warning in warnings:
        _say(console, Text(f"warning: {warning}", style="yellow"))
    for note in notes:
        _say(console, Text(f"{name}: {note}"))
    if example:
        print_example(name, example, console)


def print_example(name: str, example: Sequence[Piece], console: Console) -> None:
    """Print one rendered row: supervised text green, the rest dim; between >>> and <<< without colours."""
    coloured = console.color_system is not None
    how = ", supervised text green" if coloured else ", supervised text between >>> and <<<"
    how = how if any(supervised for _, supervised in example) else ""
    _say(console, Text(f"{name}: one example as the model sees it{how}"))
    text = Text()
    for piece, supervised in short(example):
        if supervised and not coloured:
            piece = f">>>{piece}<<<"
        text.append(piece, style="green" if supervised else "dim")
    _say(console, text)


def short(example: Sequence[Piece]) -> list[Piece]:
    """The example with long pieces shortened in their middle, and all but the last few pieces left out."""
    kept = list(example[-_PIECES:])
    if len(kept) < len(example):
        kept.insert(0, ("... ", False))
    half = _CHARACTERS // 2
    return [
        (text if len(text) <= _CHARACTERS else f"{text[:half]} ... {text[-half:]}", supervised)
        for text, supervised in kept
    ]


def _say(console: Console, text: Text) -> None:
    console.print(text, soft_wrap=True)
