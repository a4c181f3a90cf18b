"""A small plan with clients as units, for tests."""

from privacy.plan import PlanTerms


def client_plan(**values):
    """``values``: at least ``noise_multiplier``, ``rounds`` and ``num_clients``."""
    whole = {"unit": "client", "relation": "zero_out", "sampler": "all", "sampling_rate": 1, "steps_per_round": 1}
    return PlanTerms(**{**whole, "max_grad_norm": 1.0, "delta": 1e-5, **values})
