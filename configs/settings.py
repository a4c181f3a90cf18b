"""What every group of settings is made of."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Probability = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


def _two_or_more(labels: tuple[str, ...]) -> tuple[str, ...]:
    if len(labels) == 1 or len(set(labels)) < len(labels):
        raise ValueError(f"the labels {list(labels)}: give two or more, each once")
    return labels


Label = Annotated[str, Field(pattern=r"^\w(.*\S)?$", max_length=100)]
Labels = Annotated[tuple[Label, ...], Field(max_length=100), AfterValidator(_two_or_more)]
"""The classes of a classification; none where there is none."""


class Settings(BaseModel):
    """Base of every group: immutable, and a misspelt key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
