"""``events.jsonl``: one line per event, appended as it happens; progress bars and the report read it."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from configs.parse import reading
from configs.storage.files import write_failure

_LARGEST = 1e18  # of a figure: beyond it, and with what is not finite, nothing can be reckoned
Listener = Callable[[dict[str, Any]], None]


class EventLog:
    """Appends events to a file and passes each to the listeners (a progress bar, a plain line)."""

    def __init__(self, path: Path, listeners: tuple[Listener, ...] = ()) -> None:
        self.path = path
        self._listeners = listeners
        path.parent.mkdir(parents=True, exist_ok=True)

    def emit(self, stage: str, kind: str, **values: Any) -> None:
        """Records one event. ``values`` must be JSON and must not hold anything private."""
        event = {"time": round(time.time(), 3), "stage": stage, "event": kind, **values}
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(event) + "\n")
        except OSError as error:
            raise write_failure(self.path, error) from error
        for listener in self._listeners:
            listener(event)


def read_events(path: Path, stage: str | None = None) -> Iterator[dict[str, Any]]:
    """The events so far, oldest first. What is no event is passed over: a kill may have cut a line short.

    Raises:
        InputError: the file can't be read.
    """
    for event in read_lines(path):
        if event is not None and (stage is None or event["stage"] == stage):
            yield event


def read_lines(path: Path) -> list[dict[str, Any] | None]:
    """Each whole line so far, oldest first: its event, or None where it is none.

    Raises:
        InputError: the file can't be read.
    """
    with reading(path, "put an events.jsonl there that you may read, or none"):
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else [""]
    last = [event] if (event := _event(lines[-1])) else []  # it is being written, or was cut short
    return [_event(line) for line in lines[:-1]] + last


def _event(line: str) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    sound = isinstance(event, dict) and all(isinstance(event.get(name), str) for name in ("stage", "event"))
    return event if sound and is_number(event.get("time")) else None


def is_number(value: object) -> bool:
    """Whether it can be a figure of an event."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST
