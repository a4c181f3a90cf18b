"""The noise of a plan whose silos make it together."""

from dataclasses import replace

from configs.errors import InputError, PolicyRefusal
from privacy.distributed.distributed import DistributedNoise
from privacy.distributed.guarantee import refuse_coarse
from privacy.secure_sum import SecureSum


def planned(terms: SecureSum | None, noise_multiplier: float, clip: float) -> DistributedNoise | None:
    """What the silos of a sum add together in a step, charged for the most silos and values that a plan allows.

    Args:
        terms: of the plan.
        noise_multiplier: sigma of ``min_honest`` shares together.
        clip: how far one record moves a silo's sum at most.

    Returns:
        None where each silo adds all noise itself.

    Raises:
        InputError: the words have no room for the silos' sums and the noise.
    """
    if terms is None or terms.noise is None:
        return None
    shared = terms.noise
    return DistributedNoise(
        noise_multiplier=noise_multiplier,
        clip=clip,
        reach=shared.reach,
        silos=terms.most,
        min_honest=shared.min_honest,
        colluders=terms.colluders,
        dimension=shared.values,
        word_bits=shared.word_bits,
    )


def problem_of(terms: SecureSum | None, noise_multiplier: float, clip: float) -> str:
    """Why no sums with this noise can be made or accounted for; empty where they can."""
    try:
        noise = planned(terms, noise_multiplier, clip)
        if noise is not None:
            refuse_coarse(noise)
    except InputError as error:
        return f"secure_sum.noise: {error}"
    if noise is not None and not noise.colluders:
        return "secure_sum.colluders is 0: with secure_sum.noise give 1 or more, since a silo knows its own share of it"
    if noise is not None and noise.unit_is_silo:
        return f"secure_sum.noise: reach = {noise.reach:g}: give more than max_grad_norm ({clip:g})"
    return ""


def of_length(noise: DistributedNoise, length: int) -> DistributedNoise:
    """The noise of sums of so many values. Neither its steps nor its deviation depend on how many they are.

    Raises:
        PolicyRefusal: rounding was charged for fewer.
    """
    if length > noise.dimension:
        message = f"{length} values train, and the plan is charged for rounding {noise.dimension} at most"
        raise PolicyRefusal.of("values", f"{length}", f"{noise.dimension}", message)
    return replace(noise, dimension=length)
