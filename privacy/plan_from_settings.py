"""Makes the plan that a run's settings ask for."""

from typing import Any

from configs.parse import parse
from configs.schema.schema import RunConfig
from privacy.accounting.truncation import units_for
from privacy.plan import METRIC, PlanTerms

# A client's whole update is one vector of a round; who takes part is not secret, and so sampling would not amplify.
_WHOLE_CLIENTS: dict[str, Any] = {"relation": "zero_out", "sampler": "all", "sampling_rate": 1, "steps_per_round": 1}


def plan_terms(config: RunConfig) -> PlanTerms:
    """The plan that the settings ask for: noise calibrated to epsilon over the whole schedule.

    Raises:
        InputError: no noise multiplier reaches the epsilon, or the settings make no consistent plan.
    """
    privacy, federated, private = config.privacy, config.federated, config.data.private
    largest = max(private.public_record_count, *private.public_record_counts.values(), 0)
    cap: dict[str, int] = {}
    if privacy.sampler == "truncated_poisson":
        max_units = units_for(largest, federated.rounds, privacy.delta)
        cap = {"max_batch_size": privacy.max_batch_size, "max_units": max_units}
    metrics = []
    if privacy.evaluations:
        metrics = [
            {
                "name": METRIC,
                "noise_multiplier": privacy.evaluation_noise_multiplier,
                "releases": privacy.evaluations,
                "labels": privacy.evaluation_labels,
                "max_new_tokens": privacy.evaluation_max_new_tokens,
            }
        ]
    secure = {"colluders": federated.colluders, "min_survivors": federated.min_silos}
    tree = {
        "unit": privacy.unit,
        "sampler": privacy.sampler,
        "sampling_rate": privacy.sampling_rate,
        "max_grad_norm": privacy.max_grad_norm,
        "clipping_function": privacy.clipping_function,
        "target_quantile": privacy.target_quantile,
        "noise_multiplier": 1.0,  # until it is calibrated
        "rounds": federated.rounds,
        "steps_per_round": federated.local_steps,
        "delta": privacy.delta,
        "metric_releases": metrics,
        "secure_sum": secure if federated.secure_aggregation else None,
        **cap,
        **(_WHOLE_CLIENTS if privacy.unit == "client" else {}),
        "num_clients": privacy.num_clients,
    }
    return parse(PlanTerms, tree, "privacy").calibrated(privacy.epsilon)
