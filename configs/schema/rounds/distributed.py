"""Which settings go with noise that the silos of a secure sum make together."""

from collections.abc import Iterator, Mapping
from typing import Any

# What else than one plain step over all silos' samples is no sum of clipped gradients: setting, the only value that
# fits, why, and what to give.
_FEDERATED = (
    (
        "secure_aggregation",
        True,
        "a silo's share of the noise is too little for anybody to see what it hides; only the sum has enough",
        "true",
    ),
    (
        "local_steps",
        1,
        "a round is one step over all silos' samples: a silo's second step would start from its own gradient without "
        "noise, and what a record moves in a sum of such steps is not bounded by its clipping",
        "1, and more rounds",
    ),
    (
        "optimizer",
        "sgd",
        "the moments of an optimizer inside a silo would be of gradients without noise; the server takes the step",
        "'sgd', and a server optimizer in federated.aggregation",
    ),
    ("proximal_mu", 0, "a round is one step, which begins where it would be drawn back to", "0"),
)
_PRIVACY = (
    ("unit", "record", "it is for sums of records' gradients", "'record', or privacy.mode = 'single'"),
    ("sampler", "poisson", "its charge is proven for Poisson samples", "'poisson'"),
    (
        "clipping_function",
        ("fixed", "automatic"),
        "the count that moves the norm is released by each silo, and would need all of its noise",
        "'fixed' or 'automatic'",
    ),
)


def distributed_problems(federated: Mapping[str, Any], privacy: Mapping[str, Any]) -> Iterator[str]:
    """What does not go with ``privacy.mode``.

    Args:
        federated: the settings of the rounds, by name.
        privacy: those of the guarantee.
    """
    honest, colluders, enough = privacy["min_honest"], federated["colluders"], federated["enough_silos"]
    if privacy["mode"] == "single":
        if honest:
            yield (
                f"privacy.min_honest is {honest}: with privacy.mode 'single' no noise rests on other silos; leave it "
                "out, or give privacy.mode = 'distributed'"
            )
        return
    for group, given, rules in (("privacy", privacy, _PRIVACY), ("federated", federated, _FEDERATED)):
        for name, fits, why, instead in rules:
            if given[name] not in (fits if isinstance(fits, tuple) else (fits,)):
                yield f"{group}.{name} is {_shown(given[name])} with privacy.mode 'distributed': {why}; give {instead}"
    if not colluders:
        yield (
            "federated.colluders is 0 with privacy.mode 'distributed': a silo that looks at the next model knows its "
            "own share of the noise, which hides nothing from it; give 1 or more"
        )
    if honest < 2:
        yield (
            f"privacy.min_honest is {honest} with privacy.mode 'distributed': a secure sum has two honest silos at "
            "least; give 2 or more, at most the silos that may be counted on in every round"
        )
    if 0 < enough < honest + colluders:
        yield (
            f"federated.enough_silos is {enough} with privacy.min_honest {honest} and federated.colluders {colluders}: "
            f"a round would end with less noise than is charged; give 0, or {honest + colluders} or more"
        )


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)
