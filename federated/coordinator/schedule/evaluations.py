"""The noised sums over the silos' held-out units: asked for after a round, and what figures they give."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from configs.schema.schema import RunConfig
from configs.storage.manifests import Manifest
from federated.adapters.arrays import Arrays, to_bytes
from federated.coordinator.exchange import Bodies, SiloExchange
from federated.coordinator.replies import Answer
from federated.coordinator.schedule.mail import TRAIN
from federated.coordinator.schedule.quorum import Quorum
from federated.coordinator.schedule.training_request import TrainingRequests
from federated.coordinator.secure.secure_evaluation import evaluation_sum
from federated.coordinator.secure.secure_rounds import SecureRounds
from federated.evaluation.private_sums import Bounds, bounds_of, checked_sums, evaluation_after, figures
from federated.protocol import silo_pb2 as pb
from privacy.plan import METRIC


@dataclass(frozen=True)
class PrivateEvaluations:
    """The private evaluations of one run.

    Attributes:
        exchange: asks the silos.
        requests: what they are told of the model.
        config: the run's settings.
        base: the base model's manifest.
        take_receipt: takes a silo's receipt in; raises where it is not sound.
        secure: adds the silos' sums up under masks; None: each silo's are seen.
    """

    exchange: SiloExchange
    requests: TrainingRequests
    config: RunConfig
    base: Manifest
    take_receipt: Callable[[str, bytes], None]
    secure: SecureRounds | None = None

    def after(self, round_number: int, adapter: Arrays | None, bodies: Callable[..., Bodies]) -> None:
        """Asks for the noised sums after a round that is to be evaluated; before its commit: a restart asks again.

        Args:
            round_number: 0 before the first one.
            adapter: what is evaluated; None: the base model alone.
            bodies: makes the same request to each silo that is there.
        """
        federated, privacy = self.config.federated, self.config.privacy
        number = evaluation_after(round_number, federated.rounds, privacy.evaluations)
        if number is None:
            return
        evaluate = pb.Evaluate(
            number=number,
            metric=METRIC,
            **self.requests.model(),
            adapter_spec=self.requests.shared_spec(),
            adapter=to_bytes(adapter) if adapter else b"",
        )
        released = privacy.evaluation_labels, privacy.evaluation_max_new_tokens
        bounds = bounds_of(self.base, federated.task_spec, *released)
        multiplier, told = privacy.evaluation_noise_multiplier, dict[str, Any]()
        if self.secure:
            std = multiplier * bounds.sensitivity
            found = evaluation_sum(self.secure, evaluate, (bounds.num_sums, std), self.take_receipt)
            if found is None:
                return
            answered, rows, told = found.answered, [found.sums], {"error_bound": found.error_bound}
        else:
            answered, rows = self._each(number, evaluate, bounds, bodies)
        told |= figures(rows, bounds, multiplier, len(answered))
        self.exchange.log.emit("federate", "private_evaluation", round=round_number, silos=answered, **told)

    def _each(
        self, number: int, evaluate: pb.Evaluate, bounds: Bounds, bodies: Callable[..., Bodies]
    ) -> tuple[list[str], list[list[float]]]:
        """Who has answered, and what each has sent by itself."""
        sums: dict[str, list[float]] = {}

        def take(answer: Answer) -> None:
            self.take_receipt(answer.silo, answer.reply.evaluated.receipt)
            sums[answer.silo] = checked_sums(answer.reply.evaluated.sums, bounds)

        asked = bodies(f"evaluation-{number}", evaluate.adapter, evaluate=evaluate)
        needs = Quorum(self.config.federated.min_silos)
        answered = self.exchange.collect(asked, TRAIN, f"evaluation-{number}", "evaluated", take, needs)
        return answered, [sums[silo] for silo in answered]
