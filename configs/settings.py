"""What every group of settings is made of."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Probability = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Label = Annotated[str, Field(pattern=r"^\w(.*\S)?$", max_length=100)]
Labels = Annotated[tuple[Label, ...], Field(max_length=100)]


def label_problem(labels: tuple[str, ...]) -> str:
    """Why these can't be the labels of a classification; empty where they can, or there are none."""
    if len(labels) == 1 or len(set(labels)) < len(labels):
        return f"{list(labels)}: give two labels or more, each once"
    return ""


class Settings(BaseModel):
    """Base of every group: immutable, and a misspelt key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
