"""A silo's mandates on disk: one is added, listed, revoked, or read for a request; each step is one file's, atomic.

A revoked mandate is kept under its digest, and so is never in force again, even if its file is put back.
"""

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from configs.errors import InputError
from configs.parse import refuse_stream
from configs.schema.silo import SiloConfig
from configs.storage.files import digest_bytes, sync_directory, write_atomic, write_new
from configs.storage.layout import SiloFiles
from privacy.ledger.statements import LARGEST_STATEMENT_BYTES
from privacy.mandate import Mandate, MandateTerms, UnsoundMandateError, read_mandate, require_owner
from privacy.signing import Signer

IN_FORCE, EXPIRED, REVOKED = "in force", "expired", "revoked"
_MODE = 0o600


@dataclass(frozen=True)
class Mandates:
    """The mandates of one silo.

    Attributes:
        files: the silo's.
        silo: its id.
        dataset: the steward's name for its dataset.
        public_key: its ledger's.
    """

    files: SiloFiles
    silo: str
    dataset: str
    public_key: str

    @classmethod
    def of(cls, config: SiloConfig, public_key: str) -> "Mandates":
        """Those of a silo's state directory."""
        silo = config.silo
        return cls(SiloFiles(Path(silo.state_dir)), silo.id, silo.dataset_id, public_key)

    @property
    def are_asked_for(self) -> bool:
        """Whether one was ever added: from then on nothing is answered without."""
        return self.files.mandates.is_dir()

    def read(self, study: str) -> Mandate | None:
        """The mandate of a study, whether it has expired or not; None where there is none, or none any more.

        Raises:
            UnsoundMandateError: its file is of another silo, was signed with another key, was edited, or can't be read.
        """
        path = self._path(study)
        content = _content(path)
        if content is None or self._revoked(content).exists():
            return None
        return self._checked(content, study, path)

    def add(self, terms: MandateTerms, signer: Signer) -> Mandate:
        """Signs a mandate, and puts it in force.

        Raises:
            InputError: its study has one that is in force, or whose file is damaged; or its last day has passed.
        """
        path, owner = self._path(terms.study), (self.silo, self.dataset, self.public_key)
        draft = Mandate(
            silo=owner[0], dataset=owner[1], public_key=owner[2], issued=datetime.now(tz=UTC), terms=terms
        ).signed(signer)
        if draft.is_over(time.time()):
            raise InputError(f"expires is {terms.expires}: that day has passed; give a later one")
        try:
            there = self.read(terms.study)
        except UnsoundMandateError as error:
            raise InputError(f"{error}; take it away with `siloweave silo mandate revoke {terms.study}`") from None
        if there is not None and there.is_over(time.time()):
            self.revoke(terms.study)
        with suppress(FileNotFoundError):  # one that was revoked, and put back
            if self._revoked(path.read_bytes()).exists():
                path.unlink()
        try:
            write_new(path, draft.to_bytes(), _MODE)
        except FileExistsError:
            raise InputError(
                f"study is {terms.study!r}, which has a mandate; revoke it first with `siloweave silo mandate revoke`"
            ) from None
        return draft

    def revoke(self, study: str) -> str:
        """Takes a mandate out of force, from the next request on. A damaged file goes the same way.

        Returns:
            Its digest.

        Raises:
            InputError: the study has none.
        """
        path = self._path(study)
        content = _content(path)
        if content is None:
            raise InputError(
                f"{study!r}: no mandate of this silo is called so; `siloweave silo mandate list` shows them"
            )
        write_atomic(self._revoked(content), content, _MODE)
        path.unlink(missing_ok=True)
        sync_directory(path.parent)
        return digest_bytes(content)

    def listed(self) -> Iterator[tuple[str, str, Mandate | None]]:
        """Each study with how its mandate stands, those that were revoked last; no mandate where it can't be used."""
        for path in sorted(self.files.mandates.glob("*.json")):
            try:
                mandate = self.read(path.stem)
            except UnsoundMandateError as error:
                yield path.stem, str(error), None
                continue
            if mandate is not None:
                yield path.stem, EXPIRED if mandate.is_over(time.time()) else IN_FORCE, mandate
        for path in sorted(self.files.revoked_mandates.glob("*.json")):
            try:
                mandate = read_mandate(_content(path) or b"", str(path))
            except UnsoundMandateError as error:
                yield path.stem, f"{REVOKED}; {error}", None
                continue
            yield mandate.terms.study, REVOKED, mandate

    def _checked(self, content: bytes, study: str, path: Path) -> Mandate:
        mandate = read_mandate(content, str(path))
        require_owner(mandate, self.silo, self.dataset, self.public_key, str(path))
        if mandate.terms.study != study:
            raise UnsoundMandateError(f"{path}: study is {mandate.terms.study!r}, its file has another name", "study")
        return mandate

    def _path(self, study: str) -> Path:
        return self.files.mandates / f"{study}.json"

    def _revoked(self, content: bytes) -> Path:
        return self.files.revoked_mandates / f"{digest_bytes(content)}.json"


def _content(path: Path) -> bytes | None:
    """What a mandate's file holds, read once; a little more than any can have, so that it is found to be too long."""
    try:
        refuse_stream(path, "take it away")
        with path.open("rb") as file:
            return file.read(LARGEST_STATEMENT_BYTES + 1)
    except FileNotFoundError:
        return None
    except (OSError, InputError) as error:
        said = getattr(error, "strerror", None) or error
        raise UnsoundMandateError(f"{path}: can't be read ({said})", "file") from None
