"""Rounds whose updates the coordinator sees as their sum alone: trained, and then added up in four more exchanges.

A silo's keys come with the reply to its request for training, so a round has as many exchanges as the protocol. Who
does not answer in one of them is left out of the next. With too few left nothing is unmasked; what was charged stays.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from configs.errors import InputError
from configs.schema.federated import FederatedSettings
from configs.schema.schema import RunConfig
from federated.adapters.arrays import Arrays, to_bytes
from federated.aggregation.aggregation import RoundAggregation, Sent
from federated.aggregation.secure_sum import agreement, arrays_of, length_of, members, update_bound
from federated.coordinator.exchange import Bodies, SiloExchange
from federated.coordinator.replies import Answer
from federated.coordinator.schedule.training_request import TrainingRequests
from federated.coordinator.secure.masked_sum import MaskedSum
from federated.coordinator.secure.shared_step import SharedStep, check_room, check_values
from federated.coordinator.secure.sum_record import SumRecord
from federated.coordinator.silo_records import SiloRecords
from federated.protocol import silo_pb2 as pb
from privacy.distributed.planned import of_length
from privacy.mechanism.masked_clients import client_encoding
from privacy.plan import PlanTerms
from privacy.secagg.agreement import least_survivors
from privacy.secagg.encoding import Words
from privacy.secagg.server import Server
from privacy.secure_sum import SecureSum


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
        opened = self.opened(number, aggregation, adapter)
        return None if opened is None else self._summed(opened, *opened.run())

    def opened(self, number: int, aggregation: RoundAggregation, adapter: Arrays) -> "RoundSum | None":
        """A round's sum before anybody is asked for it; None where it was lost in an earlier start.

        Raises:
            InputError: a later round was summed before.
        """
        self.record.begin(number)
        if self.record.lost:
            message = f"round {number} is lost ({self.record.lost}): the model stays as it was, and its charges spent"
            self.exchange.log.emit("federate", "lost", round=number, message=message)
            return None
        sent, settings = aggregation.sent(""), self.settings.in_round(number)
        pulled = max((float(np.abs(array).max(initial=0)) for array in sent.correction.values()), default=0.0)
        step = self._step(settings, sent)
        roster = members(self.exchange.enrolled())
        if self.plan.unit == "client":
            if len(roster) > self.plan.num_clients:
                raise InputError(
                    f"privacy.num_clients is {self.plan.num_clients}: there are {len(roster)} silos; give at least that"
                )
            clip = client_encoding(self.plan.for_clients(), len(roster)).clip
        else:
            clip = update_bound(settings, self.plan, pulled) if step is None else 0.0
        secure = pb.Secure(roster=roster, clip=clip)
        content, asked = to_bytes(sent.adapter), sent if step is None else replace(sent, correction={})
        kind = self.requests.kind(number, asked, self.requests.frozen_part(adapter), content, secure)
        who, (whole,) = (self.exchange.parties.signer.public_key, self.exchange.run.id), kind.values()
        agreed = agreement(whole, self.terms, *who, length_of(sent.adapter))
        told = self.exchange, self.settings, self.record, Server(agreed), agreed, time.monotonic()
        one = MaskedSum(*told, own_time=self.plan.unit == "client")

        def body(silo: str) -> tuple[bytes, bytes]:
            return self.exchange.body(f"round-{number}", silo, **kind), content

        return RoundSum(one, Bodies(self.present(), body), self.silo_records.take_receipt, sent, step)

    def _step(self, settings: FederatedSettings, sent: Sent) -> SharedStep | None:
        """The step that a round takes whose noise the silos make together; None where each adds its own."""
        if (noise := self.plan.noise) is None:
            return None
        length = length_of(sent.adapter)
        check_values(self.plan, length)
        return SharedStep(of_length(noise, length), self.plan.sampling_rate, settings.learning_rate)

    def _summed(self, opened: "RoundSum", total: Words, survivors: list[str]) -> Summed:
        sent, step = opened.sent, opened.step
        if step is None:
            encoding, number = opened.one.agreement.encoding, len(survivors)
            mean = arrays_of(encoding.decode(total) / number, sent.adapter)
            error = {"error_bound": encoding.error_bound(number) / number}
        else:
            counts = {silo: self.count(silo) for silo in survivors}
            mean = step.update(total, counts, sent.correction, sent.adapter)
            error = step.told(counts)
        opened.tell(survivors, **error)
        return Summed(mean, survivors, {silo: opened.releases[silo] for silo in survivors})


@dataclass
class RoundSum:
    """The sum of one round's updates, and what its silos are asked.

    Attributes:
        one: the sum.
        bodies: the requests for training.
        take_receipt: takes what a silo's ledger has signed of it.
        sent: what the silos train on.
        step: where they make the noise together.
        releases: digests of the replies with which updates were charged, by silo.
    """

    one: MaskedSum
    bodies: Bodies
    take_receipt: Callable[[str, bytes], None]
    sent: Sent
    step: SharedStep | None
    releases: dict[str, str] = field(default_factory=dict)

    def run(self) -> tuple[Words, list[str]]:
        """The sum, and whose updates are in it.

        Raises:
            PolicyRefusal: too few have trained, because policies refuse.
            SiloweaveError: too few are left, or the sum is lost.
        """

        def trained(answer: Answer) -> bytes:
            self.take_receipt(answer.silo, answer.reply.trained.receipt)
            self.releases[answer.silo] = answer.digest
            return answer.reply.trained.keys

        self.one.run(self.bodies, "trained", trained)
        return self.one.unmasked()

    def tell(self, survivors: list[str], **error: float) -> None:
        """Logs who is in the sum, who has dropped out, and what the sum's rounding may do."""
        silos, dropped = len(self.one.agreement.roster), sorted(set(self.releases) - set(survivors))
        told = {"silos": silos, "summed": survivors, "dropped": dropped, **error}
        self.one.exchange.log.emit("federate", "secure_sum", round=self.one.record.round, **told)


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
