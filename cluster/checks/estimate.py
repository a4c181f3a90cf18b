"""``siloweave plan``: what a run will need and spend, before anything runs."""

from math import prod
from typing import Any

import torch

from cluster.checks.step_memory import step_memory
from configs.errors import InputError
from configs.schema.schema import RunConfig
from configs.schema.silo import SiloPolicy
from federated.adapters.lora_factors import frozen
from federated.adapters.warm_model import adaptation
from federated.aggregation.message_sizes import message_sizes
from federated.coordinator.secure.shared_step import check_values
from federated.protocol.framing import LARGEST_MESSAGE_BYTES
from federated.simulation.simulated_places import ledgers_of
from federated.simulation.simulation import look_at_private
from privacy.plan import PlanTerms
from privacy.plan_from_settings import plan_terms
from trainer.imported import outline
from trainer.models.adapters import adapted, shapes, trainable
from trainer.models.families import empty_model
from trainer.models.load import outline_with_head
from trainer.pretraining.deepspeed_settings import accumulation_steps, likely_device, unsupported
from trainer.pretraining.memory import placed_bytes, state_bytes
from trainer.tasks.headed import head_of


def estimate(config: RunConfig, *, memory: bool = False) -> dict[str, Any]:
    """Parameters, bytes per rank by ZeRO stage, batch factorisation, steps, noise and epsilon.

    Args:
        config: the run's settings.
        memory: whether a silo's memory is tried, which takes a while.

    Raises:
        PolicyRefusal: a silo's rule for delta does not hold.
        InputError: no noise multiplier reaches the epsilon, more trains than noise is charged for, or a silo's memory
            can't be tried.
    """
    private = config.data.private
    sizes = [parameter.numel() for parameter in _base_model(config).parameters()]
    plan, travels = plan_terms(config), adapter_parameters(config)
    check_values(plan, travels)
    counts = {"(default)": private.public_record_count, **private.public_record_counts}
    return {
        "model": {
            "source": config.model.source or "pretrained from a random start",
            "parameters": sum(sizes),
            "context_length": config.model.context_length,
        },
        "pretrain": None if config.model.source else _pretrain(config, sizes),
        "federated": {
            "ledgers": str(ledgers_of(config)),
            "rounds": config.federated.rounds,
            "steps_per_round": config.federated.local_steps,
            "round_rules": config.federated.round_rules,
            "adapter_parameters": travels,
            "messages": _messages(config),
            "silo_memory": step_memory(config, plan) if memory else "not tried; give --memory",
            **_private_data(config),
        },
        "privacy": {
            "schedule": {
                "unit": plan.unit,
                "relation": plan.relation,
                "sampler": plan.sampler,
                "sampling_rate": plan.sampling_rate,
                "max_batch_size": plan.max_batch_size,
                "max_units": plan.max_units,
                "num_clients": plan.num_clients,
                "rounds": plan.rounds,
                "steps_per_round": plan.steps_per_round,
                "metric_releases": [metric.model_dump() for metric in plan.metric_releases],
                "secure_sum": plan.secure_sum.model_dump() if plan.secure_sum else None,
                "compression": plan.compression.model_dump() if plan.compression else None,
            },
            "noise_multiplier": plan.noise_multiplier,
            "steps": plan.steps,
            **plan.guarantee().as_dict(),
            "silos": {
                name: {
                    "public_record_count": count,
                    "expected_batch": config.privacy.sampling_rate * _bound(plan, count),
                    "runs_in_budget": _runs(config.privacy.budget_epsilon, plan.epsilon),
                }
                for name, count in counts.items()
            },
        },
    }


def _base_model(config: RunConfig) -> Any:
    """The base model without values; one that others have made is looked at where it lies, and not downloaded."""
    if config.model.source:
        return outline(config.model.source, config.federated.task_spec)
    return empty_model(config.model, config.tokenizer.vocab_size, config.objective)


def _pretrain(config: RunConfig, sizes: list[int]) -> dict[str, Any]:
    pretrain, cluster = config.pretrain, config.cluster
    return {
        "world_size": cluster.world_size,
        "world_sizes": config.world_sizes,
        "steps": pretrain.steps,
        "tokens": pretrain.batch_size * sum(stage.steps * stage.context_length for stage in config.stages),
        "batch": {
            "sequences": pretrain.batch_size,
            "ranks": cluster.world_size,
            "micro_batch": pretrain.micro_batch_size,
            "accumulation": accumulation_steps(pretrain, cluster.world_size),
        },
        "state_bytes_per_rank": {
            str(stage): state_bytes(pretrain, sizes, stage, cluster.world_size) for stage in range(4)
        },
        "placed_bytes_per_rank": placed_bytes(pretrain, sizes, cluster.world_size),
        "zero_stage": pretrain.zero_stage,
        "optimizer": pretrain.optimizer,
        "not_supported_here": unsupported(pretrain, likely_device(cluster.device)),
    }


def _runs(budget: float, epsilon: float) -> int | None:
    """How often the plan fits a silo's budget; None where no budget bounds it, since it spends nothing of it."""
    return int(budget // epsilon) if epsilon else None


def _private_data(config: RunConfig) -> dict[str, Any]:
    """Of a simulation; data that would be downloaded first, or are not here, are not looked at."""
    source = config.data.private.source
    if source.startswith("hf:"):
        return {"silos_that_look_alike": f"not looked at: {source} is read when the run starts"}
    try:
        return look_at_private(config)
    except InputError as error:
        return {"silos_that_look_alike": f"not looked at: {error}"}


def _bound(plan: PlanTerms, public_record_count: int) -> int:
    """A silo's size; with records as units its rules for the plan have to hold."""
    return plan.bind(public_record_count).public_record_count if plan.unit == "record" else public_record_count


def _messages(config: RunConfig) -> dict[str, Any]:
    """What a round moves for each silo, and what is in its way: the line, or a policy as it is by itself."""
    sizes = message_sizes(config.federated, _shapes(config))
    allowed: int = SiloPolicy.model_fields["max_request_bytes"].default
    return {
        "request_bytes": sizes.request,
        "reply_bytes": sizes.reply,
        "line_carries_bytes": LARGEST_MESSAGE_BYTES,
        "line_carries_it": max(sizes.request, sizes.reply) <= LARGEST_MESSAGE_BYTES,
        "silos_raise_max_request_bytes_to": sizes.request if sizes.request > allowed else None,
    }


def adapter_parameters(config: RunConfig) -> int:
    """Parameters that train and travel; of FFA-LoRA, whose A is frozen, B's."""
    travels = _shapes(config).items()
    return sum(prod(shape) for name, shape in travels if config.federated.adapters != "ffa" or not frozen(name))


def _shapes(config: RunConfig) -> dict[str, tuple[int, ...]]:
    """Of what the first round starts from, by a model without values."""
    model, head = _base_model(config), head_of(config.federated.task_spec)
    if head:
        model = outline_with_head(model.config, head)
    with torch.device("meta"):
        weights = trainable(adapted(model, adaptation(config.federated, head), seed=0))
    return shapes(weights)
