"""When a round's updates are added up, and which settings fit that."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

Schedule = Literal["synchronous", "buffered"]

ROUND_RULES = (
    *("schedule", "buffer", "staleness_exponent", "max_staleness"),
    *("min_silos", "enough_silos", "grace_s", "required_silos", "round_timeout_s", "deadlines_s"),
)
_OF_BUFFERED = {"staleness_exponent": 0.5, "max_staleness": 100}
# What a server step that comes whenever enough updates are there can't do: setting, the only value that fits, why, and
# what to give.
_REFUSED = (
    ("required_silos", (), "each step would wait for them", "none, or 'synchronous'"),
    ("enough_silos", 0, "federated.buffer says how many updates are enough", "0"),
    ("stages", (), "updates of one stage would come to the model of the next", "none, or 'synchronous'"),
)
_NEED_ROUNDS = {
    "scaffold": "control variates are of one round that all silos start from the same model",
    "median": "it compares updates that start from one model",
    "trimmed_mean": "it compares updates that start from one model",
    "krum": "it compares updates that start from one model",
}


def schedule_problems(given: Mapping[str, Any]) -> Iterator[str]:
    """What of the federated settings does not go with their schedule.

    Args:
        given: the settings, by name.
    """
    if 0 < given["enough_silos"] < given["min_silos"]:
        yield (
            f"federated.enough_silos is {given['enough_silos']}: a round would end before federated.min_silos "
            f"({given['min_silos']}) have answered; give 0, or at least that"
        )
    if given["grace_s"] and not given["enough_silos"]:
        yield (
            f"federated.grace_s is {given['grace_s']:g} and federated.enough_silos 0: a round waits for every silo "
            "anyway; give federated.enough_silos, or leave it out"
        )
    yield from _synchronous(given) if given["schedule"] == "synchronous" else _buffered(given)


def _synchronous(given: Mapping[str, Any]) -> Iterator[str]:
    for name, default in {"buffer": 0, **_OF_BUFFERED}.items():
        if given[name] != default:
            yield (
                f"federated.{name} is {given[name]:g}: federated.schedule 'synchronous' has no use for it; leave it "
                "out, or give federated.schedule = 'buffered'"
            )


def _buffered(given: Mapping[str, Any]) -> Iterator[str]:
    if not given["buffer"]:
        yield (
            "federated.buffer is 0 with federated.schedule 'buffered': give the number of updates that make a step, at "
            "most as many as there are silos"
        )
    if given["min_silos"] > given["buffer"]:
        yield (
            f"federated.min_silos is {given['min_silos']} and federated.buffer {given['buffer']}: a step of so few "
            "updates never has so many silos; give at most federated.buffer"
        )
    for name, fits, why, instead in _REFUSED:
        if given[name] != fits:
            shown = f"has {len(given[name])}" if name == "stages" else f"is {given[name]!r}"
            yield f"federated.{name} {shown} with federated.schedule 'buffered': {why}; give {instead}"
    if why := _NEED_ROUNDS.get(given["aggregation"], ""):
        yield (
            f"federated.aggregation is {given['aggregation']!r} with federated.schedule 'buffered': {why}; give "
            "'fedavg' or a server optimizer"
        )
    if given["adapters"] == "product":
        yield (
            "federated.adapters is 'product' with federated.schedule 'buffered': a late update is of factors that have "
            "been turned since; give 'average' or 'ffa'"
        )


def evaluation_problem(schedule: Schedule, evaluations: int) -> str:
    """Why private evaluations don't go with the schedule; empty where they do."""
    if schedule == "synchronous" or evaluations <= 1:
        return ""
    return (
        f"privacy.evaluations is {evaluations} with federated.schedule 'buffered': between two steps silos are at "
        "work, and all would wait for the slowest; give 1, which follows the last step, or 0"
    )
