"""Who has answered in which phase of the newest secure sum, on disk before anything is made of it.

Silos answer a repeated request by what they have answered before, and no other message of the same phase. So a
coordinator that died asks the same silos again, phase by phase, and is told the same sum.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.errors import InputError
from configs.parse import json_object, reading
from configs.storage.files import write_atomic
from configs.storage.layout import SECURE_SUM
from privacy.secagg.messages import Phase

_FIX = "delete it: the round is asked for again then, and lost where its sum had begun"


@dataclass
class SumRecord:
    """The newest sum of a federation's directory.

    Attributes:
        directory: the federation's.
        name: of the file there: rounds have one, and private evaluations another.
        round: the sum's, or the evaluation's number; 0 where there was none.
        answered: names of the silos whose messages of a phase were passed on, by phase.
        lost: why it can't be had any more; empty where it may.
        clip: what an evaluation's request says of its values, whoever is there after a restart; 0 of a round.

    Raises:
        InputError: what is on disk can't be read.
    """

    directory: Path
    name: str = SECURE_SUM
    round: int = field(init=False, default=0)
    answered: dict[Phase, list[str]] = field(init=False, default_factory=dict)
    lost: str = field(init=False, default="")
    clip: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        path = self.directory / self.name
        if not path.exists():
            return
        with reading(path, _FIX):
            found = json_object(path.read_bytes(), str(path))
            self.round, self.lost = int(found["round"]), str(found["lost"])
            self.clip = float(found.get("clip", 0.0))
            self.answered = {Phase(int(phase)): list(map(str, names)) for phase, names in found["answered"].items()}

    def begin(self, round_number: int, clip: float = 0.0) -> None:
        """Goes on with a sum, whose clip stays, or begins it.

        Raises:
            InputError: a later round was begun before: what silos sent of this one is no longer kept.
            SiloweaveError: the disk is full or not writable.
        """
        if round_number < self.round:
            raise InputError(
                f"{self.directory}: its newest sound commit is of round {round_number - 1}, and round {self.round} was "
                "added up under masks, which silos do once; put the backup of the commits in between back"
            )
        if round_number > self.round:
            self.round, self.answered, self.lost, self.clip = round_number, {}, "", clip
            self._write()

    def passed_on(self, phase: Phase, names: list[str]) -> None:
        """Keeps whose messages of a phase are about to be told to others.

        Raises:
            SiloweaveError: the disk is full or not writable.
        """
        self.answered[phase] = names
        self._write()

    def give_up(self, reason: str) -> None:
        """Keeps that the sum can't be had.

        Raises:
            SiloweaveError: the disk is full or not writable.
        """
        self.lost = reason
        self._write()

    def _write(self) -> None:
        answered = {str(int(phase)): names for phase, names in self.answered.items()}
        tree: dict[str, Any] = {"round": self.round, "answered": answered, "lost": self.lost, "clip": self.clip}
        write_atomic(self.directory / self.name, json.dumps(tree, sort_keys=True).encode())
