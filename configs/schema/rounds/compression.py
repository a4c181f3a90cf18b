"""Which settings go with updates that travel in few bytes."""

from collections.abc import Iterator, Mapping
from typing import Any

SMALLEST_BLOCK, LARGEST_BLOCK = 16, 2**16
_SCALED = ("int8", "int4")
_WHOLE_UPDATES = {
    "scaffold": "control variates are mean gradients, and the largest values of an update are none",
    "median": "of most values most silos would send nothing, and the median be 0",
    "trimmed_mean": "of most values most silos would send nothing, and what is sent be left out",
    "krum": "how near two updates are would be a matter of which values each sends",
}


def compression_problems(given: Mapping[str, Any]) -> Iterator[str]:
    """What of the federated settings does not go with how updates travel.

    Args:
        given: the settings, by name.
    """
    dtype, block, share = given["update_dtype"], given["update_block"], given["update_share"]
    if block and dtype not in _SCALED:
        yield (
            f"federated.update_block is {block} with federated.update_dtype {dtype!r}: only 'int8' and 'int4' have "
            "scales; give one of them, or leave it out"
        )
    if 0 < block < SMALLEST_BLOCK:
        yield f"federated.update_block is {block}: give {SMALLEST_BLOCK} or more (64, for instance), or leave it out"
    if not block and (dtype == "int4" or (dtype == "int8" and share < 1)):
        few = f" and federated.update_share {share:g}" if share < 1 else ""
        yield (
            f"federated.update_dtype is {dtype!r}{few} without federated.update_block: say how many values share one "
            "scale; give 64, for instance"
        )
    if share == 1:
        return
    if why := _WHOLE_UPDATES.get(given["aggregation"], ""):
        yield (
            f"federated.update_share is {share:g} with federated.aggregation {given['aggregation']!r}: {why}; give 1, "
            "or 'fedavg' or a server optimizer"
        )
    if given["adapters"] == "product":
        yield (
            f"federated.update_share is {share:g} with federated.adapters 'product': its factors turn from round to "
            "round, and what an update has left out means nothing in the next; give 1, or 'average' or 'ffa'"
        )
