"""How a coordinator's ServerApp ended, in a file of the run: `flwr run` reports success whatever happens."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from configs.errors import SiloweaveError
from configs.locks import locked, note_of_holder
from configs.parse import json_object, reading
from configs.storage.files import write_atomic

OUTCOME, LOCK = "outcome.json", "lock"


@dataclass(frozen=True)
class Outcome:
    """How one ServerApp ended.

    Attributes:
        flower_run: Flower's number of the run.
        exit_status: as of the command line: 0, 1, 2 or 3.
        message: the error's one line; empty where there was none.
    """

    flower_run: int
    exit_status: int = 0
    message: str = ""

    def require_success(self) -> None:
        """Raises the error with which it ended, with its exit status.

        Raises:
            SiloweaveError: it failed.
        """
        if self.exit_status:
            error = SiloweaveError(self.message)
            error.exit_status = self.exit_status
            raise error


@contextmanager
def recorded(directory: Path, flower_run: int) -> Iterator[None]:
    """Holds a run's directory while a ServerApp works there, and leaves how that ended.

    Waits for an earlier one that still works there: a ServerApp lives for some seconds after its SuperLink was killed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with locked(directory / LOCK, str(flower_run).encode(), wait=True):
        try:
            yield
        except SiloweaveError as error:
            _write(directory, Outcome(flower_run, error.exit_status, " ".join(str(error).split())))
            raise
        except Exception as error:
            _write(directory, Outcome(flower_run, 1, " ".join(f"{type(error).__name__}: {error}".split())))
            raise
        _write(directory, Outcome(flower_run))


def _write(directory: Path, outcome: Outcome) -> None:
    write_atomic(directory / OUTCOME, json.dumps(asdict(outcome)).encode())


def read_outcome(directory: Path, flower_run: int) -> Outcome | None:
    """How that ServerApp ended; None where it has not, or was killed.

    Raises:
        InputError: the file says something else.
    """
    path = directory / OUTCOME
    if not path.exists():
        return None
    with reading(path, "delete it; the run goes on from its newest round"):
        outcome = Outcome(**json_object(path.read_bytes(), str(path)))
        if not (isinstance(outcome.exit_status, int) and isinstance(outcome.message, str)):
            raise TypeError
    return outcome if outcome.flower_run == flower_run else None


def over_flower(directory: Path) -> bool:
    """Whether a run's rounds went over Flower to silos elsewhere: a ServerApp leaves its outcome, a simulation none."""
    return (directory / OUTCOME).exists()


def worked_on_by(directory: Path) -> int | None:
    """Flower's number of the run whose ServerApp works there now."""
    note = note_of_holder(directory / LOCK)
    return None if note is None else int(note) if note.isdigit() else 0
