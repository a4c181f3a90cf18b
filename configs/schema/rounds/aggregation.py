"""Which settings go with each way to aggregate a round's updates."""

from collections.abc import Iterator, Mapping
from typing import Any

_LEAST_SILOS = {"trimmed_mean": 1, "krum": 3}  # updates needed, besides two for each silo that may lie


def aggregation_problems(given: Mapping[str, Any]) -> Iterator[str]:
    """What of the federated settings does not go with their aggregation, or with their anchor.

    Args:
        given: the settings, by name.
    """
    if given["aggregation"] in _LEAST_SILOS:
        yield from _robust(given)
    if given["aggregation"] == "scaffold":
        yield from _scaffold(given)
    if given["anchor"]:
        yield from _anchored(given)


def _robust(given: Mapping[str, Any]) -> Iterator[str]:
    least = 2 * given["byzantine_silos"] + _LEAST_SILOS[given["aggregation"]]
    if given["min_silos"] < least:
        yield (
            f"federated.min_silos is {given['min_silos']}: {given['aggregation']!r} with federated.byzantine_silos "
            f"{given['byzantine_silos']} means something only from {least} updates on; give at least that"
        )


def _scaffold(given: Mapping[str, Any]) -> Iterator[str]:
    if given["optimizer"] != "sgd":
        yield (
            f"federated.optimizer is {given['optimizer']!r}: control variates are mean gradients of plain steps; give "
            "'sgd' with federated.aggregation 'scaffold'"
        )
    if given["proximal_mu"]:
        yield f"federated.proximal_mu is {given['proximal_mu']:g}: give 0 with federated.aggregation 'scaffold'"
    if given["adapters"] == "product":
        yield (
            "federated.adapters is 'product': its factors turn from round to round, and old control variates mean "
            "nothing; give 'average' or 'ffa' with federated.aggregation 'scaffold'"
        )


def _anchored(given: Mapping[str, Any]) -> Iterator[str]:
    for name, value in (("aggregation", "scaffold"), ("adapters", "product")):
        if given[name] == value:
            yield (
                f"federated.anchor is {given['anchor']:g}: with federated.{name} {value!r} there is nothing that stays "
                "comparable from round to round to be drawn back to; give another one, or leave it out"
            )
