"""The one place where lines are printed for people.

Names of runs and silos, messages of refusals, words of a model: strangers choose them, and a terminal obeys what it is
shown. So every line passes ``printable``. A test over the source checks that nothing else prints, except for the tables
and bars of ``cluster/monitoring/console.py``.
"""

import errno
import io
import json
import os
import sys
from unicodedata import category

import typer

from configs.errors import SiloweaveError

# The joiners shape Indic and Persian letters, and make one emoji of several.
_OF_WRITING = "\n\t\N{ZERO WIDTH NON-JOINER}\N{ZERO WIDTH JOINER}"


def printable(text: str) -> str:
    """The text, with what is not shown as itself escaped: control characters, line ends, marks of direction."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


FIGURES = {
    "bits_per_char": "bits per character",
    "accuracy": "accuracy",
    "loss": "nats per example",
    "nats_per_token": "nats per token of an answer",
    "macro_f1": "macro F1",
    "entity_f1": "entity F1",
    "answer_f1": "answer F1",
    "exact_match": "exact match",
    "answer_chrf": "chrF of an answer",
}
"""How people call the figures that machines find under these names."""


def rounded(value: float | None) -> str:
    """A figure for people; there is none of no records, and of a model that has diverged."""
    return "not available" if value is None else f"{value:.3f}"


def to_json(value: object) -> str:
    """A value for machines in ASCII, on one line. JSON leaves one control character as it is: DEL."""
    return json.dumps(value).replace("\x7f", "\\u007f")


def say(*lines: str, err: bool = False) -> None:
    """Prints lines. A line end inside one is escaped, so that none can pass for two."""
    for line in lines:
        _write(f"{printable(line)}\n", err=err)


def escape_unencodable() -> None:
    """Has both streams, whoever writes there, escape what their encoding has no sign for."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _write(text: str, *, err: bool) -> None:
    stream = sys.stderr if err else sys.stdout
    try:
        if stream is not None:
            typer.echo(text, file=stream, nl=False)
        elif not err:  # a result that nobody gets is a failure; who closes standard error wants no words
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    except BrokenPipeError:
        raise  # `| head` has seen enough: the command ends without a word
    except OSError as error:
        name = "error" if err else "output"
        raise SiloweaveError(
            f"standard {name} can't be written ({error.strerror}); give a terminal, or a file with room"
        ) from None


def answer(as_json: bool, document: object, *lines: str) -> None:
    """Prints a command's result, for machines or for people."""
    say(*([to_json(document)] if as_json else lines))


def stream(text: str, *, err: bool = False) -> None:
    """Prints a piece of a longer text, whose line ends, tabs, blanks of all widths and joiners are its own."""
    shown = "".join(c if c in _OF_WRITING or category(c) == "Zs" else printable(c) for c in text)
    _write(shown, err=err)


def confirmed(question: str) -> bool:
    """Asks a person."""
    return typer.confirm(printable(question))
