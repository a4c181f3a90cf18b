"""What a plan says of how updates travel, where less than all of their bits does.

It changes no charge: what travels follows from noised updates and public rules alone. It is in the plan since a silo
has to remember what an update left out until the next one.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from configs.schema.federated import FederatedSettings, UpdateDtype
from configs.schema.rounds.compression import LARGEST_BLOCK, SMALLEST_BLOCK

SCALED: tuple[UpdateDtype, ...] = ("int8", "int4")


class Compression(BaseModel):
    """How the values of an update become few bytes.

    Attributes:
        dtype: what a value is rounded to.
        block: with ``int8`` and ``int4``, values that share one scale; 0 with the others.
        share: share of the values that travels, the largest ones. Below 1 a silo adds what an update left out, by
            rounding, too, to its next one (error feedback: Stich et al. 2018, Karimireddy et al. 2019).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    dtype: UpdateDtype
    block: Annotated[int, Field(ge=0, le=LARGEST_BLOCK)] = 0
    share: Annotated[float, Field(gt=0, le=1)] = 1.0

    @model_validator(mode="after")
    def _consistent(self) -> Compression:
        least = SMALLEST_BLOCK if self.dtype in SCALED else 0
        if (self.dtype in SCALED) != (self.block > 0) or self.block < least:
            raise ValueError(
                f"block is {self.block} with dtype {self.dtype!r}: give {SMALLEST_BLOCK} to {LARGEST_BLOCK} with "
                f"{' or '.join(map(repr, SCALED))}, and 0 with the others"
            )
        if not self.block and self.share == 1:
            raise ValueError(f"dtype is {self.dtype!r} with share 1: that is no compression; leave it out")
        return self

    @classmethod
    def of(cls, settings: FederatedSettings) -> Compression | None:
        """What a run's settings ask for; None where its updates are arrays as before."""
        if not settings.compressed:
            return None
        return cls(dtype=settings.update_dtype, block=settings.update_block, share=settings.update_share)

    @property
    def leaves_out(self) -> bool:
        """Whether a silo keeps what an update left out, and adds it to the next one."""
        return self.share < 1

    def kept(self, values: int) -> int:
        """How many of so many values travel."""
        return min(values, max(1, math.ceil(self.share * values)))


def compression_problem(compression: Compression | None, unit: Literal["record", "client"], summed: object) -> str:
    """Why a plan can't have it; empty where it can.

    Args:
        compression: the plan's.
        unit: what the plan protects.
        summed: how its updates are added up under masks; None: they are not.
    """
    if compression is None:
        return ""
    if summed is not None:
        return (
            "compression goes with no secure_sum: under masks a value travels as a whole word, and which values are "
            "sent would be seen, and tells of the data; leave one out"
        )
    if unit == "client" and compression.leaves_out:
        return (
            f"compression.share is {compression.share:g} with unit 'client': what such an update leaves out has no "
            "noise, and would be kept at the silo; give 1"
        )
    return ""
