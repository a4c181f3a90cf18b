"""Which folder holds the ledgers of a dataset: one for each dataset, of all that this user runs on this machine.

A budget is only as good as the one ledger that is asked. So the first folder in which a dataset's ledgers are opened is
written down, with the key that is there, and another one is refused: its budget would begin anew.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from configs.errors import InputError, SiloweaveError
from configs.locks import locked
from configs.parse import json_object, parse, reading
from configs.schema.places import user_state
from configs.storage.files import write_atomic
from configs.storage.layout import SiloFiles
from privacy.signing import Signer


class Home(BaseModel):
    """Where a dataset's ledgers are.

    Attributes:
        folder: the silo's ``state_dir``, or the one of all simulated silos.
        public_key: of the key in it.
        opened: whether ledgers were seen there: they don't vanish.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    folder: Path
    public_key: str
    opened: bool


def register_file() -> Path:
    """The file of this user, outside every ``state_dir``: a copy of one of those must not bring its own."""
    return user_state() / "datasets.json"


@contextmanager
def only_ledger(dataset_id: str, folder: Path, key: Path) -> Iterator[None]:
    """Opens the ledgers of a dataset inside, alone among this user's processes; the first time, writes down where.

    A folder that was moved as a whole, with its key, is the same ledgers' new place.

    Args:
        dataset_id: the steward's name for the dataset.
        folder: where they are, or will be.
        key: the file of the folder's signing key, which is made inside where the dataset is new.

    Raises:
        InputError: the dataset's ledgers are, or were, elsewhere; or the register can't be read.
        SiloweaveError: it can't be written.
    """
    folder, path = folder.resolve(), register_file()
    with _alone(path):
        known = _read(path)
        first = known.get(dataset_id)
        _check(dataset_id, first, folder, key, path)
        yield
        found = Home(folder=folder, public_key=Signer(key).public_key, opened=_ledgers(folder))
        if found != first:
            homes = {name: home.model_dump(mode="json") for name, home in {**known, dataset_id: found}.items()}
            write_atomic(path, json.dumps(homes, indent=2, sort_keys=True).encode(), mode=0o600)


def _check(dataset_id: str, first: Home | None, folder: Path, key: Path, path: Path) -> None:
    if first is None:
        whole = key.exists() or not _ledgers(folder)
    else:
        known = key.exists() and Signer(key).public_key == first.public_key
        whole = known and (_ledgers(folder) or not first.opened)
    if first is not None and first.folder != folder and (not whole or _ledgers(first.folder)):
        raise InputError(
            f"{folder}: the ledgers of dataset {dataset_id!r} are in {first.folder} (as {path} says), and a second "
            "budget for the same people is none; give that folder as state_dir, move it here as a whole, or give the "
            "data another dataset_id if they are other people's"
        )
    if not whole:
        raise InputError(
            f"{folder}: the ledgers of dataset {dataset_id!r}, or {key.name}, by which they are known, are missing; "
            "put their backup back, run `siloweave silo budget reconcile` where the key is there, or give the data "
            "another dataset_id if they are other people's"
        )


def _ledgers(folder: Path) -> bool:
    return next(folder.rglob(SiloFiles(Path()).ledger.name), None) is not None


def _read(path: Path) -> dict[str, Home]:
    with reading(path, "put its backup back"):
        content = path.read_bytes() if path.exists() else b"{}"
        return {name: parse(Home, home, str(path)) for name, home in json_object(content, str(path)).items()}


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise SiloweaveError(
            f"{path.parent}: can't be made ({error.strerror}); set XDG_STATE_HOME, or HOME, to a folder of this user's "
            "that lasts"
        ) from None
    with locked(path.with_suffix(".lock"), b"", wait=True):
        yield
