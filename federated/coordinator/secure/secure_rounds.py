"""Rounds whose updates the coordinator sees as their sum alone: trained, and then added up in four more exchanges.

A silo's keys come with the reply to its request for training, so a round has as many exchanges as the protocol. Who
does not answer in one of them is left out of the next. With too few left nothing is unmasked; what was charged stays.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from configs.errors import InputError, SiloweaveError
from configs.schema.federated import FederatedSettings
from configs.schema.schema import RunConfig
from federated.adapters.arrays import Arrays, to_bytes
from federated.aggregation.aggregation import RoundAggregation, Sent
from federated.aggregation.secure_sum import agreement, arrays_of, length_of, members, update_bound
from federated.coordinator.exchange import Bodies, SiloExchange
from federated.coordinator.replies import Answer
from federated.coordinator.schedule.mail import QUERY, TRAIN
from federated.coordinator.schedule.quorum import Quorum
from federated.coordinator.schedule.training_request import TrainingRequests
from federated.coordinator.secure.shared_step import SharedStep, check_room, check_values
from federated.coordinator.secure.sum_record import SumRecord
from federated.coordinator.silo_records import SiloRecords
from federated.protocol import silo_pb2 as pb
from privacy.distributed.planned import of_length
from privacy.plan import PlanTerms
from privacy.secagg.agreement import Agreement, least_survivors
from privacy.secagg.encoding import Words
from privacy.secagg.failures import ForgedMessage, TooFewSilos
from privacy.secagg.messages import Phase, open_silo_message
from privacy.secagg.server import Server
from privacy.secure_sum import SecureSum

SUM_TAKES = "a secure sum takes"
_LEAST_PATIENCE_S = 60.0  # of an exchange without training


class LostSum(SiloweaveError):
    """A sum that can't be had any more."""


@dataclass(frozen=True)
class Summed:
    """What a round's sum has given.

    Attributes:
        mean: of the updates that are in it; where silos make the noise together, the step over all their samples.
        answered: whose these are.
        releases: digests of the replies with which they were charged, by silo.
    """

    mean: Arrays
    answered: list[str]
    releases: dict[str, str]


