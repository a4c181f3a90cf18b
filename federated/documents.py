"""The public documents that coordinator and silos exchange and keep: small JSON files."""

import json
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from configs.artifacts import write_atomic
from configs.errors import InputError
from configs.load import parse
from privacy.statements import json_object

Document = TypeVar("Document", bound=BaseModel)
LARGEST_DOCUMENT_BYTES = 100_000


def read_document(schema: type[Document], path: Path) -> Document:
    """A public document.

    Raises:
        InputError: it is missing, too large, not JSON, or another kind of document.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror}); give the file that the other side sent") from None
    if len(content) > LARGEST_DOCUMENT_BYTES:
        raise InputError(f"{path}: {len(content)} bytes, a public document has at most {LARGEST_DOCUMENT_BYTES}")
    return parse(schema, json_object(content, str(path)), str(path))


def write_document(path: Path, document: BaseModel) -> None:
    """Writes a public document."""
    write_atomic(path, json.dumps(document.model_dump(mode="json"), indent=2, sort_keys=True).encode() + b"\n")


def read_folder(schema: type[Document], folder: Path) -> dict[Path, Document]:
    """The public documents of a folder, in the order of their names; none where it is missing.

    Raises:
        InputError: as ``read_document``.
    """
    return {path: read_document(schema, path) for path in sorted(folder.glob("*.json"))}
