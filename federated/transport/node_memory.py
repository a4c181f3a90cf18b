"""What a relay's node knows after a restart: its number at the SuperLink, and which messages it has answered."""

import contextlib
import json
from pathlib import Path

_MOST_ANSWERED = 64  # a message that is sent again comes soon


class NodeMemory:
    """A small file. Where it is lost or can't be written, a restart takes longer, and no more.

    Args:
        path: is read where it is there.
    """

    def __init__(self, path: Path) -> None:
        self._path, self.node, self._answered = path, 0, list[str]()
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            found = json.loads(path.read_bytes())
            node, answered = int(found["node"]), [str(name) for name in found["answered"]]
            self.node, self._answered = node % 2**64, answered[-_MOST_ANSWERED:]

    def is_node(self, number: int) -> None:
        """Notes the node's number."""
        if number != self.node:
            self.node, self._answered = number, []
            self._write()

    def has_answered(self, message_id: str) -> None:
        """Notes that a reply is whole at the SuperLink."""
        self._answered = [*self._answered, message_id][-_MOST_ANSWERED:]
        self._write()

    @property
    def answered(self) -> set[str]:
        """The messages that were answered last."""
        return set(self._answered)

    def _write(self) -> None:
        part = self._path.with_suffix(".part")
        with contextlib.suppress(OSError):
            part.write_text(json.dumps({"node": self.node, "answered": self._answered}), encoding="utf-8")
            part.replace(self._path)
