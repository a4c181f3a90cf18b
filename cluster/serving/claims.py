"""What may be said of a served model's privacy: its certificate's claim, once that is checked and about this model."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from configs.errors import InputError
from configs.parse import json_object
from configs.storage.files import digest_bytes, unreadable
from configs.storage.layout import CERTIFICATE
from configs.storage.sealing import MasterKey
from privacy.certificate.check import check_certificate
from privacy.certificate.model_digests import ModelDigests, which_model

NOTHING = "no certificate lies with this model: nothing is claimed of its privacy"


@dataclass(frozen=True)
class Claim:
    """What is claimed of a model.

    Attributes:
        line: the same as one line for people.
        epsilon: of the headline; None where nothing is claimed.
        delta: of the headline.
        unit: whom it is for.
        certificate: SHA-256 of the certificate's file.
    """

    line: str = NOTHING
    epsilon: float | None = None
    delta: float | None = None
    unit: str | None = None
    certificate: str | None = None

    def document(self) -> dict[str, Any]:
        """For machines."""
        return asdict(self)


def documents(claims: Mapping[str, Claim]) -> dict[str, Any]:
    """The same of each model, by name, as the service tells it."""
    return {name: {"privacy": claim.document()} for name, claim in claims.items()}


def of_federation(federation: Path, shared: Path, base_digest: str, key: MasterKey | None) -> Claim:
    """What is claimed of what a federation has published.

    Raises:
        InputError: the certificate doesn't hold, or is about another model.
    """
    path = federation / CERTIFICATE
    if not path.is_file():
        return Claim()
    document, claim = _checked(path)
    digests = ModelDigests.model_validate(document["model"])
    which_model(digests, shared, key)
    if digests.base_model != base_digest:
        raise _of_another(path)
    return claim


def of_merged(folder: Path, inputs: Mapping[str, str]) -> Claim:
    """What is claimed of a merged model, whose manifest names what it was made of.

    Raises:
        InputError: the certificate doesn't hold, or is about another model.
    """
    path = folder / CERTIFICATE
    if not path.is_file():
        return Claim()
    document, claim = _checked(path)
    digests = ModelDigests.model_validate(document["model"])
    named = {f"adapter/{name}": digest for name, digest in digests.adapter.items()}
    # An optimised model names the merged one, too, and the certificate itself.
    said = {name: digest for name, digest in inputs.items() if name == "model" or name.startswith("adapter/")}
    if {"model": digests.base_model, **named} != said:
        raise _of_another(path)
    return claim


def _of_another(path: Path) -> InputError:
    return InputError(f"{path}: is about another model than the one beside it; put the right certificate there")


def _checked(path: Path) -> tuple[dict[str, Any], Claim]:
    try:
        content = path.read_bytes()
    except OSError:
        raise InputError(unreadable(path)) from None
    document = json_object(content, str(path))
    check_certificate(document, str(path))
    if document.get("model") is None:
        raise InputError(f"{path}: version {document['version']} names no model, so nothing can be claimed of this one")
    found, digest = document["headline"], digest_bytes(content)
    earlier = ", on top of what an earlier run spent" if document["model"].get("continues") else ""
    line = (
        f"epsilon {found['epsilon']:.4g} at delta {found['delta']:g} for one {document['unit']}{earlier}; certificate "
        f"{digest}"
    )
    return document, Claim(line, found["epsilon"], found["delta"], document["unit"], digest)
