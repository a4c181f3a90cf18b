"""The secure sums that a silo is in, in memory alone: a silo that starts again drops out of those that had begun.

A charged round or evaluation has one client, ever. It is made before its reply is stored, which has its keys; it is
lost with the process; and there is no second one, since the stored reply answers whoever asks for the same again. An
answer of a later phase is given again to the very same request, and to no other one of its phase.
"""

from dataclasses import dataclass, field

from configs.errors import PolicyRefusal
from federated.adapters.arrays import Arrays
from federated.aggregation.secure_sum import vector
from federated.protocol import silo_pb2 as pb
from privacy.secagg.agreement import Agreement
from privacy.secagg.client import Client
from privacy.secagg.encoding import Words
from privacy.secagg.failures import SecureAggregationError
from privacy.secagg.messages import Phase
from privacy.signing import Signer

RULE = "secure_aggregation"


@dataclass
class OpenSum:
    """One silo in one round's sum.

    Attributes:
        round: the round, or the number of a private evaluation.
        plan_digest: of the plan that it was charged to.
        release: the round's charge, as the ledger is asked for it.
        agreement: what it is a sum of, and with whom.
        client: the silo's side of the protocol.
        words: the update, until it was sent under masks.
        keys: the first message.
        answers: the later ones by phase, each with the digest of the request that it answers.
    """

    round: int
    plan_digest: str
    release: tuple[str, str, str, int, str, str]
    agreement: Agreement
    client: Client
    words: Words | None
    keys: bytes
    answers: dict[Phase, tuple[str, bytes]] = field(default_factory=dict)

    def answer(self, asked: pb.Aggregate, digest: str) -> bytes:
        """This silo's message of a phase.

        Raises:
            PolicyRefusal: what was sent is not what the silos have signed, is not due, or differs from what was
                answered before.
        """
        try:
            phase = Phase(asked.phase)
        except ValueError:
            raise PolicyRefusal.of(RULE, f"phase {asked.phase}", "2 to 5") from None
        if phase not in self.answers:
            try:
                self.answers[phase] = digest, self._next(phase, asked.message)
            except SecureAggregationError as error:
                raise PolicyRefusal.of(RULE, type(error).__name__, "what is due", str(error)) from None
        answered, message = self.answers[phase]
        if answered != digest:
            words = f"phase {asked.phase} of round {self.round} was answered, and this is another message"
            raise PolicyRefusal.of(RULE, digest, answered, words)
        return message

    def _next(self, phase: Phase, message: bytes) -> bytes:
        match phase:
            case Phase.SHARES:
                return self.client.share(message)
            case Phase.MASKED if self.words is not None:
                masked, self.words = self.client.mask(message, self.words), None
                return masked
            case Phase.SURVIVORS:
                return self.client.agree(message)
            case Phase.REVEALED:
                return self.client.reveal(message)
        raise PolicyRefusal.of(RULE, f"phase {phase:d}", "2 to 5")


class Masking:
    """The open sums of a silo: for each run of a coordinator that of its newest round, and of its newest evaluation.

    A round's is kept beside its evaluation's: a coordinator that died before it could commit both asks for both again.

    Args:
        name: the silo's.
        signer: its own key.
    """

    def __init__(self, name: str, signer: Signer) -> None:
        self._name, self._signer = name, signer
        self._open: dict[tuple[str, str, str], OpenSum] = {}

    def begun(
        self,
        agreement: Agreement,
        update: Arrays | Words,
        plan_digest: str,
        release: tuple[str, str, str, int, str, str],
    ) -> OpenSum:
        """A charged round's part in a sum, which is not kept yet: nothing of it may leave before its keys are stored.

        Args:
            agreement: what it is a sum of, and with whom.
            update: a noised update; or words, of noised sums or with a share of the sum's noise.
            plan_digest: of the plan that the round was charged to.
            release: the round's charge.

        Raises:
            ValueError: the update has a value that is not finite.
        """
        words = update
        if isinstance(words, dict):
            words = agreement.encoding.encode(vector(words, agreement.encoding.clip))
        client = Client(self._name, self._signer, agreement)
        return OpenSum(release[3], plan_digest, release, agreement, client, words, client.advertise())

    def same(self, request: pb.Request, digest: str) -> OpenSum | None:
        """The open sum that this very request for training has begun."""
        found = self._open.get((request.coordinator, request.run_id, ""))
        return found if found is not None and found.release[2] == digest else None

    def keep(self, request: pb.Request, opened: OpenSum) -> None:
        """Keeps a sum whose first message may be sent; an earlier round of the run is over."""
        self._open[request.coordinator, request.run_id, opened.release[4]] = opened

    def forget(self, request: pb.Request) -> None:
        """Drops what is there of a run that has ended."""
        for key in [key for key in self._open if key[:2] == (request.coordinator, request.run_id)]:
            del self._open[key]

    def of(self, request: pb.Request) -> OpenSum:
        """The sum that a request goes on with.

        Raises:
            PolicyRefusal: this silo is in no such sum.
        """
        metric, number = request.aggregate.metric, request.aggregate.round
        found = self._open.get((request.coordinator, request.run_id, metric))
        if found is None or found.round != number:
            what = f"evaluation {number}" if metric else f"round {number}"
            words = (
                f"this silo is in no sum of {what}: it has not {'evaluated' if metric else 'trained'} in it, or was "
                "started again since and so drops out of it"
            )
            raise PolicyRefusal.of(RULE, what, "a sum that this silo is in", words)
        return found
