"""What every group of settings is made of."""

import codecs
import re
import unicodedata
from collections.abc import Container
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from configs.identities import UnclearIdentityError, canonical

Number = TypeVar("Number", int, float)
Probability = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
# Bounds each value of an adapter, and of what is added to its gradients: silos refuse more, coordinators send no more.
LARGEST_ADAPTER_VALUE = 1000.0
LARGEST_ANSWER = 10_000  # tokens that a model is asked to write
Count = Annotated[int, Field(ge=1)]
MaxNewTokens = Annotated[int, Field(ge=0, le=LARGEST_ANSWER)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""SHA-256 in hexadecimal; a public key looks alike."""


StudyName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
"""The name of a study, by which a request says which mandate covers it; a file is called by it."""


def _two_or_more(labels: tuple[str, ...]) -> tuple[str, ...]:
    if len(labels) == 1 or len(set(labels)) < len(labels):
        raise ValueError(f"the labels {list(labels)}: give two or more, each once")
    return labels


Label = Annotated[str, Field(pattern=r"^\w(.*\S)?$", max_length=100)]
Labels = Annotated[tuple[Label, ...], Field(max_length=100), AfterValidator(_two_or_more)]
"""The classes of a classification; empty where nothing is classified. As a plan has them, whose digest must stay."""


def composed(labels: tuple[str, ...]) -> tuple[str, ...]:
    """Labels in Unicode's form NFC, in which two that look alike are one.

    Raises:
        ValueError: there is a single one, or one twice.
    """
    return _two_or_more(tuple(unicodedata.normalize("NFC", label) for label in labels))


ComposedLabels = Annotated[Labels, AfterValidator(composed)]
"""The same in settings, in Unicode's form NFC."""


def _by_canonical_name(found: dict[str, Number]) -> dict[str, Number]:
    return dict(zip(_canonical_names(tuple(found)), found.values(), strict=True))


def _canonical_names(found: tuple[str, ...]) -> tuple[str, ...]:
    names: list[str] = []
    for name in found:
        try:
            form = canonical(name)
        except UnclearIdentityError:
            form = None
        if form is None:
            raise ValueError(f"the name {name!r} is none; give a silo's name")
        if form in names:
            raise ValueError(f"the name {form!r} is there twice, in two spellings; give it once")
        names.append(form)
    return tuple(names)


CountBySilo = Annotated[dict[str, Count], AfterValidator(_by_canonical_name)]
"""A number for single silos, by the canonical forms of their names."""
SecondsBySilo = Annotated[dict[str, Positive], AfterValidator(_by_canonical_name)]
"""Seconds for single silos, by the canonical forms of their names."""
SiloNames = Annotated[tuple[str, ...], AfterValidator(_canonical_names)]
"""Silos, by the canonical forms of their names."""


def named_as(silo: str, names: Container[str]) -> str | None:
    """How the settings name a silo; None where they don't.

    A silo may have been deployed under another spelling before the settings took the one form of each name.
    """
    try:
        forms = silo, canonical(silo)
    except UnclearIdentityError:
        forms = silo, None
    return next((form for form in forms if form is not None and form in names), None)


_ASCII = bytes(range(128)) + rb" \n \u0041 +AGE- ~{!! .xn--bcher-kva." + b" \x1b$B!!"
_WIDE = re.compile(r"utf-(16|32)(-[bl]e)?")


def _reads_as_it_stands(encoding: str) -> str:
    """Refuses what is no encoding of text, and those in which plain ASCII may stand for something else."""
    try:
        safe = bool(_WIDE.fullmatch(codecs.lookup(encoding).name)) or _ASCII.decode(encoding) == _ASCII.decode("ascii")
    except (LookupError, ValueError):
        safe = False
    if not safe:
        raise ValueError(
            f'{encoding!r} is no encoding that text files are read in; give "utf-8", "latin-1", "cp1252", "utf-16-le" '
            "or another of Python's that has ASCII in it as it stands"
        )
    return encoding


Encoding = Annotated[str, Field(max_length=40), AfterValidator(_reads_as_it_stands)]
"""The name of a text file's encoding."""


class Settings(BaseModel):
    """Base of every group: immutable, and a misspelt key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
