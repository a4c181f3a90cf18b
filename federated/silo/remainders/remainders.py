"""What updates left out, each beside the reply that left: a run's next update has it added (error feedback).

It is made of noised updates alone, so that what leaves stays post-processing of them. A round continues from what the
run's newest released reply left out, as the ledger has it. The file is there before its reply is stored, and an older
one until a newer reply is: so a round that is computed again, after a crash at any instant, comes to the same bytes,
and one whose reply is stored is not computed again.
"""

from collections.abc import Sequence
from logging import Logger
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from configs.schema.federated import UpdateDtype
from configs.storage.files import digest_bytes, private_folder, write_atomic
from configs.storage.layout import SiloFiles
from federated.adapters.arrays import Arrays, from_bytes, to_bytes
from federated.adapters.packed_updates import packed, unpacked
from federated.adapters.update_codec import encoded
from federated.protocol import silo_pb2 as pb
from privacy.compression import Compression
from privacy.ledger.journal import Journal
from privacy.ledger.runs import Body, Run, Runs

_OWNERS_FILE, _DIGEST = 0o600, 64


class Written(NamedTuple):
    """An update as it travels, and what of it doesn't; nothing where the next one does without."""

    content: bytes
    left: Arrays


class Remainders:
    """``remainders/`` in the silo's state directory: a file for each reply that may be a run's newest.

    Args:
        state_dir: the silo's.
        log: its own.
    """

    def __init__(self, state_dir: Path, log: Logger) -> None:
        self._folder, self._log = SiloFiles(state_dir).remainders, log
        self._tried: set[str] = set()

    def written(self, update: Arrays, how: Compression | UpdateDtype, request: pb.Request, journal: Journal) -> Written:
        """A noised update as it travels: in few bytes, with what the run's earlier ones left out, or as arrays.

        Args:
            update: the round's.
            how: the plan's compression, or the type of the request's arrays.
            request: which round of which run.
            journal: of the silo's ledger.

        Raises:
            ValueError: a value is not finite.
        """
        if not isinstance(how, Compression):
            return Written(encoded(update, how), {})
        bodies = journal.bodies() if how.leaves_out else ()
        run = Runs(bodies).of(request.run_id, request.coordinator)
        if run is None:
            return Written(packed(update, how), {})
        return with_feedback(update, how, self._before(run, bodies))

    def keep(self, reply: bytes, left: Arrays, journal: Journal) -> None:
        """Keeps what an update left out whose reply is about to be stored.

        Args:
            reply: what will be stored.
            left: what it leaves out.
            journal: of the silo's ledger: replies that could not be stored may have been tried before, with another
                receipt in each, and their files would fill the disk.

        Raises:
            SiloweaveError: the disk is full or not writable.
        """
        for name in self._tried - _stored(journal.bodies()):
            (self._folder / name).unlink(missing_ok=True)
        self._tried = {name := digest_bytes(reply)}
        content = to_bytes(left)
        write_atomic(private_folder(self._folder) / name, digest_bytes(content).encode() + content, _OWNERS_FILE)

    def drop_old(self, journal: Journal, *, strays: bool = False) -> None:
        """Deletes what no round of an open run continues from.

        Args:
            journal: of the silo's ledger.
            strays: also what lies beside no reply: a crash may have come before its reply was stored. Another process
                that is at work on this silo may be about to store one.
        """
        if not self._folder.is_dir():
            return
        bodies = journal.bodies()
        needed, stored = {newest_release(run, bodies) for run in Runs(bodies).open()}, _stored(bodies)
        for path in list(self._folder.iterdir()):
            if path.name not in needed and (strays or path.name in stored):
                path.unlink(missing_ok=True)

    def _before(self, run: Run, bodies: Sequence[Body]) -> Arrays:
        """What the run's newest reply left out. Where it is lost, nothing: that costs quality alone."""
        newest = newest_release(run, bodies)
        if not newest:
            return {}
        path = self._folder / newest
        try:
            content = path.read_bytes()
            if content[:_DIGEST].decode() != digest_bytes(content[_DIGEST:]):
                raise ValueError("it is damaged")
            return from_bytes(content[_DIGEST:])
        except (OSError, ValueError) as error:
            self._log.warning("what earlier updates of run %s left out is lost (%s: %s)", run.name, path, error)
            return {}


def with_feedback(update: Arrays, compression: Compression, before: Arrays) -> Written:
    """An update in few bytes, to which what earlier ones left out was added, and what is left out now.

    Raises:
        ValueError: a value is not finite.
    """
    whole = {name: array + _fitting(before, name, array) for name, array in update.items()}
    content = packed(whole, compression)
    sent = unpacked(content, compression, {name: array.shape for name, array in whole.items()})
    left = {name: array - sent[name] for name, array in whole.items()}
    if not all(np.isfinite(array).all() for array in left.values()):
        raise ValueError("an update has values that are too large to be rounded")
    return Written(content, {**before, **left})  # what this round froze waits for one in which it trains


def newest_release(run: Run, bodies: Sequence[Body]) -> str:
    """Digest of the reply that a run's newest round has released; empty before the first."""
    rounds = {body["number"] for body in run.charges if body["round"]}
    found = (body for body in reversed(bodies) if body["kind"] == "release" and body["charge"] in rounds)
    return next((str(body["reply_digest"]) for body in found), "")


def _stored(bodies: Sequence[Body]) -> set[str]:
    return {body["reply_digest"] for body in bodies if body["kind"] == "release"}


def _fitting(before: Arrays, name: str, array: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """What was left out of an array; zeros where there was none of its shape."""
    found = before.get(name)
    return found if found is not None and found.shape == array.shape else np.zeros_like(array)