@dataclass
class SecureRounds:
    """The secure rounds of one run.

    Attributes:
        exchange: asks the silos.
        requests: what they are asked to train on.
        settings: of the rounds.
        plan: what the silos have reserved.
        record: what is kept of the newest sum.
        present: gives the silos that are there and have reserved.
        silo_records: what the silos have said of themselves, and signed.
    """

    exchange: SiloExchange
    requests: TrainingRequests
    settings: FederatedSettings
    plan: PlanTerms
    record: SumRecord
    present: Callable[[], list[str]]
    silo_records: SiloRecords

    def reservation(self) -> pb.Secure:
        """Who would add up, as a reservation says it.

        Raises:
            InputError: a silo is larger than the plan has room for.
        """
        check_room(self.plan, {silo: self.count(silo) for silo in self.exchange.nodes})
        return pb.Secure(roster=members(self.exchange.enrolled()))

    def fewest(self) -> int:
        """Silos that have to be in a sum."""
        return fewest(self.terms, self.exchange.parties.size)

    def count(self, silo: str) -> int:
        """What a silo has declared as its number of units."""
        return int(self.silo_records.silos[silo]["public_record_count"])

    @property
    def terms(self) -> SecureSum:
        """What the plan says of its sums."""
        if self.plan.secure_sum is None:
            raise TypeError("the plan has no secure sum")
        return self.plan.secure_sum

    def round(self, number: int, aggregation: RoundAggregation, adapter: Arrays) -> Summed | None:
        """Has the silos train and adds their updates up; None for a round that was lost in an earlier start.

        Raises:
            InputError: a later round was summed before.
            PolicyRefusal: too few have trained, because policies refuse.
            SiloweaveError: too few are left, or the sum is lost.
        """
        self.record.begin(number)
        if self.record.lost:
            message = f"round {number} is lost ({self.record.lost}): the model stays as it was, and its charges spent"
            self.exchange.log.emit("federate", "lost", round=number, message=message)
            return None
        sent, settings = aggregation.sent(""), self.settings.in_round(number)
        pulled = max((float(np.abs(array).max(initial=0)) for array in sent.correction.values()), default=0.0)
        step = self._step(settings, sent)
        clip = update_bound(settings, self.plan, pulled) if step is None else 0.0
        secure = pb.Secure(roster=members(self.exchange.enrolled()), clip=clip)
        content, asked = to_bytes(sent.adapter), sent if step is None else replace(sent, correction={})
        train = self.requests.kind(number, asked, self.requests.frozen_part(adapter), content, secure)["train"]
        who = self.exchange.parties.signer.public_key, self.exchange.run.id
        agreed = agreement(train, self.terms, *who, length_of(sent.adapter))
        one = MaskedSum(self.exchange, self.settings, self.record, Server(agreed), agreed, time.monotonic())
        releases: dict[str, str] = {}

        def trained(answer: Answer) -> bytes:
            self.silo_records.take_receipt(answer.silo, answer.reply.trained.receipt)
            releases[answer.silo] = answer.digest
            return answer.reply.trained.keys

        def body(silo: str) -> tuple[bytes, bytes]:
            return self.exchange.body(f"round-{number}", silo, train=train), content

        one.run(Bodies(self.present(), body), "trained", trained)
        return self._summed(one, releases, sent, step)

    def _step(self, settings: FederatedSettings, sent: Sent) -> SharedStep | None:
        """The step that a round takes whose noise the silos make together; None where each adds its own."""
        if (noise := self.plan.noise) is None:
            return None
        length = length_of(sent.adapter)
        check_values(self.plan, length)
        return SharedStep(of_length(noise, length), self.plan.sampling_rate, settings.learning_rate)

    def _summed(self, one: "MaskedSum", releases: Mapping[str, str], sent: Sent, step: SharedStep | None) -> Summed:
        total, survivors = one.unmasked()
        if step is None:
            encoding, number = one.agreement.encoding, len(survivors)
            mean = arrays_of(encoding.decode(total) / number, sent.adapter)
            error = {"error_bound": encoding.error_bound(number) / number}
        else:
            counts = {silo: self.count(silo) for silo in survivors}
            mean = step.update(total, counts, sent.correction, sent.adapter)
            error = step.told(counts)
        dropped = sorted(set(releases) - set(survivors))
        told = {"silos": len(one.agreement.roster), "summed": survivors, "dropped": dropped, **error}
        self.exchange.log.emit("federate", "secure_sum", round=self.record.round, **told)
        return Summed(mean, survivors, {silo: releases[silo] for silo in survivors})


@dataclass
class MaskedSum:
    """The sum of one round, or of one private evaluation, on its way.

    Attributes:
        exchange, settings, record: as above.
        server: adds up.
        agreement: what all its silos agree on.
        began: when it has begun, by the monotonic clock.
        metric: of the evaluation; empty: it is a round's.
        inbox: what is for each silo that has answered in the phase before.
    """

    exchange: SiloExchange
    settings: FederatedSettings
    record: SumRecord
    server: Server
    agreement: Agreement
    began: float
    metric: str = ""
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


def fewest(terms: SecureSum, silos: int) -> int:
    """Silos that have to be in a sum."""
    return max(terms.fewest, least_survivors(silos, terms.colluders))


def check_silos(config: RunConfig, silos: int) -> None:
    """Refuses secure aggregation among silos that are too few for it, or too many for the noise that they share.

    Raises:
        InputError: they are, or a round would end before enough of them have answered.
    """
    settings, honest = config.federated, config.privacy.min_honest
    if not settings.secure_aggregation:
        return
    needed = max(settings.min_silos, settings.colluders + honest)
    least = fewest(SecureSum(colluders=settings.colluders, min_survivors=needed), silos)
    if least > silos:
        noise = f", privacy.min_honest {honest}" if honest else ""
        raise InputError(
            f"federated.secure_aggregation: with federated.colluders {settings.colluders}{noise} and "
            f"federated.min_silos {settings.min_silos} a sum takes {least} silos, and there are {silos}; lower one of "
            "them, or enrol more"
        )
    always = least_survivors(silos, settings.colluders) - settings.colluders
    if 0 < honest < always:
        raise InputError(
            f"privacy.min_honest is {honest}: with {silos} silos and federated.colluders {settings.colluders} at least "
            f"{always} honest ones are in every sum anyway; give {always} or more, which makes each share smaller"
        )
    if 0 < settings.enough_silos < least:
        raise InputError(
            f"federated.enough_silos is {settings.enough_silos}: a secure sum of {silos} silos takes {least}; give at "
            "least that, or 0"
        )
