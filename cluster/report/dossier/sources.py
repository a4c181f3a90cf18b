"""What a dossier is made of: the run's certificate, its audit's, the coordinator's word; and how each is cited."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from configs.schema.base import Digest
from configs.storage.layout import CERTIFICATE
from privacy.certificate.certificate import AGGREGATOR, ledgers_of

COORDINATOR, AUDIT = "coordinator.json", "audit-certificate.json"
_SIGNED = ("receipt", "statement", "mandate", "audit")
_OF_A_ROUND = 3  # names above what one silo has released: model, rounds, number
Text = Annotated[str, Field(max_length=2000)]
Amount = Annotated[int, Field(ge=0, le=10**15)]


class Traffic(BaseModel):
    """One round, as the coordinator's log has it.

    Attributes:
        round: its number.
        ended: when its last update was in.
        answered: the silos whose updates came.
        moved_bytes: of its requests and replies together.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    round: Annotated[int, Field(ge=1, le=100_000)]
    ended: datetime
    answered: Annotated[tuple[Text, ...], Field(max_length=100_000)]
    moved_bytes: Amount


class CoordinatorWord(BaseModel):
    """What the coordinator alone says, and nobody signs.

    Attributes:
        run: the run's name.
        task: what was learnt.
        labels: which labels, where there are any.
        train: what of the model has trained.
        published: digests of the files that would leave.
        rounds: when each round ended, and what it moved.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    form: Literal[1] = 1
    run: Text
    task: Text
    labels: Annotated[tuple[Text, ...], Field(max_length=1000)]
    train: Text
    published: dict[Text, Digest]
    rounds: Annotated[tuple[Traffic, ...], Field(max_length=100_000)]


@dataclass(frozen=True)
class Sources:
    """The three, checked.

    Attributes:
        certificate: the run's.
        word: the coordinator's.
        audit: the certificate of the run's audit, where there was one.
        digests: SHA-256 of each one's file.
    """

    certificate: Mapping[str, Any]
    word: CoordinatorWord
    audit: Mapping[str, Any] | None
    digests: Mapping[str, str]

    @property
    def ledgers(self) -> Mapping[str, Any]:
        """What each ledger behind the certificate has signed."""
        return ledgers_of(self.certificate)

    @property
    def clients(self) -> Mapping[str, Any]:
        """With clients as units, what each silo that had a mandate has signed of it."""
        return dict(self.certificate.get("mandates", {}))

    def path_of(self, ledger: str) -> tuple[str, ...]:
        """Where the certificate has a ledger's part."""
        return (AGGREGATOR,) if self.certificate["unit"] == "client" else ("silos", ledger)


@dataclass(frozen=True)
class Sentence:
    """One sentence, and what it rests on.

    Attributes:
        text: the sentence.
        file: of the folder.
        at: the field in it, as a JSON pointer (RFC 6901).
        standing: whose word the field is.
    """

    text: str
    file: str
    at: str
    standing: str


def cited(text: str, *path: str | int, file: str = CERTIFICATE) -> Sentence:
    """A sentence about a field of one of the files."""
    parts = [str(part).replace("~", "~0").replace("/", "~1") for part in path]
    return Sentence(text, file, "".join(f"/{part}" for part in parts), _standing(file, path))


def _standing(file: str, path: tuple[str | int, ...]) -> str:
    if file == COORDINATOR:
        return "the coordinator's word, known by the file's digest"
    if path[0] in ("silos", "mandates", AGGREGATOR) and any(part in _SIGNED for part in path):
        return f"signed by {path[0] if path[0] == AGGREGATOR else path[1]}"
    if path[0] == "model":  # no silo signs the whole of it
        held = ", which the site's own signed ledger holds" if len(path) > _OF_A_ROUND else ""
        return f"a digest that the coordinator states, for everybody to compare{held}"
    return "computed again from what is signed"
