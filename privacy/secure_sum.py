"""What a plan says of adding updates up where whoever asks for them is to see their sum alone."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Silos = Annotated[int, Field(ge=0, le=10**6)]


class SecureSum(BaseModel):
    """The part of a plan that silos and certificates read for secure aggregation.

    Attributes:
        colluders: silos that may be in league with whoever adds up, without more being learnt.
        min_survivors: with fewer silos in a sum nothing is unmasked; more than half of all silos and colluders are
            needed anyway.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    colluders: Silos = 0
    min_survivors: Silos = 0

    @property
    def fewest(self) -> int:
        """Silos that are in every sum, however few there are in all: two that don't collude among them."""
        return max(self.min_survivors, self.colluders + 2)
