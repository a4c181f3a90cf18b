"""A private evaluation whose noised sums the coordinator sees added up alone: in the five exchanges of a secure sum.

Each silo adds all of its noise itself, and rounds what it has: its charge is that of an evaluation without masks, and
rests on no other silo.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from configs.storage.layout import SECURE_EVALUATION
from federated.aggregation.secure_sum import agreement, members, sums_bound
from federated.coordinator.exchange import Bodies
from federated.coordinator.replies import Answer
from federated.coordinator.secure.masked_sum import LostSum, MaskedSum
from federated.coordinator.secure.secure_rounds import SecureRounds
from federated.coordinator.secure.sum_record import SumRecord
from federated.protocol import silo_pb2 as pb
from privacy.secagg.server import Server


@dataclass(frozen=True)
class EvaluationSum:
    """What an evaluation's sum has given.

    Attributes:
        answered: silos that are in it.
        sums: over all of them.
        error_bound: the most that rounding has moved one of them by.
    """

    answered: list[str]
    sums: list[float]
    error_bound: float


def evaluation_sum(
    secure: SecureRounds, asked: pb.Evaluate, of: tuple[int, float], take_receipt: Callable[[str, bytes], None]
) -> EvaluationSum | None:
    """Has the silos evaluate and adds their noised sums up; None for one that is lost, or was told before.

    With few silos left it is: the round before it is summed, and is not to be lost with it.

    Args:
        secure: of the run.
        asked: what the silos are to evaluate.
        of: how many sums it has, and the standard deviation of a silo's noise on each.
        take_receipt: takes a silo's receipt in; raises where it is not sound.

    Raises:
        SiloweaveError: no silo's doing: the disk is full, or what carries the messages fails.
    """
    exchange, number, (length, std) = secure.exchange, asked.number, of
    record = SumRecord(secure.record.directory, SECURE_EVALUATION)
    if number < record.round:  # the first round is not committed, and so the evaluation before it is asked for again
        return None
    # What a silo has declared is signed with its reservation, and nobody's word before.
    record.begin(number, sums_bound((secure.count(silo) for silo in secure.present()), std))
    asked.secure.CopyFrom(pb.Secure(roster=members(exchange.enrolled()), clip=record.clip))
    agreed = agreement(asked, secure.terms, exchange.parties.signer.public_key, exchange.run.id, length)
    one = MaskedSum(exchange, secure.settings, record, Server(agreed), agreed, time.monotonic(), asked.metric)

    def evaluated(answer: Answer) -> bytes:
        take_receipt(answer.silo, answer.reply.evaluated.receipt)
        return answer.reply.evaluated.keys

    def body(silo: str) -> tuple[bytes, bytes]:
        return exchange.body(f"evaluation-{number}", silo, evaluate=asked), asked.adapter

    with suppress(LostSum):
        if not record.lost:
            one.run(Bodies(secure.present(), body), "evaluated", evaluated)
    if record.lost:
        message = f"evaluation {number} is lost ({record.lost}): it has no figures, and its charges stay spent"
        exchange.log.emit("federate", "lost", evaluation=number, message=message)
        return None
    total, survivors = one.unmasked()
    return EvaluationSum(survivors, agreed.encoding.decode(total).tolist(), agreed.encoding.error_bound(len(survivors)))
