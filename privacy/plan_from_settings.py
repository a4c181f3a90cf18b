"""Makes the plan that a run's settings ask for."""

import math
from typing import Any

from configs.errors import InputError
from configs.parse import parse
from configs.schema.schema import RunConfig
from privacy.accounting.truncation import units_for
from privacy.compression import Compression
from privacy.plan import METRIC, PlanTerms
from privacy.secure_sum import SecureSum, SharedNoise

_MOST_VALUES = 2**26  # of a sum with shared noise: rounding so many costs next to nothing in words of 32 bits
# A client's whole update is one vector of a round; who takes part is not secret, and so sampling would not amplify.
_WHOLE_CLIENTS: dict[str, Any] = {"relation": "zero_out", "sampler": "all", "sampling_rate": 1, "steps_per_round": 1}


def plan_terms(config: RunConfig, *, compressed: bool = True) -> PlanTerms:
    """The plan that the settings ask for: noise calibrated to epsilon over the whole schedule.

    Args:
        config: the run's settings.
        compressed: False: updates travel as they are, whatever the settings say.

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
        "secure_sum": None,
        "compression": Compression.of(federated) if compressed else None,
        **cap,
        **(_WHOLE_CLIENTS if privacy.unit == "client" else {}),
        "num_clients": privacy.num_clients,
    }
    # Noise that is shared may not fit the words before it is calibrated.
    plan = parse(PlanTerms, tree, "privacy").model_copy(update={"secure_sum": _secure_sum(config, largest)})
    try:
        plan = plan.calibrated(privacy.epsilon)
    except InputError as error:
        if privacy.mode == "single":
            raise
        raise InputError(
            f"privacy.mode is 'distributed' with privacy.min_honest {privacy.min_honest}: {error} (reach follows from "
            "privacy.sampling_rate times the largest public_record_count, word_bits are 32); lower that rate, or give "
            "privacy.mode = 'single'"
        ) from None
    return parse(PlanTerms, plan.model_dump(), "privacy")


def _secure_sum(config: RunConfig, largest: int) -> SecureSum | None:
    """How updates are added up.

    Args:
        config: the run's settings.
        largest: public count of the largest silo: a longer sum than that of its batch is shortened, which costs quality
            alone. Ten deviations of the batch's size are left for it to vary.
    """
    privacy, federated = config.privacy, config.federated
    if not federated.secure_aggregation:
        return None
    noise = None
    if privacy.mode == "distributed":
        batch = privacy.sampling_rate * largest
        reach = privacy.max_grad_norm * math.ceil(batch + 10 * math.sqrt(batch) + 10)
        noise = SharedNoise(min_honest=privacy.min_honest, reach=reach, values=_MOST_VALUES)
    return SecureSum(colluders=federated.colluders, min_survivors=federated.min_silos, noise=noise)
