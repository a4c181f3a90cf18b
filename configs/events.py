"""``events.jsonl``: one line per event, appended as it happens; progress bars and the report read it."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from configs.storage.files import write_failure

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
    """The events so far, oldest first. A last line that a kill cut short is passed over."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            continue
        if stage is None or event.get("stage") == stage:
            yield event
