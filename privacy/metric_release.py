"""A metric that a plan releases beside its training."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

from configs.schema.base import Labels, MaxNewTokens

_LATER = ("labels", "max_new_tokens")
Finite = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Rounds = Annotated[int, Field(ge=1, le=100_000)]


class MetricRelease(BaseModel):
    """A named vector of bounded per-unit sums, released with Gaussian noise over all units, without sampling.

    Attributes:
        name: what is measured.
        noise_multiplier: standard deviation of the noise over the most that one unit can move the vector (2-norm).
        releases: how often it is released in the whole run.
        labels: public classes whose counts are part of the vector: they decide its length, and how far a unit moves it.
        max_new_tokens: most tokens that the model writes for an example, where what it writes is part of the vector.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
    noise_multiplier: Finite
    releases: Rounds
    labels: Labels = ()
    max_new_tokens: MaxNewTokens = 0

    @model_serializer(mode="wrap")
    def _as_written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What a release has not got is written as before there was any, so that its plan's digest stays."""
        tree: dict[str, Any] = handler(self)
        return {name: value for name, value in tree.items() if name not in _LATER or value}
