"""A command that a signal ends, also where a library swallows what the signal raises."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

_AGAIN_S = 1.0
_STATUS = 128 + signal.SIGTERM
_told: list[int] = []  # the signals that are to end this process, until one has come through


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Lets SIGINT raise KeyboardInterrupt, and SIGTERM SystemExit, in what runs in here: until it comes through.

    A bare ``except`` around an import, a weak reference's callback and ``__del__`` swallow whatever is raised in them.
    The command would then go on as if nobody had said a word. What Python says of an error that it ignores is noise
    from then on, and only ``--debug`` shows it.
    """
    signal.signal(signal.SIGTERM, _signalled)
    signal.signal(signal.SIGALRM, _not_heard)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a background job's is ignored, and stays so
        signal.signal(signal.SIGINT, _signalled)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def came_through() -> None:
    """What a signal has raised was caught by whoever it was for, and the command goes on."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    sys.unraisablehook = sys.__unraisablehook__
    _told.clear()


def _signalled(number: int, _: Any) -> None:
    if _told and number == signal.SIGTERM:
        return  # ending takes a moment
    _told.append(number)
    if not os.environ.get("SILOWEAVE_DEBUG"):
        sys.unraisablehook = lambda _: None
    signal.setitimer(signal.ITIMER_REAL, _AGAIN_S, _AGAIN_S)
    _end(number)


def _not_heard(*_: Any) -> None:
    if _told and not _is_ending(sys.exc_info()[1]):
        _end(_told[-1])


def _end(number: int) -> NoReturn:
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(_STATUS)


def _is_ending(handled: BaseException | None) -> bool:
    """Whether the process is on its way out: what is handled at the moment is what a signal raised, or came of it."""
    chain, met = [handled], set[int]()
    while chain:
        error = chain.pop()
        if error is None or id(error) in met:
            continue
        if isinstance(error, KeyboardInterrupt) or (isinstance(error, SystemExit) and error.code == _STATUS):
            return True
        met.add(id(error))
        chain += [error.__cause__, error.__context__]
    return False
