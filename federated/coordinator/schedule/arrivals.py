"""What buffered rounds have asked silos for and what has come, in that order, on disk before anything is made of it.

``arrivals.jsonl`` has a line for each request, each update, each request that was given up, and each step that has all
its updates. Beside it lie the replies of the newest two steps; earlier ones are in commits by now, and their silos keep
them, too. So whenever the coordinator dies, the same requests are asked again, the same updates make the same step in
the same order, and none is added twice.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from configs.parse import json_object, reading
from configs.storage.files import digest_bytes, write_atomic, write_failure
from configs.storage.layout import ARRIVALS, ARRIVED
from configs.storage.sealing import MasterKey, read_sealed, write_sealed
from federated.coordinator.round_commits import Task
from privacy.certificate.model_digests import RoundDigests, UpdateDigest

_FIX = "put its backup back, or delete it: what has come since the newest round is asked for again then"


class Arrivals:
    """The record of one run.

    Args:
        directory: the federation's.
        run_id: the run.
        key: encrypts the replies; None leaves them in the clear.

    Raises:
        InputError: the record can't be read.
    """

    def __init__(self, directory: Path, run_id: str, key: MasterKey | None = None) -> None:
        self._path, self._folder, self._run_id, self._key = directory / ARRIVALS, directory / ARRIVED, run_id, key
        self.tasks: dict[str, Task] = {}
        self._updates: list[tuple[int, UpdateDigest]] = []  # with the step that each went into, or will
        self._taken, self._begun, self._forgotten = 0, False, 0
        with reading(self._path, _FIX):
            for event in self._lines():
                self._happened(event)

    def go_on_from(self, digests: tuple[RoundDigests, ...], tasks: dict[str, Task]) -> None:
        """Starts from a commit: what the record has of later steps is done again, where it tells of the same run.

        Args:
            digests: of the committed rounds.
            tasks: what the silos were asked for last at the newest of them.

        Raises:
            SiloweaveError: the disk is full or not writable.
        """
        committed = [(step, update) for step, one in enumerate(digests, 1) for update in one.updates]
        if [found for found in self._updates if found[0] <= len(digests)] == committed and self._begun:
            return
        self.tasks, self._updates, self._taken = dict(tasks), committed, len(digests)
        lines: list[dict[str, Any]] = [{"run": self._run_id}]
        for step, update in committed:
            lines += [_asked(update.silo, update.round, update.version), _arrived(step, update)]
        for silo, task in tasks.items():
            lines += [_asked(silo, task.round, task.version), *([] if task.open else [{"ended": silo}])]
        lines.append({"taken": len(digests)})
        write_atomic(self._path, b"".join(map(_line, lines)))
        self._begun = True

    def asked(self, silo: str, round_number: int, version: int) -> Task:
        """Records a new request, before it is sent.

        Raises:
            SiloweaveError: the disk is full or not writable.
        """
        self._append(_asked(silo, round_number, version))
        return self.tasks[silo]

    def arrived(self, step: int, update: UpdateDigest, reply: bytes) -> None:
        """Records an update: the reply that brought it first, and then that it is there.

        Raises:
            SiloweaveError: the disk is full or not writable.
        """
        position = len(self._updates)
        self._folder.mkdir(exist_ok=True)
        write_sealed(self._reply_file(position), reply, self._key, self._context(position))
        self._append(_arrived(step, update))

    def ended(self, silo: str) -> None:
        """Records that a silo's request has brought nothing that can be used.

        Raises:
            SiloweaveError: the disk is full or not writable.
        """
        self._append({"ended": silo})

    def taken(self, step: int) -> None:
        """Records that a step has all that it is made of, also where that is less than usual.

        Raises:
            SiloweaveError: the disk is full or not writable.
        """
        if not self.was_taken(step):
            self._append({"taken": step})

    def was_taken(self, step: int) -> bool:
        """Whether a step had all that it is made of."""
        return step <= self._taken

    def of_step(self, step: int) -> list[tuple[int, UpdateDigest]]:
        """The updates that have come for a step, in their order, each with its place in the record."""
        return [(at, update) for at, (its_step, update) in enumerate(self._updates) if its_step == step]

    def reply(self, position: int, update: UpdateDigest) -> bytes | None:
        """The reply that brought an update; None where it is no longer kept, or is damaged.

        Raises:
            InputError: it was not written with this key.
        """
        path = self._reply_file(position)
        if not path.exists():
            return None
        found = read_sealed(path, self._key, self._context(position))
        return found if digest_bytes(found) == update.digest else None

    def forget_before(self, step: int) -> None:
        """Deletes the replies of earlier steps."""
        while self._forgotten < len(self._updates) and self._updates[self._forgotten][0] < step:
            self._reply_file(self._forgotten).unlink(missing_ok=True)
            self._forgotten += 1

    def _happened(self, event: dict[str, Any]) -> None:
        """Takes in a line. An update is of the silo's open request, which it closes: there is no second one.

        Raises:
            ValueError: it is not.
        """
        if "taken" in event:
            self._taken = int(event["taken"])
        elif "asked" in event:
            self.tasks[event["asked"]] = Task(int(event["round"]), int(event["version"]))
        elif "ended" in event:
            self.tasks[event["ended"]] = replace(self.tasks[event["ended"]], open=False)
        elif "arrived" in event:
            update = UpdateDigest.model_validate(event["arrived"])
            if self.tasks[update.silo] != Task(update.round, update.version):
                raise ValueError("an update that nobody waits for")
            self.tasks[update.silo] = replace(self.tasks[update.silo], open=False)
            self._updates.append((int(event["step"]), update))

    def _lines(self) -> Iterator[dict[str, Any]]:
        """A line that a kill has cut short is none: nothing was done after it."""
        content = self._path.read_bytes() if self._path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            os.truncate(self._path, len(whole))
        events = [json_object(line, str(self._path)) for line in whole.splitlines()]
        self._begun = events[:1] == [{"run": self._run_id}]
        return iter(events if self._begun else ())  # others are of a run that was here before

    def _append(self, event: dict[str, Any]) -> None:
        try:
            with self._path.open("ab") as file:
                file.write(_line(event))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise write_failure(self._path, error) from error
        self._happened(event)

    def _reply_file(self, position: int) -> Path:
        return self._folder / f"{position:06d}.reply"

    def _context(self, position: int) -> str:
        """Binds a sealed reply to its place."""
        return f"{self._run_id}/{self._folder.parent.name}/{ARRIVED}/{position}"


def _asked(silo: str, round_number: int, version: int) -> dict[str, Any]:
    return {"asked": silo, "round": round_number, "version": version}


def _arrived(step: int, update: UpdateDigest) -> dict[str, Any]:
    return {"arrived": update.model_dump(mode="json"), "step": step}


def _line(event: dict[str, Any]) -> bytes:
    return json.dumps(event, sort_keys=True).encode() + b"\n"
