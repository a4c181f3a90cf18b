"""A public text that is prepared in a second, for runs in which another one would show nothing more."""

import json
from pathlib import Path

from repository import REPOSITORY


def write_corpus(path: Path) -> None:
    """The paragraphs of our own documents, a row each."""
    texts = [part for page in sorted((REPOSITORY / "docs").glob("*.md")) for part in page.read_text().split("\n\n")]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
