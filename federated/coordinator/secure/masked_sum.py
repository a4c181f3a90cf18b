"""One sum on its way: five exchanges with its silos, and what is kept so that a restart goes on with it."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from configs.errors import SiloweaveError
from configs.schema.federated import FederatedSettings
from federated.coordinator.exchange import Bodies, SiloExchange
from federated.coordinator.replies import Answer
from federated.coordinator.schedule.mail import QUERY, TRAIN
from federated.coordinator.schedule.quorum import Quorum
from federated.coordinator.secure.sum_record import SumRecord
from federated.protocol import silo_pb2 as pb
from privacy.secagg.agreement import Agreement
from privacy.secagg.encoding import Words
from privacy.secagg.failures import ForgedMessage, TooFewSilos
from privacy.secagg.messages import Phase, open_silo_message
from privacy.secagg.server import Server

SUM_TAKES = "a secure sum takes"
_LEAST_PATIENCE_S = 60.0  # of an exchange without training


class LostSum(SiloweaveError):
    """A sum that can't be had any more."""


@dataclass
class MaskedSum:
    """The sum of one round, or of one private evaluation, on its way.

    Attributes:
        exchange: asks the silos.
        settings: of the rounds.
        record: what is kept of the newest sum.
        server: adds up.
        agreement: what all its silos agree on.
        began: when it has begun, by the monotonic clock.
        metric: of the evaluation; empty: it is a round's.
        own_time: whether each exchange has the round's whole time, however long the one before took: with clients as
            units one's slowness must not decide whether another one is in the sum.
        inbox: what is for each silo that has answered in the phase before.
    """

    exchange: SiloExchange
    settings: FederatedSettings
    record: SumRecord
    server: Server
    agreement: Agreement
    began: float
    metric: str = ""
    own_time: bool = False
    inbox: Mapping[str, bytes] | None = None

    def run(self, bodies: Bodies, expected: str, keys_of: Callable[[Answer], bytes]) -> None:
        """All five exchanges; ``unmasked`` gives what has come of them.

        Args:
            bodies: what the silos are asked to add up.
            expected: kind of their reply to it.
            keys_of: takes such a reply, and gives the first message in it.

        Raises:
            LostSum: too few have answered, and the sum is lost.
            PolicyRefusal: too few have, because policies refuse.
            SiloweaveError: too few have.
        """
        self.ask(Phase.KEYS, bodies, (TRAIN, expected), keys_of)
        for phase in list(Phase)[1:]:
            self.next(phase)

    def next(self, phase: Phase) -> None:
        """Passes on what the silos have sent, and takes what they answer."""
        number, inbox = self.record.round, self.inbox or {}

        def body(silo: str) -> tuple[bytes, bytes]:
            asked = pb.Aggregate(round=number, phase=phase, message=inbox[silo], metric=self.metric)
            return self.exchange.body(f"{self._kind}-{number}-{phase.name.lower()}", silo, aggregate=asked), b""

        room = 2 * self.agreement.length * self.agreement.encoding.dtype.itemsize
        bodies = Bodies(list(inbox), body, self._patience_s, reply_bytes=room)
        self.ask(phase, bodies, (QUERY, "aggregated"), lambda answer: answer.reply.aggregated.message)

    def ask(self, phase: Phase, bodies: Bodies, kinds: tuple[str, str], message_of: Callable[[Answer], bytes]) -> None:
        """One exchange with these silos; with those that have answered it before a restart, where some have.

        Raises:
            LostSum: too few have answered, and the sum is lost.
            PolicyRefusal: too few have, because policies refuse.
            SiloweaveError: too few have.
        """
        before, (kind, expected) = self.record.answered.get(phase), kinds
        asked = replace(bodies, silos=[silo for silo in bodies.silos if before is None or silo in before])
        needs = self._needs(before)

        def accept(answer: Answer) -> None:
            message = message_of(answer)
            name, _ = open_silo_message(message, phase, self.agreement.digest, self.agreement.roster)
            if name != answer.silo:
                raise ValueError(f"its message is of silo {name!r}")
            self.server.receive(message)

        try:
            if len(asked.silos) < needs.fewest:
                needs.unmet = f"{len(asked.silos)} of the {needs.fewest} silos that it takes are there"
                raise SiloweaveError(needs.unmet)
            answered = self.exchange.collect(asked, kind, self._step(phase), expected, accept, needs)
            self.inbox = self.server.advance()
        except SiloweaveError as error:
            self._give_up_if_lost(error, needs, asked.silos)
            raise
        self.record.passed_on(phase, answered)

    def unmasked(self) -> tuple[Words, list[str]]:
        """The sum, and whose updates are in it."""
        return self.server.total(), self.server.survivors

    @property
    def _kind(self) -> str:
        return "evaluation" if self.metric else "round"

    def _step(self, phase: Phase) -> str:
        return f"{'evaluation-' if self.metric else ''}{self.record.round}/{phase.name.lower()}"

    def _needs(self, before: list[str] | None) -> Quorum:
        """All that were told of before a restart: others would make another message, which no silo answers."""
        federated, fewest = self.settings, self.agreement.min_survivors
        enough = federated.enough_silos
        if before is not None:
            fewest = enough = len(before)
        return Quorum(fewest, enough=enough, grace_s=federated.grace_s, rule=SUM_TAKES, missing=federated.missing)

    def _patience_s(self) -> float:
        """What is left of the round's time; an exchange without training has a minute in any case."""
        if self.own_time:
            return self.settings.round_timeout_s
        left = self.settings.round_timeout_s - (time.monotonic() - self.began)
        return max(left, min(self.settings.round_timeout_s, _LEAST_PATIENCE_S))

    def _give_up_if_lost(self, error: SiloweaveError, needs: Quorum, asked: Sequence[str]) -> None:
        """Ends a sum for good where those that may still answer are too few, and one of an evaluation where any are.

        Who refuses has dropped out: it was started again, or was told something that silos have not signed. Who is
        late may still answer a round when it is asked again. An evaluation is not waited for: the round before it is
        summed and not committed, and whoever was started again would not add that up a second time.

        Raises:
            LostSum: it has ended.
        """
        if not needs.unmet and not isinstance(error, ForgedMessage | TooFewSilos):
            return
        left = set(asked) - {silo for silo, _ in needs.refusals}
        may_come = len(left) >= needs.fewest and not needs.missing(left)
        for_good = self.record.answered and (not may_come or isinstance(error, ForgedMessage))
        if not for_good and not self.metric:
            return
        self.record.give_up(needs.unmet or str(error))
        raise LostSum(
            f"{error}; so the sum of round {self.record.round} is lost: nothing was unmasked, and its charges stay "
            "spent; the same command again goes on with the next round"
        ) from None
