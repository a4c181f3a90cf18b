"""A silo's updates as they left, each with the request that asked for it. Nothing is sent from here.

The ledger deletes the replies of a run that ends. Whoever wants to know what they gave away needs them longer.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.errors import InputError
from configs.storage.files import digest_bytes, private_folder, write_atomic
from configs.storage.layout import SiloFiles
from configs.storage.manifests import Manifest, commit_manifest, damaged_file, read_manifest
from federated.adapters.arrays import Arrays, from_bytes
from federated.adapters.packed_updates import read_update
from federated.aggregation.secure_sum import secure_of
from federated.protocol import silo_pb2 as pb
from federated.silo.requests import travels_in
from privacy.compression import Compression
from privacy.ledger.client_runs import UNNOISED
from privacy.ledger.runs import Body, Run
from privacy.plan import PlanTerms

_KIND, _REQUEST, _REPLY, _MEMBERS = "released", "request", "reply", "members"
_OWNERS_FILE, _ANY_SIZE = 0o600, 2**63


@dataclass(frozen=True)
class ReleasedRound:
    """One round's update, whose files are read when they are asked for.

    Attributes:
        number: of the round, from 1.
        members_digest: of the units that it was trained on.
        folder: where it lies.
        request_digest: as the ledger has signed it.
        reply_digest: as well; empty for an update without noise, which the ledger knows by its request alone.
        compression: of the run's plan.
    """

    number: int
    members_digest: str
    folder: Path
    request_digest: str
    reply_digest: str
    compression: Compression | None

    def read(self) -> tuple[pb.Train, Arrays]:
        """What was asked for, with the weights that it began with; and weights after minus weights before.

        Raises:
            InputError: a file is not what the ledger has signed.
        """
        request, reply = ((self.folder / name).read_bytes() for name in (_REQUEST, _REPLY))
        if digest_bytes(request) != self.request_digest or self.reply_digest not in ("", digest_bytes(reply)):
            raise _not_what_left(self.folder)
        asked = pb.Request.FromString(request)
        train = asked.contribute.train if asked.WhichOneof("kind") == "contribute" else asked.train
        content = pb.Reply.FromString(reply).trained.update
        return train, read_update(content, travels_in(train, self.compression), from_bytes(train.adapter), _ANY_SIZE)


def asks_for_update(request: pb.Request) -> bool:
    """Whether the answer is an update that its receiver can read. Under masks none leaves: their sum alone is read.

    A request has a roster where the plan has masks, and nowhere else: all others were refused.
    """
    kind = request.WhichOneof("kind")
    return kind in ("train", "contribute") and not secure_of(getattr(request, kind)).roster


class Released:
    """``released/`` in the silo's state directory: a folder for each update, named by its request's digest."""

    def __init__(self, state_dir: Path) -> None:
        self._folder, self._one_at_a_time = SiloFiles(state_dir).released, threading.Lock()

    def keep(self, digest: str, request: bytes, reply: bytes, members_digest: str) -> None:
        """Keeps a reply that is about to leave, and what asked for it. An answer that is asked for again is there.

        Raises:
            SiloweaveError: the disk is full or not writable.
        """
        with self._one_at_a_time:  # the same request may come twice at once
            target = private_folder(self._folder) / digest
            if target.is_dir() and read_manifest(target, _KIND) is not None:
                return
            for name, content in ((_REQUEST, request), (_REPLY, reply)):
                write_atomic(private_folder(target) / name, content, _OWNERS_FILE)
            commit_manifest(target, Manifest(_KIND, "", inputs={_MEMBERS: members_digest}))

    def rounds(self, run: Run, bodies: Sequence[Body]) -> list[ReleasedRound]:
        """A run's updates as far as they were kept, first round first.

        Args:
            run: one of the ledger's.
            bodies: what the ledger's entries say.

        Raises:
            InputError: a file is damaged.
        """
        left, charges = left_rounds(run, bodies), {body["round"]: body for body in run.charges}
        how = PlanTerms.model_validate(run.opening["plan"]).compression
        found = (self._found(number, charges[number]["digest"], left[number], how) for number in sorted(left))
        return [one for one in found if one is not None]

    def _found(
        self, number: int, request_digest: str, reply_digest: str, how: Compression | None
    ) -> ReleasedRound | None:
        folder = self._folder / request_digest
        manifest = read_manifest(folder, _KIND) if folder.is_dir() else None
        if manifest is None:
            return None
        if (
            {_REQUEST, _REPLY} - manifest.files.keys()
            or _MEMBERS not in manifest.inputs
            or damaged_file(folder, manifest)
        ):
            raise _not_what_left(folder)
        return ReleasedRound(number, manifest.inputs[_MEMBERS], folder, request_digest, reply_digest, how)


def left_rounds(run: Run, bodies: Sequence[Body]) -> dict[int, str]:
    """The rounds whose updates may have left, each with its reply's digest; empty for one that had no noise."""
    replies = {body["charge"]: body["reply_digest"] for body in bodies if body["kind"] == "release"}
    return {
        body["round"]: replies.get(body["number"], "")
        for body in run.charges
        if body["round"] and (body["kind"] == UNNOISED or body["number"] in replies)
    }


def _not_what_left(folder: Path) -> InputError:
    return InputError(f"{folder}: is not what left, by its own manifest or the silo's ledger; delete this folder")
