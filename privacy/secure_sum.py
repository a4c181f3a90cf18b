"""What a plan says of adding updates up where whoever asks for them is to see their sum alone."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

Silos = Annotated[int, Field(ge=0, le=10**6)]


class SharedNoise(BaseModel):
    """How the silos of a sum make its noise together, where none of them adds all of it.

    Attributes:
        min_honest: silos of each sum of which it is assumed that they add their shares and tell nobody. So many shares
            have the plan's noise, and are what is charged.
        reach: norm to which a silo's sum of clipped gradients is shortened where it is longer.
        values: most values of a sum; rounding is charged for so many.
        word_bits: k of the integers modulo 2^k that are added up.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_honest: Annotated[int, Field(ge=2, le=2**14)]
    reach: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    values: Annotated[int, Field(ge=1, le=2**31)]
    word_bits: Literal[16, 32] = 32


class SecureSum(BaseModel):
    """The part of a plan that silos and certificates read for secure aggregation.

    Attributes:
        colluders: silos that may be in league with whoever adds up, without more being learnt.
        min_survivors: with fewer silos in a sum nothing is unmasked; more than half of all silos and colluders are
            needed anyway.
        noise: how the silos make the noise together; None: each adds all of its own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    colluders: Silos = 0
    min_survivors: Silos = 0
    noise: SharedNoise | None = None

    @property
    def fewest(self) -> int:
        """Silos that are in every sum, however few there are in all: two that don't collude, or all that are charged.

        With noise that is shared, so many have to be honest beside those that collude.
        """
        honest = 2 if self.noise is None else self.noise.min_honest
        return max(self.min_survivors, self.colluders + honest)

    @property
    def most(self) -> int:
        """With noise that is shared, the most silos of a sum; 0 without.

        Among more of them more than half, and half of the colluders, have more honest ones than are charged for.
        """
        return 0 if self.noise is None else 2 * self.noise.min_honest + self.colluders - 1

    @model_serializer(mode="wrap")
    def _as_written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A plan of before is written as it was, so that its digest stays."""
        tree: dict[str, Any] = handler(self)
        if self.noise is None:
            del tree["noise"]
        return tree
