"""The one place where lines are printed for people.

Names of runs and silos, messages of refusals, words of a model: strangers choose them, and a terminal obeys what it is
shown. So every line passes ``printable``. Nothing else prints: a test over the source holds it.
"""

import json
from collections.abc import Callable

import typer


def printable(text: str) -> str:
    """The text with all that is not shown as itself escaped: control characters, line ends, marks of direction."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def say(*lines: str, err: bool = False) -> None:
    """Prints lines; a line end inside one is escaped, so that none can pass for two."""
    for line in lines:
        typer.echo(printable(line), err=err)


def say_json(value: object) -> None:
    """Prints a value for machines, in ASCII. JSON leaves one control character as it is: DEL."""
    typer.echo(json.dumps(value).replace("\x7f", "\\u007f"))


def stream(text: str, *, err: bool = False) -> None:
    """Prints a piece of a longer text, whose line ends and tabs are its own."""
    typer.echo("".join(c if c in "\n\t" else printable(c) for c in text), nl=False, err=err)


def confirmed(question: str) -> bool:
    """Asks a person."""
    return typer.confirm(printable(question))


def answer(lines: Callable[[], list[str]], document: object, *, as_json: bool) -> None:
    """A command's result, for machines or for people."""
    if as_json:
        say_json(document)
    else:
        say(*lines())
