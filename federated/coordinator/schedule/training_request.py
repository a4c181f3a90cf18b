"""What a request says of training: model, task, settings of the round, and the adapter."""

from dataclasses import dataclass
from typing import Any

from configs.schema.federated import FederatedSettings, UpdateDtype
from configs.schema.schema import RunConfig
from configs.schema.stages import frozen_below
from configs.schema.tasks import TaskSpec
from federated.adapters.arrays import Arrays, to_bytes
from federated.adapters.lora_factors import frozen_digest
from federated.adapters.packed_updates import read_update
from federated.adapters.warm_model import adaptation
from federated.aggregation.aggregation import Sent
from federated.protocol import silo_pb2 as pb
from privacy.plan import PlanTerms


@dataclass(frozen=True)
class TrainingRequests:
    """What one run's requests say.

    Attributes:
        config: the run's settings.
        plan: what the silos have reserved.
        base_model_digest: of the base model's manifest.
    """

    config: RunConfig
    plan: PlanTerms
    base_model_digest: str

    def model(self) -> dict[str, Any]:
        """What a request says of plan, base model and task."""
        spec = self.config.federated.task_spec
        said = {"plan_digest": self.plan.digest, "base_model_digest": self.base_model_digest, "task": spec.name}
        return {**said, "task_spec": _task_spec(spec)}

    def shared_spec(self) -> pb.AdapterSpec:
        """What of the model the shared adapter is about."""
        federated = self.config.federated
        return _adapter_spec(federated, federated.lora_rank, federated.lora_alpha)

    def kind(
        self,
        round_number: int,
        sent: Sent,
        frozen: dict[str, Any],
        adapter: bytes,
        secure: pb.Secure | None = None,
    ) -> dict[str, Any]:
        """A request to train one round; with clients as units, to contribute to it.

        Args:
            round_number: of the silo's ledger.
            sent: what the silo trains on.
            frozen: ``frozen_part`` of the shared adapter.
            adapter: that of ``sent``, as bytes.
            secure: with whom the silos add up; None: updates come by themselves.
        """
        said = _training(self.config.federated, round_number, sent, **frozen)
        train = pb.Train(**self.model(), **said, adapter=adapter, secure=secure)
        if self.plan.unit == "record":
            return {"train": train}
        rate, steps = self.config.privacy.sampling_rate, self.config.federated.local_steps
        return {"contribute": pb.Contribute(train=train, local_steps=steps, sampling_rate=rate)}

    def update(self, content: bytes, like: Arrays, most_bytes: int) -> Arrays:
        """The update in a silo's reply.

        Args:
            content: what the silo sent, whatever it is.
            like: what it was asked to train.
            most_bytes: what an update may have as float32 arrays.

        Raises:
            ValueError: it is something else than the plan, or the request, has asked for.
        """
        settings = self.config.federated
        dtype: UpdateDtype = "float32" if settings.compressed else settings.update_dtype
        return read_update(content, self.plan.compression or dtype, like, most_bytes)

    def frozen_part(self, adapter: Arrays) -> dict[str, Any]:
        """What a request says of the matrices A that don't train (FFA-LoRA)."""
        if self.config.federated.adapters != "ffa":
            return {"frozen_digest": "", "frozen_seed": 0}
        return {"frozen_digest": frozen_digest(adapter), "frozen_seed": self.config.run.seed}


def _adapter_spec(settings: FederatedSettings, rank: int, alpha: float, **frozen: Any) -> pb.AdapterSpec:
    """What of the model a request asks to train. What is left empty says what requests of before have meant."""
    how = adaptation(settings)
    train = "" if how.train == "lora" else how.train
    dtype = "" if how.base_dtype == "float32" else how.base_dtype
    return pb.AdapterSpec(rank=rank, alpha=alpha, train=train, targets=how.targets, base_dtype=dtype, **frozen)


def _task_spec(spec: TaskSpec) -> pb.TaskSpec:
    """What a request says of its task beside the name."""
    pooling = "" if spec.pooling == "model" else spec.pooling
    return pb.TaskSpec(labels=spec.labels, template=spec.template, pooling=pooling)


def _training(settings: FederatedSettings, round_number: int, sent: Sent, **frozen: Any) -> dict[str, Any]:
    """What a request says of how a round trains, beside the adapter itself.

    Of what requests of before had no field for it says nothing where there is nothing to say.
    """
    of_round, stage, changed = settings.in_round(round_number), settings.stage_of(round_number), settings.augmentation
    return {
        "round": round_number,
        "adapter_spec": _adapter_spec(settings, sent.rank, sent.alpha, **frozen),
        "learning_rate": of_round.learning_rate,
        "optimizer": settings.optimizer,
        "proximal_mu": settings.pull,
        "correction": to_bytes(sent.correction) if sent.correction else b"",
        "augmentation": pb.Augmentation(**changed.model_dump()) if changed.largest else None,
        "frozen_below": frozen_below(stage.frozen),
        "frozen": to_bytes(sent.frozen) if sent.frozen else b"",
        "context_length": stage.context_length or 0,
        "update_dtype": "" if settings.compressed or settings.update_dtype == "float32" else settings.update_dtype,
    }
