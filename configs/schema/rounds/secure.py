"""Which settings go with secure aggregation, where the coordinator sees a round's updates as their sum alone."""

from collections.abc import Iterator, Mapping
from typing import Any

from configs.schema.rounds.distributed import distributed_problems
from configs.schema.rounds.schedule import evaluation_problem

SECURE_RULES = ("secure_aggregation", "colluders")
_REASONS = {
    "scaffold": "control variates are of single updates",
    "median": "it compares single updates",
    "trimmed_mean": "it compares single updates",
    "krum": "it compares single updates",
}
# What needs more than the sum of a round's updates: setting, the values that fit, why, and what to give.
_REFUSED = (
    (
        "schedule",
        ("synchronous",),
        "a step adds up whoever has come, so that who is slow would decide whose sum is seen",
        "'synchronous'",
    ),
    (
        "adapters",
        ("average", "ffa"),
        "updates of factors become products one by one, before they are added",
        "'average' or 'ffa'",
    ),
    ("update_dtype", ("float32",), "under masks a value travels as a word of 32 bits, whatever it was", "'float32'"),
    (
        "update_share",
        (1.0,),
        "which values are sent would be seen, and tells of the data (Zhang et al. 2025)",
        "1",
    ),
)


def secure_problems(given: Mapping[str, Any]) -> Iterator[str]:
    """What of the federated settings does not go with secure aggregation.

    Args:
        given: the settings, by name.
    """
    if not given["secure_aggregation"]:
        if given["colluders"]:
            yield (
                f"federated.colluders is {given['colluders']}: without secure aggregation the coordinator sees every "
                "update; leave it out, or give federated.secure_aggregation = true"
            )
        return
    for name, fits, why, instead in _REFUSED:
        if given[name] not in fits:
            yield f"federated.{name} is {given[name]!r} with federated.secure_aggregation: {why}; give {instead}"
    if why := _REASONS.get(given["aggregation"], ""):
        yield (
            f"federated.aggregation is {given['aggregation']!r} with federated.secure_aggregation: {why}; give "
            "'fedavg' or a server optimizer"
        )
    if 0 < given["enough_silos"] < given["colluders"] + 2:
        yield (
            f"federated.enough_silos is {given['enough_silos']} with federated.colluders {given['colluders']}: a sum "
            f"has to be of two honest silos at least; give 0, or {given['colluders'] + 2} or more"
        )


def rounds_problem(federated: Mapping[str, Any], privacy: Mapping[str, Any]) -> str:
    """Why the settings of the rounds don't go with those of the privacy; empty where they do."""
    for problem in distributed_problems(federated, privacy):
        return problem
    if not federated["secure_aggregation"]:
        return evaluation_problem(federated["schedule"], privacy["evaluations"])
    if federated["optimizer"] == "sgd" and privacy["clipping_function"] == "quantile":
        return (
            "privacy.clipping_function is 'quantile' with federated.optimizer 'sgd' and federated.secure_aggregation: "
            "how large an update may be is not known beforehand; give federated.optimizer = 'adam', or 'fixed'"
        )
    return ""
