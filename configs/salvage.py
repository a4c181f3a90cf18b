"""What a run's files say, as far as they can be read; of each that can't, one line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from configs.errors import SiloweaveError
from configs.events import is_number, read_lines
from configs.parse import json_object, reading
from configs.storage.layout import FEDERATED

Found = TypeVar("Found")
Other = TypeVar("Other")
Figures = dict[str, Callable[[object], bool]]
_OPTIONAL = ("steps", "rounds", "gflop_per_s", "mfu", "peak_memory_bytes", "gpu_memory_bytes")


def _is_loss(value: object) -> bool:
    return is_number(value) or isinstance(value, float)  # one that diverges is no finite number


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


_STEP: Figures = {"step": is_number, "loss": _is_loss, "tokens": is_number, "seconds": is_number}
_ROUND: Figures = {"round": is_number, "answered": _is_names}
_FIGURES: dict[tuple[str, str], Figures] = {
    ("pretrain", "step"): _STEP,
    ("pretrain", "validation"): {"loss": _is_loss, "bits_per_char": lambda value: value is None or _is_loss(value)},
    (FEDERATED, "round"): _ROUND,
    ("federate", "round"): _ROUND,  # as the coordinator's own log has it
}
_END: Figures = {"seconds": is_number}


class Salvage:
    """Reads one thing after the other.

    Attributes:
        problems: a line for each that could not be read.
    """

    def __init__(self) -> None:
        self.problems: list[str] = []

    def tried(self, path: Path, look: Callable[[], Found], otherwise: Other) -> Found | Other:
        """What ``look`` finds in a file; where it can't be read, ``otherwise`` and a problem."""
        try:
            with reading(path, "it is left out here"):
                return look()
        except SiloweaveError as error:
            self._note(str(error))
        return otherwise

    def events(self, path: Path) -> list[dict[str, Any]]:
        """The events that have the figures of their kind."""
        lines = self.tried(path, lambda: read_lines(path), [])
        foreign = [number for number, event in enumerate(lines, 1) if event is None or not _has_figures(event)]
        if foreign:
            self._note(f"{path}: {len(foreign)} of {len(lines)} lines are no events of ours, line {foreign[0]} first")
        return [event for event in lines if event is not None and _has_figures(event)]

    def _note(self, problem: str) -> None:
        line = " ".join(problem.split())
        if line not in self.problems:
            self.problems.append(line)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from its file."""
    return json_object(path.read_bytes(), str(path))


def _has_figures(event: dict[str, Any]) -> bool:
    wanted = _FIGURES.get((event["stage"], event["event"]), _END if event["event"] == "end" else {})
    figures = all(check(event.get(name)) for name, check in wanted.items())
    others = all(event.get(name) is None or is_number(event[name]) for name in _OPTIONAL)
    return figures and others and (wanted is not _STEP or event["seconds"] > 0)
